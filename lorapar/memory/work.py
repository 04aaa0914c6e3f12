"""How much work each stage is: steps, tokens through the model, floating-point operations, and hours at stated rates.

recipe + tokens of the rows + the model's configuration → what goes through the model in each stage → operations → hours

    forward    2 · (matrix weights that a token meets + LoRA elements) a token, 4 · width of attention a pair of tokens
               of a row, 2 · weights of the head a position whose logits are made
    backward   for the gradients of inputs as much again, for LoRA's and attention's operands twice that; and a forward
               more where activations are recomputed

The base is frozen, so no weight of it has a gradient. Attention is counted over a row's whole square, with padding and
what a causal or windowed kernel skips; a layer that runs twice in a forward is counted once. This is arithmetic for one
process, not a measurement: launching kernels, elementwise work, the trainer's Python, rewards, the optimizer, loading,
saving, the rehearsal of the largest batch and a watched loss are not in it.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.labels import rows_asked
from ..errors import InputError
from ..recipe.sections import Recipe, StageConfig
from .needs import Lengths, Model, Row, cache_bytes, completion_tokens, max_length, stages_with_model
from .switches import checkpointing, default_micro_batch_tokens

UNLABELLED = "its rows are not labelled yet, and it is taken to have all of them"
PUT_ASIDE = "grpo.watch_rows of its rows are put aside"
AS_LIMITS = "each row is taken to be as long as the recipe's limits allow"
UNCOUNTED = "how many rows there are is not known, as the data is not on this machine"


@dataclass(frozen=True)
class Passes:
    """What goes through the model: tokens, pairs of tokens in attention, positions whose logits are made."""

    tokens: float = 0
    pairs: float = 0
    logits: float = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits)

    def times(self, factor: float) -> "Passes":
        return Passes(self.tokens * factor, self.pairs * factor, self.logits * factor)


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    rows: those that it takes. steps: the optimizer's; batches where there is no optimizer.
    forward: prompts, and rows of which only log-probabilities are taken. decoded: tokens made one after another.
    trained: forward with backward. decoding: how often the weights are read to make tokens, and bytes of cache.
    recomputes: the backward makes activations again. remade: it makes the head's logits again, in TRL's tiles.
    at_most: why it may be less. unknown: why nothing is counted.
    """

    stage: str
    rows: int | None = None
    steps: int | None = None
    forward: Passes = Passes()
    decoded: Passes = Passes()
    trained: Passes = Passes()
    decoding: tuple[float, float] = (0, 0)
    recomputes: bool = False
    remade: bool = False
    at_most: tuple[str, ...] = ()
    unknown: str | None = None


@dataclass(frozen=True)
class Rates:
    """What a person says that the machine sustains: TFLOP/s, and GB/s for decoding. None: not said."""

    tflops: float | None = None
    gbytes: float | None = None


def works(recipe: Recipe, lengths: Lengths, model: Model) -> list[Work]:
    """The work of each stage that holds the model. InputError for settings that TRL refuses."""
    counts = {"score": score_work, "renew": renew_work, "sft": sft_work, "grpo": grpo_work, "evaluate": evaluate_work}
    return [counts[stage](recipe, lengths, model) for stage in stages_with_model(recipe)]


# Operations, and hours


def flops(work: Work, model: Model) -> tuple[float, float]:
    """(operations of all but decoding, operations of decoding)."""
    back = work.trained
    # A LoRA factor has a gradient, a frozen weight has none.
    backward = (2 * model.met + 4 * model.elements) * back.tokens + 8 * attention_width(model) * back.pairs
    again = _forward(Passes(back.tokens, back.pairs), model) if work.recomputes else 0
    head = 2 * model.head * back.logits * (2 if work.remade else 1)
    return _forward(work.forward + back, model) + backward + again + head, _forward(work.decoded, model)


def _forward(passes: Passes, model: Model) -> float:
    weights = 2 * (model.met + model.elements) * passes.tokens
    return weights + 4 * attention_width(model) * passes.pairs + 2 * model.head * passes.logits


def attention_width(model: Model) -> int:
    """Attention's heads × their width, summed over the layers that have attention; 0 where there is none (Mamba)."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        return 0
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    kinds: Sequence[str] | None = getattr(text, "layer_types", None)
    return width * (sum("linear" not in kind for kind in kinds) if kinds else text.num_hidden_layers)


def decoded_bytes(work: Work, model: Model) -> float:
    """Bytes that decoding reads: the weights as they are held and the adapter for each step, and the cache."""
    times, cache = work.decoding
    return times * (model.weights - model.unread + 4 * model.elements) + cache


def hours(work: Work, model: Model, rates: Rates) -> tuple[float | None, float | None]:
    """(hours of all but decoding, hours of decoding); None where the rate that it takes was not said.

    Decoding takes as long as its reading, or as its operations where these take longer (large batches, CPUs).
    """
    dense, decoding = flops(work, model)
    computing = None if rates.tflops is None else dense / (rates.tflops * 1e12) / 3600
    if rates.gbytes is None:
        return computing, None if decoding else 0.0
    reading = decoded_bytes(work, model) / (rates.gbytes * 1e9) / 3600
    return computing, max(reading, 0 if rates.tflops is None else decoding / (rates.tflops * 1e12) / 3600)


# The stages


def score_work(recipe: Recipe, lengths: Lengths, model: Model) -> Work:
    """One forward and backward for every row that is scored, the head at the answer alone."""
    if recipe.partition.selection == "all":
        return Work("score", 0, 0)
    return _scoring("score", (1, 2), recipe, lengths)


def renew_work(recipe: Recipe, lengths: Lengths, model: Model) -> Work:
    """The second stage's system scored again."""
    return _scoring("renew", (2 if recipe.stages[-1] == "grpo" else 1,), recipe, lengths)


def _scoring(stage: str, systems: Sequence[int], recipe: Recipe, lengths: Lengths) -> Work:
    config = recipe.score
    if lengths.rows is None and config.examples is None:
        return Work(stage, unknown=UNCOUNTED)
    parts = [_drawn(_rows(lengths, [system], config.examples or 0), config.examples, recipe.seed) for system in systems]
    why = (*_why(lengths), *(["it stops where the selection is stable"] if config.until_stable is not None else []))
    trained = sum((Passes(row.whole, row.whole**2, row.answers) for part in parts for row in part), Passes())
    batches = sum(math.ceil(len(part) / config.batch_size) for part in parts)
    return Work(stage, sum(map(len, parts)), batches, trained=trained, at_most=why)


def _drawn(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """The rows that scoring draws of a system's; the longest where it is not known which are the system's."""
    from datasets import Dataset

    if any(row.system is None for row in rows):
        return sorted(rows, key=lambda row: -row.whole)[:count]
    order = Dataset.from_dict({"place": list(range(len(rows)))}).shuffle(seed=seed)["place"]
    return [rows[place] for place in list(order)[:count]]


def sft_work(recipe: Recipe, lengths: Lengths, model: Model) -> Work:
    """Every row of the stage's systems that is no longer than max_length, as often as its steps take it."""
    config, setting = recipe.sft, recipe.sft.setting
    batch, limit = setting("per_device_train_batch_size"), setting("max_length")
    if lengths.rows is None and setting("max_steps") <= 0:
        return Work("sft", unknown=UNCOUNTED)
    rows = _rows(lengths, config.systems, setting("gradient_accumulation_steps") * batch)
    rows = [row for row in rows if limit is None or row.whole <= limit]
    widths = _packed(rows, recipe) if setting("packing") else [row.whole for row in rows]
    batches = len(widths) // batch if setting("dataloader_drop_last") else math.ceil(len(widths) / batch)
    steps, share = training_steps(config, batches)
    budget = config.micro_batch_tokens
    budget = default_micro_batch_tokens(model.device) if budget == "auto" else budget
    once = Passes()
    for part in _parts(widths, batch, None if setting("packing") else budget):
        # Laid end to end, rows have no padding and attend to themselves alone.
        each = part if setting("padding_free") else [max(part)] * len(part)
        once += Passes(sum(each), sum(width**2 for width in each))
    answers = sum(row.whole if setting("completion_only_loss") is False else row.answers for row in rows)
    why = (*_why(lengths), *([PUT_ASIDE] if recipe.grpo.watch_rows else []))
    trained = (once + Passes(logits=answers)).times(share)
    evaluated = Passes()
    if config.evaluates() and rows:
        aside = rows_asked(config.eval_rows, len(rows))
        each = Passes(_mean([row.whole for row in rows]), _mean([row.whole**2 for row in rows]),
                      _mean([row.answers for row in rows]))  # fmt: skip
        evaluated = each.times(aside * _evaluations(config, steps))
        why = (*why, f"{aside} of its rows are put aside to be evaluated, which is counted as forward")
    if config.early_stopping_patience is not None:
        why = (*why, "it may stop early")
    return Work(
        "sft", None if lengths.rows is None else len(rows), steps, evaluated, trained=trained,
        recomputes=checkpointing(config, model.device), remade=model.device == "cuda", at_most=why,
    )  # fmt: skip


def _evaluations(config: StageConfig, steps: int) -> int:
    """How often stage 1 evaluates, as transformers does."""
    strategy = config.setting("eval_strategy")
    if getattr(strategy, "value", strategy) == "epoch":
        return math.ceil(config.setting("num_train_epochs"))
    every = config.setting("eval_steps") or config.setting("logging_steps")
    return math.ceil(steps / max(every if every >= 1 else math.ceil(steps * every), 1))


def training_steps(config: StageConfig, batches: int) -> tuple[int, float]:
    """(steps of the optimizer, how many times all the batches of an epoch are taken), as transformers counts them."""
    setting = config.setting
    an_epoch = max(math.ceil(batches / setting("gradient_accumulation_steps")), 1)
    limit, epochs = setting("max_steps"), setting("num_train_epochs")
    steps = limit if limit > 0 else math.ceil(epochs * an_epoch)
    return steps, steps / an_epoch


def _packed(rows: list[Row], recipe: Recipe) -> list[int]:
    """The lengths of the packed rows that TRL makes of these."""
    from datasets import Dataset
    from trl import pack_dataset  # pyright: ignore[reportPrivateImportUsage]

    plain = Dataset.from_dict({"input_ids": [[0] * row.whole for row in rows]})
    packed: Any = pack_dataset(plain, max_length(recipe), recipe.sft.setting("packing_strategy"))
    return [len(ids) for ids in packed["input_ids"]]


def _parts(widths: list[int], batch: int, budget: int | None) -> Iterator[list[int]]:
    """The widths of the rows that go through the model together, in an epoch in some order: batches, in parts of at
    most `budget` tokens with their padding (training/sft.py `micro_batches`)."""
    order = random.Random(0).sample(widths, len(widths))
    for start in range(0, len(order), batch):
        part: list[int] = []
        for width in order[start : start + batch]:
            if part and budget is not None and (len(part) + 1) * max(*part, width) > budget:
                yield part
                part = []
            part.append(width)
        yield part


def grpo_work(recipe: Recipe, lengths: Lengths, model: Model) -> Work:
    """Rollouts, log-probabilities where TRL 1.16 takes them apart, and the training pass; every completion is whole."""
    config, setting = recipe.grpo, recipe.grpo.setting
    batch, accumulated = setting("per_device_train_batch_size"), setting("gradient_accumulation_steps")
    group, iterations, new = setting("num_generations"), setting("num_iterations"), completion_tokens(recipe)
    a_generation = setting("steps_per_generation") or (setting("generation_batch_size") or batch * accumulated) // batch
    together = batch * a_generation
    if together < 1 or together % group:
        raise InputError(f"grpo.num_generations: got {group}, which must divide the {together} completions that are "
                         "generated together (per_device_train_batch_size × gradient_accumulation_steps, or as "
                         "generation_batch_size or steps_per_generation says)")  # fmt: skip
    prompts, held_for = together // group, a_generation * iterations  # batches that a generation serves
    if lengths.rows is None and setting("max_steps") <= 0:
        return Work("grpo", unknown=UNCOUNTED)
    rows = _rows(lengths, config.systems, math.lcm(accumulated, held_for) // held_for * prompts)
    # Each prompt is asked once.
    rows = list({row.id or i: row for i, row in reversed(list(enumerate(rows)))}.values())[::-1]
    batches = len(rows) // prompts * held_for
    steps, share = training_steps(config, batches)
    # A generation's prompts are padded to the longest.
    order = random.Random(0).sample(rows, len(rows))
    widest = [max(row.prompt for row in order[i : i + prompts]) for i in range(0, len(order), prompts)]
    width, squared = _mean(widest), _mean([(n + new) ** 2 for n in widest])
    generations = math.ceil(round(share * batches / held_for, 6))
    made = generations * together
    # The prompt's pass gives the first token, with the head at the last position.
    looked = Passes(made * width, made * _mean([n**2 for n in widest]), made)
    whole = Passes(width + new, squared, new)
    aside = bool(setting("beta")) + _takes_old(setting, accumulated, held_for)
    decoded, cache = _decoded(made, width, new, model)
    at_once = min(config.rollout_batch_size or together, together)
    times = generations * math.ceil(together / at_once) * (new - 1)
    return Work(
        "grpo", None if lengths.rows is None else len(rows), steps, looked + whole.times(made * aside), decoded,
        whole.times(share * batches * batch), (times, cache), checkpointing(config, model.device),
        model.device == "cuda",
        (*_why(lengths), f"every completion is taken to have {new} tokens"),
    )  # fmt: skip


def _takes_old(setting: Any, accumulated: int, generated_for: int) -> bool:
    """Whether the policy's own log-probabilities are taken before it is trained (TRL's
    `_generate_and_score_completions`)."""
    return accumulated % generated_for != 0 or (setting("use_vllm") and setting("vllm_importance_sampling_correction"))


def _decoded(rows: float, prompt: float, new: int, model: Model) -> tuple[Passes, float]:
    """(the passes of all but the first of `new` tokens a row, bytes of cache that they read)."""
    pairs = rows * ((new - 1) * prompt + new * (new - 1) / 2)
    return Passes(rows * (new - 1), pairs, rows * (new - 1)), pairs * cache_bytes(model, 1, 1)


def evaluate_work(recipe: Recipe, lengths: Lengths, model: Model) -> Work:
    """The held-out prompts answered by the base and after each stage; every answer is whole."""
    config, new = recipe.evaluate, recipe.evaluate.max_new_tokens
    if lengths.rows is None and config.limit is None:
        return Work("evaluate", unknown=UNCOUNTED)
    held = [row for row in lengths.rows or _rows(lengths, (), 2 * (config.limit or 0)) if row.split != "train"]
    widths = sorted((row.prompt for row in _limited(held, config.limit)), reverse=True)
    times = 1 + len(recipe.stages)
    batches = [widths[i : i + config.batch_size] for i in range(0, len(widths), config.batch_size)]
    looked, decoded, cache = Passes(), Passes(), 0.0
    for part in batches:
        count, width = len(part), part[0]
        made, read = _decoded(count, width, new, model)
        looked, decoded, cache = looked + Passes(count * width, count * width**2, count), decoded + made, cache + read
    return Work("evaluate", len(widths), times * len(batches), looked.times(times), decoded.times(times),
                decoding=(times * len(batches) * (new - 1), times * cache),
                at_most=(*_why(lengths), f"every answer is taken to have {new} tokens"))  # fmt: skip


def _limited(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None:
        return rows
    if any(row.system is None for row in rows):
        return sorted(rows, key=lambda row: -row.prompt)[: 2 * limit]
    return [row for system in (1, 2) for row in [r for r in rows if r.system == system][:limit]]


def _rows(lengths: Lengths, systems: Sequence[int], taken: int) -> list[Row]:
    """The train rows that may carry a label of these systems; where their number is not known, `taken` rows, which
    the stage then takes again and again."""
    if lengths.rows is None:
        return [Row(lengths.prompt, lengths.whole)] * taken
    return [row for row in lengths.rows if row.system in (None, *systems) and row.split != "held_out"]


def _why(lengths: Lengths) -> tuple[str, ...]:
    """Why a stage's rows may be fewer, or shorter, than is counted."""
    unlabelled = lengths.rows is not None and any(row.system is None for row in lengths.rows)
    limits = lengths.rows is None or any(row.split is None for row in lengths.rows)
    return (*([UNLABELLED] if unlabelled else []), *([AS_LIMITS] if limits else []))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
