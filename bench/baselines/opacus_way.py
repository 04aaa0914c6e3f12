"""Opacus's way: every per-example gradient of a batch, [N, ...] a factor, for the whole model at once.

`GradSampleModule` keeps each LoRA layer's input and makes `.grad_sample` from it and the output's gradient; the sums
are then taken over its first dimension.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .released_script import trainable


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over examples of each one's mean cross-entropy over its own answer tokens."""
    targets = labels[:, 1:]
    # Not [N, vocabulary, T]: along a dimension that is not the last, torch's fp32 softmax on a CPU sums one by one,
    # which over 49,152 entries costs 6e-4 of the importance.
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    losses = F.cross_entropy(flat, targets.reshape(-1), ignore_index=-100, reduction="none").view_as(targets)
    return (losses.sum(1) / (targets != -100).sum(1)).sum()


def score(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """|g φ − ½ F φ²| by parameter name; the model is a PeftModel without dropout, batches are padded ids and labels.

    Opacus sees layers in training mode only.
    """
    from opacus import GradSampleModule  # pyright: ignore[reportMissingImports]

    factors = trainable(model)
    gradient = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    square = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    try:
        for ids, labels in batches:
            summed_loss(wrapped(input_ids=ids, use_cache=False).logits, labels).backward()
            for name, factor in factors.items():
                gradient[name] += factor.grad_sample.sum(0)  # type: ignore[attr-defined]
                square[name] += factor.grad_sample.square().sum(0)  # type: ignore[attr-defined]
            wrapped.zero_grad()
    finally:
        wrapped.to_standard_module().eval()
    return importance_of(factors, gradient, square, sum(len(ids) for ids, _ in batches))


@torch.no_grad()
def importance_of(
    factors: dict[str, nn.Parameter], gradient: dict[str, Tensor], square: dict[str, Tensor], count: int
) -> dict[str, Tensor]:
    return {
        name: (gradient[name] / count * factor - 0.5 * square[name] / count * factor**2).abs()
        for name, factor in factors.items()
    }
