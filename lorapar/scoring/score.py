"""Importance of every LoRA element for one system's rows (paper section 3.3).

Rows → token batches of like length (batches.py) → forward and a backward that carries each example's gradient
into two sums a factor (`lorapar_kernels.importance`) → running sums (sums.py) → I(φ) by parameter name.

The processes of a launch share the batches, which are those of one process, and add up what each of them has summed.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import lorapar_kernels as lk

from ..adapter.layers import ADAPTER, MaskedLayer, lora_parameters, masked_layers
from ..data.tokens import check_known
from ..data.turns import Turns
from ..distributed import processes
from ..distributed.sharding import is_part, is_sharded
from ..errors import InputError, require
from ..model.positions import positions_of
from ..progress import Progress
from ..recipe.checks import check_value
from ..recipe.sections import DataConfig, ScoreConfig
from .batches import (
    FP16_LOSS_SCALE,
    ScoredBatches,
    add_gradients,
    check_lengths,
    packs_examples,
    plan_batches,
    read_examples,
    short_attention,
    stretches,
)
from .scores import Scores, shuffled, trainable_mask
from .sums import Method, RunningSums, fingerprint_of, first_fault, marks_of, not_finite

log = logging.getLogger("lorapar")
Add = Callable[[list[Any]], float]  # takes a batch's forward and backward, and returns its loss's scale
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
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    turns: Turns = "last",
) -> Scores:
    """Score the attached adapter's elements on one system's rows.

    In a launch every process calls it with the same arguments, takes its part of the batches, and returns the scores of
    them all.

    Args:
        model: what `lorapar.attach` returned. tokenizer: None where the rows hold `input_ids` and `labels`.
        dataset: rows with prompt and completion, messages, or input_ids and labels (−100 on the prompt).
        batch_size: examples a step; changes speed and memory, not the result. A model that mixes a batch's examples, or
            runs a layer twice, is scored one example at a time; a line in the log says so.
        method: "taylor": I = |gφ − ½Fφ²|; "first_order": |gφ|; "random": taylor's values at shuffled places.
        max_length: rows with more tokens are refused (InputError), never cut; None: no limit but the model's positions.
        until_stable: stop once the kept set at `theta` has at least this Jaccard index with the one at half as many
            examples (looks at 16, 32, 64, ...); the rows are then taken in their own order. None: take every row.
        checkpoint: a file that the sums are kept in between batches and gone on from, by any number of processes; each
            but the main one keeps a file of its own beside it. `sums.remove` takes them away when you are done.
        on_batch: called after every batch of this process; `RunningSums.importance` reads the mean so far.
        loss: of a model that is no causal language model (a classifier, an encoder, a Sequential): `loss(model, row)`
            returns the loss of one row, a tensor of one element. The dataset's rows are then whatever it reads, taken
            one at a time; tokenizer and batch_size are not used, max_length and checkpoint are refused.
        turns: whose tokens carry the loss of a conversation: "last", the completion's; "assistant", those of every turn
            of the assistant. Rows of input_ids and labels say it themselves.

    Returns `Scores`, zero on a twin's rows; `metadata` says how many examples it took and, under `until_stable`, the
    looks. Dropout is off, prompt tokens carry no loss, the base gets no gradient and nothing is written. Raises
    InputError for a row without answer tokens, no rows, a gradient that is NaN or Inf (naming row and layer), or
    scores that are all zero.
    """
    for name, value in {"batch_size": batch_size, "method": method, "until_stable": until_stable}.items():
        check_value(ScoreConfig, name, value)
    check_value(DataConfig, "loss", turns)
    if loss is not None:
        for name, value in {"max_length": max_length, "checkpoint": checkpoint}.items():
            require(value is None, name, value, "None beside a loss, which reads the rows as they are")
    with contextlib.ExitStack() as stack:
        examples: list[Any]
        if loss is None:
            examples = read_examples(dataset, tokenizer, max_length, turns)
            names = [example.name for example in examples]
        else:
            examples = list(dataset)
            names = [str(row.get("id", i) if isinstance(row, Mapping) else i) for i, row in enumerate(examples)]
        require(len(examples) > 0, "dataset", "no rows", "at least one row to score")
        if loss is None:
            positions = positions_of(getattr(model, "config", None))
            check_lengths(examples, positions, "the model's positions", "leave them out")
        for example in examples if loss is None else ():
            check_known(example.ids, model, tokenizer, example.name)
        layers = stack.enter_context(scoring(model))
        pairs = [layer.factors(ADAPTER)[:2] for layer in layers.values()]
        if not any(bool(a.any()) and bool(b.any()) for a, b in pairs):
            raise InputError(ALL_ZERO)
        marks = [] if until_stable is None else marks_of(len(examples))
        key = ""
        add: Add
        if loss is None:
            stack.enter_context(short_attention(model, max(len(example.ids) for example in examples)))
            packed = packs_examples(model)
            plan = plan_batches([len(example.ids) for example in examples], batch_size, marks, padded=not packed)
            batches = ScoredBatches(model, layers, packed)
            if not packed and len(plan) < len(examples):
                batches.look()
            if not batches.together or (is_sharded(model) and len(plan) == len(examples)):
                # As many forwards for every batch; and with a sharded base nothing is left to find out in one.
                batches.together, plan = False, [[i] for batch in plan for i in batch]
            if checkpoint is not None:
                key = fingerprint_of(layers, examples, plan, packed=packed, theta=theta if marks else None)
            add = batches.add
        else:
            plan = [[i] for i in range(len(examples))]
            add = partial(_add_loss, model, layers, loss)
        running = RunningSums(layers)
        done = [] if checkpoint is None else running.restore(checkpoint, key)
        # With a sharded base every process makes as many forwards as the others.
        idle = partial(_unsummed, running, add, [examples[plan[-1][-1]]]) if is_sharded(model) else None
        _run(running, examples, names, plan, done, add, idle, until_stable, theta, marks, checkpoint, key, on_batch)
        scores = running.importance(method, together=True)
        taken = sum(processes.gather(running.examples))
    if not any(bool(tensor.any()) for tensor in scores.values()):
        raise InputError(ALL_ZERO)
    rank = next(iter(layers.values())).trainable_rank
    if method == "random":
        trainable = {name: trainable_mask(name, tensor, rank) for name, tensor in scores.items()}
        scores = shuffled([scores], trainable, seed)[0]
    facts: dict[str, Any] = {"examples": taken, "method": method, "rank": rank}
    if until_stable is not None:
        stable = bool(running.looks) and running.looks[-1][1] >= until_stable
        facts |= {"until_stable": until_stable, "theta": theta, "stable": stable, "looks": running.looks}
    return Scores(scores, facts)


def _add_loss(
    model: nn.Module, layers: Mapping[str, MaskedLayer], loss: Callable[[nn.Module, Any], Tensor], rows: list[Any]
) -> float:
    """Forward and backward of one row under the caller's loss; returns what it was multiplied by."""
    value = loss(model, rows[0])
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss: returned {got} for a row, expected a tensor of one element, the loss of that row")
    if not value.requires_grad:
        raise InputError("loss: what it returned has no gradient; it must come out of the model's layers, not detached")
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    scale = FP16_LOSS_SCALE if half else 1.0
    (value.sum() * scale).backward()
    add_gradients(layers)
    return scale


def _unsummed(running: RunningSums, add: Add, batch: list[Any]) -> None:
    """Forward and backward of a batch, which leave the sums as they are."""
    kept = running.sums
    _set_zero(running)
    add(batch)
    for name, layer in running.layers.items():
        layer.scoring = kept[name]


def _set_zero(running: RunningSums) -> None:
    for layer in running.layers.values():
        layer.scoring = lk.ScoreSums.zeros_like(*layer.factors(ADAPTER)[:2])


def _run(
    running: RunningSums,
    examples: list[Any],
    names: list[str],
    plan: list[list[int]],
    done: list[int],
    add: Add,
    idle: Callable[[], None] | None,
    until_stable: float | None,
    theta: float,
    marks: list[int],
    checkpoint: Path | None,
    key: str,
    on_batch: Callable[[RunningSums], None],
) -> None:
    """This process's share of the batches that are not `done`, until all processes' sums are stable where that is asked
    for; `idle`: what it does where it has one batch fewer than another, None: nothing."""
    before, at = set(done), 0  # examples up to the end of a stretch
    with Progress("score", len(examples), "example", sum(len(plan[place]) for place in done)) as progress:
        for places in stretches(plan, marks):
            at += sum(len(plan[place]) for place in places)
            left = [place for place in places if place not in before]
            unsaid = sum(len(plan[place]) for place in left)
            for place in processes.rounds(left):
                if place is None:
                    if idle is not None:
                        idle()
                    continue
                batch, rows = [examples[i] for i in plan[place]], [names[i] for i in plan[place]]
                running.loss_scale = add(batch)
                if not running.finite():
                    raise error_of_first_bad_row(running, batch, rows, add, sharded=idle is not None)
                running.examples += len(batch)
                running.done.append(place)
                on_batch(running)
                # The others are about as far.
                said = min(len(batch) * processes.count(), unsaid)
                unsaid -= said
                progress.update(said)
                if checkpoint is not None:
                    running.save_if_due(checkpoint, key)
            if unsaid:
                progress.update(unsaid)
            if until_stable is None:
                continue
            if running.looked < at and (jaccard := running.look(theta, at)) is not None:
                log.info("score: %d examples, Jaccard %.4f with half of them", at, jaccard)
            # Also of a look before this process began: what was summed by then may have been another's, and lost.
            if running.looked == at and running.looks and running.looks[-1][1] >= until_stable:
                break
    if checkpoint is not None:
        running.save(checkpoint, key)


def error_of_first_bad_row(
    running: RunningSums, batch: list[Any], names: list[str], add: Add, sharded: bool
) -> InputError:
    """The error that names the first row of a batch whose gradient is NaN or Inf, and the layer where it began.

    With a sharded base it names the batch's rows, since the others make no more forwards.
    """
    scaled = running.loss_scale != 1.0
    rows = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    fault = first_fault(running.layers)
    if sharded:
        return not_finite(rows, fault or "the sums leave fp32's range", scaled)
    for example, name in zip(batch, names):
        _set_zero(running)
        add([example])
        fault = first_fault(running.layers)
        if fault is not None:
            return not_finite(name, fault, scaled)
    return not_finite(rows, "the sums leave fp32's range", scaled)


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[dict[str, MaskedLayer]]:
    """Put the layers into scoring mode with fresh sums; on leaving, everything is as it was."""
    layers, training = masked_layers(model), {module: module.training for module in model.modules()}
    if any(map(is_part, lora_parameters(model).values())):
        raise InputError("lora: the adapter is sharded; score it before fully_shard, which is for training")
    given = {parameter: (parameter.requires_grad, parameter.grad) for parameter in lora_parameters(model).values()}
    model.eval()
    for module in training:
        # transformers checkpoints a block only in training mode; its children, dropout among them, are not put there.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    # A block may drop out without a child of its own (OPT's does).
    checkpoints = {module: module._gradient_checkpointing_func for module in training
                   if module.training and "_gradient_checkpointing_func" in vars(module)}  # fmt: skip
    try:
        for module, checkpoint in checkpoints.items():
            cast(Any, module)._gradient_checkpointing_func = partial(_evaluated, module, checkpoint)
        for parameter in given:
            parameter.requires_grad_(True)
            parameter.grad = None
        for layer in layers.values():
            layer.scoring = lk.ScoreSums.zeros_like(*layer.factors(ADAPTER)[:2])
        yield layers
    finally:
        for parameter, (required, gradient) in given.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for layer in layers.values():
            layer.scoring = layer.offsets = None
        for module, value in training.items():
            module.training = value
        for module, checkpoint in checkpoints.items():
            cast(Any, module)._gradient_checkpointing_func = checkpoint


def _evaluated(module: nn.Module, checkpoint: Any, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(block, ...)`, with `module`, in training mode so that it came here, in eval mode within the block."""

    def quiet(*inputs: Any, **options: Any) -> Any:
        module.training = False
        try:
            return block(*inputs, **options)
        finally:
            module.training = True

    return checkpoint(quiet, *args, **kwargs)
