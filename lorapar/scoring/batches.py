"""Rows as token batches, and one batch's forward and backward under a loss an example.

The loss of an example is the mean over its own answer tokens, and the batch's loss their sum: a batch of 8 gives what 8
batches of 1 give, to rounding. Examples never attend to one another. Where the model's attention takes sequences of
several lengths (FlashAttention, by `position_ids`) a batch is one packed row without padding; elsewhere a row an
example, padded on the right, less than a twentieth of it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import lorapar_kernels as lk

from ..adapter.layers import MaskedLayer, lora_parameters
from ..data.rows import without_arrows_nulls
from ..data.tokens import IGNORED, encode
from ..errors import InputError

PADDING = 20  # a padded token costs what a real one does: fewer than one in so many of a batch's tokens
# fp16 is 0 below 6e-8, and an answer token's gradient is spread over the whole vocabulary; a power of two comes out of
# the sums exactly.
FP16_LOSS_SCALE = 2.0**12
# Answer tokens whose softmax is in fp32 at a time: so many stay in a CPU's cache, and beside a vocabulary of 150,000
# all of a batch's would be gigabytes.
SOFTMAX_ROWS = 32
SHORT = 512  # tokens up to which half-precision attention on a CPU is faster as plain products


class Example(NamedTuple):
    """One row: its name for messages, its tokens, and at each position the token to predict there (or IGNORED)."""

    name: str
    ids: list[int]
    targets: list[int]

    @property
    def answers(self) -> int:
        return sum(target != IGNORED for target in self.targets)


def read_examples(rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int | None) -> list[Example]:
    """Tokens and targets of every row; InputError for one without answer tokens or longer than `max_length`."""
    return [
        _read(row, str(row.get("id", number)), tokenizer, max_length)
        for number, row in enumerate(without_arrows_nulls(rows))
    ]


def _read(row: Mapping[str, Any], name: str, tokenizer: Any, max_length: int | None) -> Example:
    needed = ("labels",) if "input_ids" in row else () if "messages" in row else ("prompt", "completion")
    missing = [column for column in needed if column not in row]
    if missing:
        raise InputError(
            f"row {name}: no {missing[0]}; a row holds prompt and completion, messages, or input_ids and labels"
        )
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise InputError(f"row {name}: {len(ids)} input_ids but {len(labels)} labels")
        # A negative index would take the vocabulary's last words for the answer.
        strange = [label for label in labels if label < 0 and label != IGNORED]
        if strange:
            raise InputError(f"row {name}: label {strange[0]}, expected a token or {IGNORED}")
    else:
        if "messages" in row:
            row = {**row, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        ids, n_prompt = encode({**row, "id": name}, tokenizer)
        labels = [IGNORED] * n_prompt + ids[n_prompt:]
    # Position t predicts token t + 1, so the first token's label never counts.
    example = Example(name, ids, [*labels[1:], IGNORED])
    if example.answers == 0:
        raise InputError(f"row {name}: no answer tokens; a completion must not be empty")
    if max_length is not None and len(ids) > max_length:
        raise InputError(f"row {name}: {len(ids)} tokens, more than score.max_length {max_length}")
    return example


def plan_batches(lengths: list[int], batch_size: int, marks: list[int], padded: bool) -> list[list[int]]:
    """Indices in batches of like length, the longest first; none crosses a mark (a count of examples).

    Longest first, so that what does not fit in memory fails at once. `padded`: a batch ends early where padding would
    be a twentieth of it.
    """
    batches: list[list[int]] = []
    for start, end in zip([0, *marks], [*marks, len(lengths)]):
        room = 0
        first = len(batches)
        for i in sorted(range(start, end), key=lambda i: -lengths[i]):
            # `room`: `PADDING` times the tokens that may still be padding; each row adds the width, less what it lacks.
            if len(batches) > first and len(batches[-1]) < batch_size:
                width = lengths[batches[-1][0]]
                left = room + width - PADDING * (width - lengths[i])
                if left > 0 or not padded:
                    batches[-1].append(i)
                    room = left
                    continue
            batches.append([i])
            room = lengths[i]
    return batches


def packs_examples(model: nn.Module) -> bool:
    """Whether batches are packed: the attention is FlashAttention's, and packed examples are shown to stay apart."""
    implementation = str(getattr(cast(Any, model).config, "_attn_implementation", ""))
    return implementation.startswith("flash_attention") and keeps_apart(model)


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether an example packed behind another gives the logits that it gives in a row of its own."""
    first, second = Example("", [9, 8, 7], [IGNORED] * 3), Example("", [3, 4, 5, 6], [IGNORED] * 4)
    device = next(iter(lora_parameters(model).values())).device
    with cast(Any, model).disable_adapter():
        alone, behind = (
            cast(Any, model)(**_inputs(batch, packed=True, device=device), use_cache=False).logits[0, -4:].float()
            for batch in ([second], [first, second])
        )
    return bool((behind - alone).abs().max() <= 2e-2 * alone.abs().max())


def _inputs(batch: list[Example], packed: bool, device: torch.device) -> dict[str, Tensor]:
    if packed:
        ids = torch.tensor([[token for example in batch for token in example.ids]])
        places = torch.tensor([[place for example in batch for place in range(len(example.ids))]])
        return {"input_ids": ids.to(device), "position_ids": places.to(device)}
    ids = torch.zeros(len(batch), max(len(example.ids) for example in batch), dtype=torch.long)
    for i, example in enumerate(batch):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
    # No attention mask: padding is on the right, where causal attention keeps it from touching a real token.
    return {"input_ids": ids.to(device)}


def score_batch(model: nn.Module, layers: Mapping[str, MaskedLayer], batch: list[Example], packed: bool) -> float:
    """Forward and backward of one batch, which add to the layers' sums; returns what the loss was multiplied by.

    The gradient of each example's mean cross-entropy over its own answer tokens, (softmax − one-hot) / count, is
    written down: autograd would pass over a [tokens, vocabulary] tensor twice as often and keep two more of them.
    """
    device = next(iter(lora_parameters(model).values())).device
    inputs = _inputs(batch, packed, device)
    width = inputs["input_ids"].shape[1]
    lengths = [len(example.ids) if packed else width for example in batch]
    examples = lk.Examples.of(torch.tensor([0, *lengths]).cumsum(0), device)
    for layer in layers.values():
        layer.offsets = examples
    targets = torch.full((sum(lengths),), IGNORED)
    for start, example in zip(examples.starts, batch):
        targets[start : start + len(example.targets)] = torch.tensor(example.targets)
    answers = (targets != IGNORED).view(inputs["input_ids"].shape)
    with head_on(model, answers):
        logits = cast(Any, model)(**inputs, use_cache=False).logits
    scale = FP16_LOSS_SCALE if logits.dtype == torch.float16 else 1.0
    each = [scale / example.answers for example in batch for _ in range(example.answers)]
    weights = torch.tensor(each, dtype=torch.promote_types(logits.dtype, torch.float32))
    targets, weights = targets[targets != IGNORED].to(logits.device), weights.to(logits.device)
    logits.backward(cross_entropy_gradient(logits.detach(), targets, weights))
    return scale


def cross_entropy_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """weights · (softmax(logits) − one-hot(targets)) in the logits' dtype, computed in the weights'.

    logits [n, vocabulary], targets and weights [n]."""
    gradient = torch.empty_like(logits)
    for start in range(0, len(logits), SOFTMAX_ROWS):
        span = slice(start, start + SOFTMAX_ROWS)
        some = torch.softmax(logits[span], -1, dtype=weights.dtype)
        some[torch.arange(len(some), device=some.device), targets[span]] -= 1.0
        gradient[span] = some.mul_(weights[span, None])
    return gradient


@contextlib.contextmanager
def short_attention(model: nn.Module, longest: int) -> Iterator[None]:
    """Attention as plain products while no row is longer than `SHORT`, on a CPU in half precision; else left alone.

    torch's blockwise kernel takes twice as long there (bench/LOG.md). Longer rows need it: plain products keep tokens²
    values a head for the backward. A model told to use another kernel keeps it.
    """
    base, parameter = cast(Any, model).get_base_model(), next(model.parameters())
    half = parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)
    chosen = base.config._attn_implementation
    if not half or longest > SHORT or chosen != "sdpa":
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(chosen)


@contextlib.contextmanager
def head_on(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at `positions` (bool [rows, tokens]): logits are [n, vocabulary].

    Its product is the widest of all: with SmolLM2-135M a fifth of the work at every position.
    """
    head = cast(Any, model).get_base_model().get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][positions.to(hidden[0].device)],))
    try:
        yield
    finally:
        hook.remove()
