"""Importance of every LoRA element for one system's rows (paper section 3.3), and the file that holds it.

Rows → token batches of like length → forward and a backward that carries each example's gradient into two sums a factor
(`lorapar_kernels.importance`) → I(φ) by parameter name. The loss of an example is the mean over its own answer tokens;
the batch's loss is their sum, so that a batch of 8 gives what 8 batches of 1 give, to rounding.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import lorapar_kernels as lk

from .adapter import ADAPTER, MaskedLinear, lora_parameters, masked_layers
from .artefacts import load_tensors, save_tensors
from .config import require
from .data import encode
from .errors import InputError
from .progress import Progress

Masks = dict[str, Tensor]
IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers


class Scores(dict[str, Tensor]):
    """{parameter name: fp32 importance of the parameter's shape}, with the facts that made it in `metadata`."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]):
        super().__init__(tensors)
        self.metadata = dict(metadata)


def score(
    model: nn.Module,
    tokenizer: Any,
    dataset: Iterable[Any],
    batch_size: int = 8,
    method: Literal["taylor", "first_order", "random"] = "taylor",
    max_length: int | None = None,
    seed: int = 0,
) -> Scores:
    """Score the attached adapter's elements on one system's rows.

    Args:
        model: what `lorapar.attach` returned. tokenizer: None where the rows hold `input_ids` and `labels`.
        dataset: rows with prompt and completion, messages, or input_ids and labels (−100 on the prompt).
        batch_size: examples a step; changes speed and memory, not the result.
        method: "taylor": I = |gφ − ½Fφ²|; "first_order": |gφ|; "random": taylor's values at shuffled places.
        max_length: rows with more tokens are refused (InputError), never cut; None: no limit.

    Returns `Scores`, zero on a twin's rows. Dropout is off, prompt tokens carry no loss, the base gets no gradient and
    nothing is written. Raises InputError for a row without answer tokens, no rows, or scores that are all zero.
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    require(method in ("taylor", "first_order", "random"), "method", method, "taylor, first_order or random")
    examples = [_tokens(row, tokenizer, max_length) for row in dataset]
    require(len(examples) > 0, "dataset", "no rows", "at least one row to score")
    batches = length_batches(examples, batch_size)
    with scoring(model) as layers, Progress("score", len(examples), "example") as progress:
        for batch in batches:
            _score_batch(model, layers, [examples[i] for i in batch])
            progress.update(len(batch))
        sums = {name: cast(lk.ScoreSums, layer.scoring) for name, layer in layers.items()}
    scores, trainable = {}, {}
    for name, layer in layers.items():
        for factor, gphi, gphi_sq in (("lora_A", *sums[name][:2]), ("lora_B", *sums[name][2:])):
            parameter = f"{name}.{factor}.{ADAPTER}.weight"
            squares = torch.zeros_like(gphi_sq) if method == "first_order" else gphi_sq
            trainable[parameter] = trainable_mask(parameter, gphi, layer.trainable_rank)
            values = lk.importance(gphi, squares, len(examples)).cpu().float()
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"scores: {parameter} holds NaN or Inf; score in float32 (model.dtype) or check the rows"
                )
            scores[parameter] = torch.where(trainable[parameter], values, 0.0)
    if not any(bool(tensor.any()) for tensor in scores.values()):
        raise InputError(
            "start: every score is zero, because an element that is zero scores zero for ever and B = 0 makes A's "
            "gradient zero; use start: twin, pissa, olora or paper"
        )
    if method == "random":
        scores = shuffled([scores], trainable, seed)[0]
    rank = next(iter(layers.values())).trainable_rank
    return Scores(scores, {"examples": len(examples), "method": method, "rank": rank})


def trainable_mask(name: str, like: Tensor, rank: int | None) -> Tensor:
    """True on the r trainable rows of A (columns of B); everywhere where there is no twin."""
    mask = torch.ones(like.shape, dtype=torch.bool)
    if rank is not None:
        if ".lora_A." in name:
            mask[rank:] = False
        else:
            mask[:, rank:] = False
    return mask


def shuffled(by_system: list[Masks], trainable: Masks, seed: int) -> list[Masks]:
    """Each system's scores moved to the same random places among the trainable elements of the whole model."""
    names = sorted(trainable)
    flags = torch.cat([trainable[name].reshape(-1) for name in names])
    order = torch.randperm(int(flags.sum()), generator=torch.Generator().manual_seed(seed))
    moved = []
    for scores in by_system:
        flat = torch.cat([scores[name].reshape(-1) for name in names])
        flat[flags] = flat[flags][order]
        parts = flat.split([scores[name].numel() for name in names])
        moved.append({name: part.view(scores[name].shape) for name, part in zip(names, parts)})
    return moved


def save_scores(path: Path | str, scores_1: Scores, scores_2: Scores) -> None:
    """Write `system1/<parameter>` and `system2/<parameter>`, fp32, with both systems' metadata."""
    tensors = {f"system{i}/{name}": t for i, s in ((1, scores_1), (2, scores_2)) for name, t in s.items()}
    save_tensors(path, tensors, {"system1": scores_1.metadata, "system2": scores_2.metadata})


def load_scores(path: Path | str) -> tuple[Scores, Scores]:
    """Read what `save_scores` wrote; InputError where it is missing or corrupt."""
    tensors, metadata = load_tensors(path)
    both = []
    for system in ("system1", "system2"):
        prefix = f"{system}/"
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if not mine or system not in metadata:
            raise InputError(f"{path}: holds no scores of {system}")
        both.append(Scores(mine, metadata[system]))
    return both[0], both[1]


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[dict[str, MaskedLinear]]:
    """Put the layers into scoring mode with fresh sums; on leaving, everything is as it was."""
    layers, training = masked_layers(model), model.training
    required = {parameter: parameter.requires_grad for parameter in lora_parameters(model).values()}
    model.eval()
    try:
        for parameter in required:
            parameter.requires_grad_(True)
        for layer in layers.values():
            layer.scoring = lk.ScoreSums.zeros_like(*layer.factors(ADAPTER)[:2])
        yield layers
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        for layer in layers.values():
            layer.scoring = layer.offsets = None
        model.train(training)


def length_batches(examples: list[tuple[list[int], list[int]]], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that what does not fit in memory fails at once.

    A batch ends early where padding would be more than a sixteenth of it: a padded token costs what a real one does.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    batches: list[list[int]] = []
    room = 0.0
    for i in order:
        length = len(examples[i][0])
        # `room`: tokens that may still be padding; each row adds a sixteenth of the width, less what it lacks itself.
        if batches and len(batches[-1]) < batch_size:
            width = len(examples[batches[-1][0]][0])
            left = room + width / 16 - (width - length)
            if left >= 0:
                batches[-1].append(i)
                room = left
                continue
        batches.append([i])
        room = length / 16
    return batches


def _tokens(row: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> tuple[list[int], list[int]]:
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise InputError(f"row {row.get('id', '')}: {len(ids)} input_ids but {len(labels)} labels")
    else:
        if "messages" in row:
            row = {**row, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        ids, n_prompt = encode(dict(row), tokenizer)
        labels = [IGNORED] * n_prompt + ids[n_prompt:]
    # The first token is predicted by nothing, so its label never counts.
    if all(label == IGNORED for label in labels[1:]):
        raise InputError(f"row {row.get('id', '')}: no answer tokens; a completion must not be empty")
    if max_length is not None and len(ids) > max_length:
        raise InputError(f"row {row.get('id', '')}: {len(ids)} tokens, more than score.max_length {max_length}")
    return ids, labels


def _score_batch(model: nn.Module, layers: dict[str, MaskedLinear], batch: list[tuple[list[int], list[int]]]) -> None:
    device = next(iter(lora_parameters(model).values())).device
    width = max(len(ids) for ids, _ in batch)
    # Padding is on the right, where causal attention keeps it from touching a real token.
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    for i, (ids, row_labels) in enumerate(batch):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, : len(ids)] = torch.tensor(row_labels)
    offsets = torch.arange(len(batch) + 1) * width
    for layer in layers.values():
        layer.offsets = offsets
    # Position t predicts token t + 1.
    targets = labels.roll(-1, 1).to(device)
    targets[:, -1] = IGNORED
    answers = targets != IGNORED
    # No attention mask: padding is on the right, where causal attention keeps it from touching a real token.
    with head_on(model, answers):
        logits = model(input_ids=input_ids.to(device), use_cache=False).logits
    # The gradient of each example's mean cross-entropy over its own answer tokens, (softmax − one-hot) / count, written
    # down: autograd would pass over a [n, vocabulary] tensor twice as often and keep two more of them.
    wide = torch.promote_types(logits.dtype, torch.float32)
    gradient = logits.detach().to(wide).softmax(-1)
    gradient[torch.arange(len(gradient), device=device), targets[answers]] -= 1.0
    counts = answers.sum(1, keepdim=True).expand_as(answers)[answers]
    logits.backward(gradient.div_(counts[:, None]).to(logits.dtype))


@contextlib.contextmanager
def head_on(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at `positions` (bool [rows, tokens]): logits are [n, vocabulary].

    Its product is the widest of all: with SmolLM2-135M a fifth of the work at every position.
    """
    head = cast(Any, model).get_base_model().get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][positions],))
    try:
        yield
    finally:
        hook.remove()
