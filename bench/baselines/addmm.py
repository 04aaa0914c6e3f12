"""Unsloth's way of a LoRA layer, written afresh: products onto the base's output in place, no dropout, no masks.

Forward 5 passes over x and 5 over y in all, with its backward: S = x Aᵀ, y = x Wᵀ + s · S Bᵀ by `addmm_`, then
dX = dY W + s · (dY B) A likewise, dA = s · (dY B)ᵀ x, dB = s · dYᵀ S with S made again. Factors of x's dtype. A weight
that is held in 4 bits is a function, which makes it in both directions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _dense(weight: Any) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight()


class AddmmLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):  # type: ignore[override]
        y = x @ _dense(weight).t()
        y.addmm_(x @ lora_a.t(), lora_b.t(), alpha=scaling)
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.weight, ctx.scaling = weight, scaling
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, lora_a, lora_b = ctx.saved_tensors
        ds = dy @ lora_b
        dx = dy @ _dense(ctx.weight)
        dx.addmm_(ds, lora_a, alpha=ctx.scaling)
        da = (ds.t() @ x).mul_(ctx.scaling)
        db = (dy.t() @ (x @ lora_a.t())).mul_(ctx.scaling)
        return dx, None, da, db, None


def addmm_lora(
    x: Tensor, weight: Tensor | Callable[[], Tensor], lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x [T, in] -> [T, out]; everything of one dtype."""
    return AddmmLora.apply(x, weight, lora_a, lora_b, scaling)  # type: ignore[return-value]
