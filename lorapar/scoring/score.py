"""Importance of every LoRA element for one system's rows (paper section 3.3).

Rows → token batches of like length (batches.py) → forward and a backward that carries each example's gradient
into two sums a factor (`lorapar_kernels.importance`) → running sums (sums.py) → I(φ) by parameter name.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

import lorapar_kernels as lk

from ..adapter.layers import ADAPTER, MaskedLayer, lora_parameters, masked_layers
from ..data.tokens import check_known
from ..errors import InputError, require
from ..progress import Progress
from ..recipe.checks import check_value
from ..recipe.sections import ScoreConfig
from .batches import Example, packs_examples, plan_batches, read_examples, score_batch, short_attention
from .scores import Scores, shuffled, trainable_mask
from .sums import Method, RunningSums, fingerprint_of, first_fault, marks_of, not_finite

log = logging.getLogger("lorapar")
ALL_ZERO = (
    "start: every score is zero, because an element that is zero scores zero for ever and B = 0 makes A's "
    "gradient zero; use start: twin, pissa, olora or paper"
)


def score(
    model: nn.Module,
    tokenizer: Any,
    dataset: Iterable[Any],
    batch_size: int = 8,
    method: Method = "taylor",
    max_length: int | None = None,
    seed: int = 0,
    until_stable: float | None = None,
    theta: float = 0.9,
    checkpoint: Path | None = None,
    on_batch: Callable[[RunningSums], None] = lambda sums: None,
) -> Scores:
    """Score the attached adapter's elements on one system's rows.

    Args:
        model: what `lorapar.attach` returned. tokenizer: None where the rows hold `input_ids` and `labels`.
        dataset: rows with prompt and completion, messages, or input_ids and labels (−100 on the prompt).
        batch_size: examples a step; changes speed and memory, not the result.
        method: "taylor": I = |gφ − ½Fφ²|; "first_order": |gφ|; "random": taylor's values at shuffled places.
        max_length: rows with more tokens are refused (InputError), never cut; None: no limit.
        until_stable: stop once the kept set at `theta` has at least this Jaccard index with the one at half as many
            examples (looks at 16, 32, 64, ...); the rows are then taken in their own order. None: take every row.
        checkpoint: a file that the sums are kept in between batches and gone on from; remove it when you are done.
        on_batch: called after every batch; `RunningSums.importance` reads the mean so far.

    Returns `Scores`, zero on a twin's rows; `metadata` says how many examples it took and, under `until_stable`, the
    looks. Dropout is off, prompt tokens carry no loss, the base gets no gradient and nothing is written. Raises
    InputError for a row without answer tokens, no rows, a gradient that is NaN or Inf (naming row and layer), or
    scores that are all zero.
    """
    for name, value in {"batch_size": batch_size, "method": method, "until_stable": until_stable}.items():
        check_value(ScoreConfig, name, value)
    examples = read_examples(dataset, tokenizer, max_length)
    require(len(examples) > 0, "dataset", "no rows", "at least one row to score")
    for example in examples:
        check_known(example.ids, model, tokenizer, example.name)
    with scoring(model) as layers, short_attention(model, max(len(example.ids) for example in examples)):
        pairs = [layer.factors(ADAPTER)[:2] for layer in layers.values()]
        if not any(bool(a.any()) and bool(b.any()) for a, b in pairs):
            raise InputError(ALL_ZERO)
        packed = packs_examples(model)
        marks = [] if until_stable is None else marks_of(len(examples))
        plan = plan_batches([len(example.ids) for example in examples], batch_size, marks, padded=not packed)
        running = RunningSums(layers)
        key = fingerprint_of(layers, examples, plan, packed=packed, theta=theta if marks else None)
        if checkpoint is not None:
            running.restore(checkpoint, key)
        _run(model, running, examples, plan, packed, until_stable, theta, marks, checkpoint, key, on_batch)
        scores = running.importance(method)
    if not any(bool(tensor.any()) for tensor in scores.values()):
        raise InputError(ALL_ZERO)
    rank = next(iter(layers.values())).trainable_rank
    if method == "random":
        trainable = {name: trainable_mask(name, tensor, rank) for name, tensor in scores.items()}
        scores = shuffled([scores], trainable, seed)[0]
    facts: dict[str, Any] = {"examples": running.examples, "method": method, "rank": rank}
    if until_stable is not None:
        stable = bool(running.looks) and running.looks[-1][1] >= until_stable
        facts |= {"until_stable": until_stable, "theta": theta, "stable": stable, "looks": running.looks}
    return Scores(scores, facts)


def _run(
    model: nn.Module,
    running: RunningSums,
    examples: list[Example],
    plan: list[list[int]],
    packed: bool,
    until_stable: float | None,
    theta: float,
    marks: list[int],
    checkpoint: Path | None,
    key: str,
    on_batch: Callable[[RunningSums], None],
) -> None:
    """Every batch of the plan that is not in the sums yet, until they are stable where that is asked for."""
    if until_stable is not None and running.looks and running.looks[-1][1] >= until_stable:
        return
    with Progress("score", len(examples), "example", running.examples) as progress:
        for batch in plan[running.batches :]:
            running.loss_scale = score_batch(model, running.layers, [examples[i] for i in batch], packed)
            if not running.finite():
                raise error_of_first_bad_row(model, running, [examples[i] for i in batch], packed)
            running.examples += len(batch)
            running.batches += 1
            jaccard = None
            if until_stable is not None and running.examples in (*marks, len(examples)):
                jaccard = running.look(theta)
                if jaccard is not None:
                    log.info("score: %d examples, Jaccard %.4f with half of them", running.examples, jaccard)
            on_batch(running)
            progress.update(len(batch))
            if until_stable is not None and jaccard is not None and jaccard >= until_stable:
                break
            if checkpoint is not None:
                running.save_if_due(checkpoint, key)
    if checkpoint is not None:
        running.save(checkpoint, key)


def error_of_first_bad_row(model: nn.Module, running: RunningSums, batch: list[Example], packed: bool) -> InputError:
    """The error that names the first row of a batch whose gradient is NaN or Inf, and the layer where it began."""
    for example in batch:
        for layer in running.layers.values():
            layer.scoring = lk.ScoreSums.zeros_like(*layer.factors(ADAPTER)[:2])
        score_batch(model, running.layers, [example], packed)
        fault = first_fault(running.layers)
        if fault is not None:
            return not_finite(example.name, fault, running.loss_scale != 1.0)
    return not_finite(f"{batch[0].name} to {batch[-1].name}", "the sums leave fp32's range", running.loss_scale != 1.0)


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[dict[str, MaskedLayer]]:
    """Put the layers into scoring mode with fresh sums; on leaving, everything is as it was."""
    layers, training = masked_layers(model), {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in lora_parameters(model).values()}
    model.eval()
    for module in training:
        # transformers checkpoints a block only in training mode; its children, dropout among them, are not put there.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
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
        for module, value in training.items():
            module.training = value
