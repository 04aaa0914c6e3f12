"""Will it fit: the memory that each stage of a recipe needs, before any weight is loaded.

recipe + the model's configuration → bytes of weights, adapters, gradients, optimizer, activations, logits and workspace
a stage → fits or not, the largest batch and context that do, and the cheapest changes that make it fit.

Every row is taken to be as long as the longest, all of it with a loss: what a run must be able to bear. Activations
come out of the model's own code run without data (step.py); the rest is counted.
"""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.rows import load_rows
from ..data.tables import local_files
from ..data.tokens import IGNORED, encode
from ..data.turns import labelled
from ..distributed import launch
from ..distributed.sharding import decoder_blocks
from ..model.load import DTYPES, auto_class, best_dtype, choose_device, load_config, load_tokenizer
from ..model.positions import positions_of
from ..model.quantised import given_form
from ..recipe.sections import Recipe, SourceConfig
from .process import resident_bytes
from .step import NotSimulated, TrainingStep, step_bytes
from .switches import CPU_LOGPROB_TOKENS, checkpointing, default_micro_batch_tokens

COLUMNS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")
# NF4: half a byte, and per 64 weights an 8-bit scale, of which 256 share an fp32 one (arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# What glibc's heap takes for each byte in use, in steps without recomputing (bench/LOG.md).
HEAP = 1.3
_STEPS: dict[Any, int | NotSimulated] = {}
_MODELS: dict[str, Any] = {}


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs at its peak. `unknown`: why its activations could not be found; they count as none."""

    stage: str
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    unknown: str | None = None

    @property
    def total(self) -> int:
        return sum(getattr(self, column) for column in COLUMNS)


@dataclass(frozen=True)
class Model:
    """What the plan knows of the model: its configuration, how many weights are held in which form, and what is
    adapted, in numbers and in a line.

    met, all_experts: as `Targets` says. head: weights of the output head. unread: bytes of `weights` that making a
    token does not read, those of an embedding that is not the head too."""

    config: Any
    dtype: torch.dtype
    device: str
    weights: int
    elements: int
    largest: int
    adapted: str
    met: int
    all_experts: bool
    head: int
    unread: int


@dataclass(frozen=True)
class Row:
    """Tokens of a row's prompt, and of the whole row. None: the row may have either system, or be in either split.

    id: of its prompt, which other rows may have too; None: a prompt of its own.
    learned: tokens that carry a loss, where those are not the completion's."""

    prompt: int
    whole: int
    system: int | None = None
    split: str | None = None
    id: str | None = None
    learned: int | None = None

    @property
    def answers(self) -> int:
        """Tokens that carry a loss."""
        return self.whole - self.prompt if self.learned is None else self.learned


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompt, and of the longest row, a prompt with its completion; `of` says of what.

    rows: each row's, None where it is not known how many there are."""

    prompt: int
    whole: int
    of: str
    rows: tuple[Row, ...] | None = None


def lengths_of(recipe: Recipe, rows: Iterable[Any] | None = None, tokenizer: Any = None) -> Lengths:
    """Of `rows` (prompt and completion), else of the recipe's data where that is on this machine, else its limits."""
    longest_prompt = recipe.data.max_prompt_length
    if rows is None and not data_is_here(recipe):
        whole = max_length(recipe)
        prompt = min(longest_prompt or recipe.sft.trainer_default("max_length"), whole)
        sizes = [source.size for source in recipe.data.sources]
        counted = None if None in sizes else (Row(prompt, whole),) * sum(size or 0 for size in sizes)
        return Lengths(prompt, whole, "the recipe's limits, as its data is not on this machine", counted)
    tokenizer = tokenizer or load_tokenizer(recipe.model)
    taken: Any = rows
    if rows is None:
        taken = load_rows(recipe.data, tokenizer, positions_of(load_config(recipe.model)))[0]
    found = []
    for row in taken:
        ids, n_prompt = encode(row, tokenizer)
        learned = None
        if recipe.data.loss == "assistant":
            learned = sum(label != IGNORED for label in labelled(row, tokenizer, recipe.data.loss)[1])
        # Of rows without labels, a column of that name may say anything.
        system = None if rows is None else row.get("system")
        found.append(Row(n_prompt, len(ids), system, row.get("split"), row.get("id"), learned))
    prompt, whole = max(row.prompt for row in found), max(row.whole for row in found)
    return Lengths(min(prompt, longest_prompt or prompt), whole, "its data", tuple(found))


def data_is_here(recipe: Recipe) -> bool:
    """Whether every source of the recipe can be read without a network."""
    return all(_is_here(source) for source in recipe.data.sources)


def _is_here(source: SourceConfig) -> bool:
    return source.name.startswith("reasoning_gym:") or bool(local_files(source.name, source.split))


def describe(recipe: Recipe) -> Model:
    """Count the model's weights and the adapter's elements on the meta device; the same parts of a recipe once."""
    key = repr((recipe.model, recipe.lora, recipe.start, launch.shares(recipe.model.fsdp)))
    if key not in _MODELS:
        _MODELS[key] = _describe(recipe)
    return _MODELS[key]


def _describe(recipe: Recipe) -> Model:
    from ..adapter.options import lora_config
    from ..adapter.targets import resolve

    config = load_config(recipe.model)
    device = choose_device(recipe.model.device)
    dtype = best_dtype(device) if recipe.model.dtype == "auto" else DTYPES[recipe.model.dtype]
    base = recipe.lora.get("base") or given_form(config)
    if base == "bf16":
        dtype = torch.bfloat16
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    with torch.device("meta"):
        model: Any = auto_class(plain).from_config(plain, dtype=dtype)
    head, lora = model.get_output_embeddings(), lora_config(recipe.lora)
    rank = lora.r * (1 if recipe.start in ("paper", "peft") else 2)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    held = {}
    for module in linears.values():
        count = module.weight.numel()
        if base == "nf4":
            held[module.weight] = int(count * NF4_BYTES)
        elif base == "int8":
            held[module.weight] = count + 4 * module.out_features
    weights = sum(held.get(parameter, parameter.nbytes) for parameter in model.parameters())
    shares = launch.shares(recipe.model.fsdp)
    if shares > 1:
        blocks = [sum(held.get(p, p.nbytes) for p in block.parameters()) for block in decoder_blocks(model)]
        # One that computes and one that is gathered meanwhile are whole.
        shared = weights - int(sum(blocks) * (1 - 1 / shares)) + min(2, len(blocks)) * max(blocks)
        # A base in 4 bits is quantised on its device before it is sharded.
        weights = weights if base in ("nf4", "fp4") else min(weights, shared)
    targets = resolve(model, lora)
    elements = rank * sum(module.in_features + module.out_features for module in targets.modules.values())
    # A quantised weight is made plain in one buffer.
    largest = max(module.weight.nbytes for module in linears.values()) if base in ("nf4", "int8") else 0
    # None where the model has none.
    embedding: Any = model.get_input_embeddings()
    unread = 0 if head is None or embedding is None or head.weight is embedding.weight else embedding.weight.nbytes
    return Model(
        plain, dtype, device.type, weights, elements, largest, targets.line, targets.met, targets.all_experts,
        head.weight.numel() if head is not None else 0, unread,
    )  # fmt: skip


def activation_bytes(model: Model, step: TrainingStep) -> int:
    """Memory that a step's tensors take; on a CPU that is more than is in use, as the heap keeps freed blocks.

    Raises NotSimulated where the model's code does not run without data.
    """
    key = (model.config.to_json_string(), model.dtype, model.device, step)
    if key not in _STEPS:
        try:
            _STEPS[key] = step_bytes(model.config, step, model.dtype, model.device)
        except NotSimulated as error:
            _STEPS[key] = error
    found = _STEPS[key]
    if isinstance(found, NotSimulated):
        raise found
    return int(found * (HEAP if model.device == "cpu" and not step.checkpointing else 1))


def _activations(model: Model, step: TrainingStep) -> tuple[int, str | None]:
    """A step's activations and None, or 0 and why they could not be found."""
    try:
        return activation_bytes(model, step), None
    except NotSimulated as error:
        return 0, str(error)


def needs(recipe: Recipe, lengths: Lengths) -> list[Need]:
    """What each stage that holds the model needs."""
    return [need(recipe, lengths, stage) for stage in stages_with_model(recipe)]


def stages_with_model(recipe: Recipe) -> list[str]:
    """The stages that hold the model, in their order."""
    first, *second = recipe.stages
    return ["score", first, *(["renew"] if recipe.score.renew else []), *second, "evaluate"]


def need(recipe: Recipe, lengths: Lengths, stage: str) -> Need:
    """What one stage needs at its peak."""
    model = describe(recipe)
    # The process as it is now has loaded what a run loads; on a GPU that is not the GPU's memory.
    workspace = model.largest + (resident_bytes() if model.device == "cpu" else 0)
    adapters = 4 * model.elements
    if stage == "evaluate":
        rows = recipe.evaluate.batch_size
        cache = cache_bytes(model, rows, lengths.prompt + recipe.evaluate.max_new_tokens)
        return Need(stage, model.weights, adapters, 0, 0, cache, _logits(model, rows), workspace)
    if stage in ("score", "renew"):
        step = TrainingStep(recipe.score.batch_size, min(lengths.whole, recipe.score.max_length))
        # Logits and their gradient at every answer position; four sums an element.
        logits = 2 * _logits(model, step.rows * step.tokens)
        activations, unknown = _activations(model, step)
        return Need(stage, model.weights, adapters, 16 * model.elements, 0, activations, logits, workspace, unknown)
    step = sft_step(recipe, lengths, model.device) if stage == "sft" else grpo_step(recipe, lengths, model.device)
    (activations, unknown), logits = _activations(model, step), _head(model, step.rows * step.tokens)
    if stage == "sft" and recipe.sft.evaluates():
        # A forward alone, of which checkpointing's memory is the nearest that is simulated, and no less.
        evaluation = _evaluation_step(recipe, step, model.device)
        if evaluation.rows > step.rows:
            more, why = _activations(model, evaluation)
            activations, unknown = max(activations, more), unknown or why
            logits = max(logits, _head(model, evaluation.rows * evaluation.tokens))
    if stage == "grpo":
        setting = recipe.grpo.setting
        per_step = setting("steps_per_generation") or setting("gradient_accumulation_steps")
        rows = setting("generation_batch_size") or step.rows * per_step
        rollout = cache_bytes(model, rows, step.tokens) + _logits(model, rows)
        if rollout > activations + logits:
            activations, logits = rollout, 0
        adapters *= 2 if setting("beta") else 1
    # Gradients are dense; moments are of the active elements, at most all; masks, and the copy that proves the frozen.
    return Need(stage, model.weights, adapters, 4 * model.elements, 8 * model.elements, activations, logits,
                workspace + 7 * model.elements, unknown)  # fmt: skip


def sft_step(recipe: Recipe, lengths: Lengths, device: str) -> TrainingStep:
    """The largest step of stage 1, which leaves out rows longer than max_length."""
    setting = recipe.sft.setting
    rows, tokens = setting("per_device_train_batch_size"), min(lengths.whole, setting("max_length") or lengths.whole)
    if setting("packing"):
        tokens = max_length(recipe)
    if setting("packing") or setting("padding_free"):
        rows, tokens = 1, tokens * rows
    budget = recipe.sft.micro_batch_tokens
    budget = default_micro_batch_tokens(device) if budget == "auto" else budget
    rows = rows if budget is None else max(1, min(rows, budget // tokens))
    return TrainingStep(rows, tokens, checkpointing(recipe.sft, device), setting("activation_offloading"))


def _evaluation_step(recipe: Recipe, step: TrainingStep, device: str) -> TrainingStep:
    """A batch of stage 1's evaluations, in the parts that training takes."""
    rows, budget = recipe.sft.setting("per_device_eval_batch_size"), recipe.sft.micro_batch_tokens
    budget = default_micro_batch_tokens(device) if budget == "auto" else budget
    rows = rows if budget is None else max(1, min(rows, budget // step.tokens))
    return TrainingStep(rows, step.tokens, checkpointing=True)


def grpo_step(recipe: Recipe, lengths: Lengths, device: str) -> TrainingStep:
    """The largest step of stage 2: the longest prompt with a whole completion."""
    config = recipe.grpo
    tokens = lengths.prompt + completion_tokens(recipe)
    return TrainingStep(
        config.setting("per_device_train_batch_size"),
        tokens,
        checkpointing(config, device),
        config.activation_offloading,
    )


def max_length(recipe: Recipe) -> int:
    """Tokens of the longest row that stage 1 takes; TRL's default where the recipe sets no limit."""
    return recipe.sft.setting("max_length") or recipe.sft.trainer_default("max_length")


def completion_tokens(recipe: Recipe) -> int:
    """Tokens of a whole completion in stage 2; TRL's default where the recipe sets no limit."""
    config = recipe.grpo
    return config.setting("max_completion_length") or config.trainer_default("max_completion_length")


def cache_bytes(model: Model, rows: int, tokens: int) -> int:
    """Of the keys and values of so many tokens in each of so many rows."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if heads is None:
        # Without attention (Mamba) the state does not grow with the tokens.
        return 0
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * rows * tokens * text.num_hidden_layers * heads * size * model.dtype.itemsize


def _logits(model: Model, positions: int) -> int:
    return positions * model.config.get_text_config().vocab_size * 4


def _head(model: Model, positions: int) -> int:
    """Of answer_head.py: a piece's logits and five of what is made from them; states and gradients a position.

    On a GPU TRL's kernels take tiles of 4,096 tokens by 32,768 words in the weights' dtype, one at a time."""
    text = model.config.get_text_config()
    states = 3 * positions * text.hidden_size * model.dtype.itemsize
    if model.device == "cpu":
        return 6 * min(positions, CPU_LOGPROB_TOKENS) * min(text.vocab_size, 32768) * 4 + states
    return min(positions, 4096) * min(text.vocab_size, 32768) * model.dtype.itemsize + states


def limits(recipe: Recipe, lengths: Lengths, room: int) -> tuple[int, int]:
    """The most rows of the longest length that stage 1 can hold at once, and the longest row alone; 0 for none.

    Memory is linear in rows, and quadratic in tokens where attention keeps all pairs. Raises NotSimulated where a step
    cannot be simulated.
    """
    model = describe(recipe)
    step = sft_step(recipe, lengths, model.device)
    one = need(recipe, lengths, "sft")
    rest = one.total - one.activations - one.logits

    def at(rows: int, tokens: int) -> int:
        return (
            rest
            + activation_bytes(model, dataclasses.replace(step, rows=rows, tokens=tokens))
            + _head(model, rows * tokens)
        )

    rows = [at(n, step.tokens) for n in (1, 2)]
    batch = int(1 + (room - rows[0]) // (rows[1] - rows[0])) if rows[0] <= room else 0
    x, y = (512, 1024, 2048), [at(1, n) for n in (512, 1024, 2048)]
    slopes = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (slopes[1] - slopes[0]) / (x[2] - x[0])
    low, high = 0, 1 << 24
    while high - low > 1:
        n = (low + high) // 2
        fits = y[0] + (n - x[0]) * (slopes[0] + bend * (n - x[1])) <= room
        low, high = (n, high) if fits else (low, n)
    return batch, low
