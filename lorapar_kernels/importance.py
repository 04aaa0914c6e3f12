"""Importance of every LoRA element from per-example gradients, gathered inside the backward (paper section 3.3).

For an example i with tokens T_i, and dS = s · dY B, S = x Aᵀ:

    G_A = Σ_{t in T_i} dS_tᵀ x_t   [r, in],        G_B = s · Σ_{t in T_i} dY_tᵀ S_t   [out, r].

The backward adds G·φ and (G·φ)² of each example to two accumulators a factor; no per-example gradient outlives the
example, and no `.grad` is written. The mean over N examples gives, for g = mean G and F = mean G² (per-example squares,
the empirical diagonal Fisher),

    I(φ) = | g φ − ½ F φ² | = | Σ Gφ / N − ½ Σ (Gφ)² / N |.

Trade-off: each example's G is made once, [r, in] and [out, r], instead of a batch of them at a time, which costs small
GEMMs and keeps the extra memory at one example's gradient whatever the batch.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import always, choose
from .lora_linear import add_input_gradient, add_lora, as_autocast, check_arguments, check_weight, thin


class ScoreSums(NamedTuple):
    """Σ Gφ and Σ (Gφ)² over examples for one layer: fp32 (fp64 for fp64 factors), of lora_a's and lora_b's shape."""

    a_gphi: Tensor
    a_gphi_sq: Tensor
    b_gphi: Tensor
    b_gphi_sq: Tensor

    @classmethod
    def zeros_like(cls, lora_a: Tensor, lora_b: Tensor) -> "ScoreSums":
        """All-zero sums beside the given factors, fp32 or wider."""
        pairs = [
            torch.zeros_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32), requires_grad=False)
            for factor in (lora_a, lora_a, lora_b, lora_b)
        ]
        return cls(*pairs)


def importance(sum_gphi: Tensor, sum_gphi_sq: Tensor, n_examples: int) -> Tensor:
    """I(φ) = |Σ Gφ / N − ½ Σ (Gφ)² / N|, elementwise, in the sums' dtype. ValueError unless n_examples ≥ 1."""
    if n_examples < 1:
        raise ValueError(f"n_examples must be at least 1, got {n_examples}")
    return (sum_gphi - 0.5 * sum_gphi_sq).abs_().div_(n_examples)


def add_example_products(
    sums: tuple[Tensor, Tensor], left: Tensor, right: Tensor, phi: Tensor, scaling: float, offsets: list[int]
) -> None:
    """Add Gφ and (Gφ)² for G = scaling · leftᵀ right over each example's rows offsets[i]:offsets[i + 1]."""
    gphi_sum, gphi_sq_sum = sums
    phi = phi.to(gphi_sum.dtype) * scaling
    for start, end in itertools.pairwise(offsets):
        gphi = thin(left[start:end], right[start:end]).to(gphi_sum.dtype).mul_(phi)
        gphi_sum += gphi
        gphi_sq_sum.addcmul_(gphi, gphi)


class _LoraLinearScored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, offsets, sums):  # type: ignore[override]
        out = F.linear(x, weight, bias)
        s = add_lora(out, x, lora_a.to(x.dtype), lora_b.to(x.dtype), scaling)
        ctx.save_for_backward(x, s, weight, lora_a, lora_b)
        ctx.scaling, ctx.offsets, ctx.sums = scaling, offsets, sums
        return out

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, s, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        ds = thin(rows.t(), b).mul_(ctx.scaling)
        sums, columns = ctx.sums, x.reshape(-1, x.shape[-1])
        add_example_products((sums.a_gphi, sums.a_gphi_sq), ds, columns, lora_a, 1.0, ctx.offsets)
        add_example_products((sums.b_gphi, sums.b_gphi_sq), rows, s, lora_b, ctx.scaling, ctx.offsets)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows @ weight
            add_input_gradient(dx, ds, a, x.shape, 0.0, None)
            dx = dx.view(x.shape)
        return dx, None, None, None, None, None, None, None


def check_offsets(offsets: Tensor, tokens: int) -> list[int]:
    """Offsets as a list; ValueError unless they rise strictly from 0 to `tokens` (an empty example has no gradient)."""
    if offsets.ndim != 1 or offsets.numel() < 2 or offsets.is_floating_point():
        raise ValueError(
            f"offsets must be a 1-D integer tensor of at least 2 entries, got {offsets.dtype} {list(offsets.shape)}"
        )
    values = [int(value) for value in offsets.tolist()]
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(f"offsets must run from 0 to the {tokens} tokens of x, got {values[0]} to {values[-1]}")
    for i, (start, end) in enumerate(itertools.pairwise(values)):
        if end <= start:
            raise ValueError(f"offsets must rise, got {start} then {end} at example {i}")
    return values


def lora_linear_scored(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    offsets: Tensor,
    sums: ScoreSums,
    bias: Tensor | None = None,
) -> Tensor:
    """`lora_linear` for a scoring pass: the backward adds each example's Gφ and (Gφ)² to `sums` in place.

    Args:
        x: [..., in], its leading dimensions flattened are the tokens of all examples, one example after another.
        weight, lora_a, lora_b, scaling, bias: as in `lora_linear`; lora_a and lora_b get no gradient.
        offsets: integer [N + 1]: example i is tokens offsets[i]:offsets[i + 1]; a padded batch [N, T, in] has
            offsets 0, T, 2T, ... (padding has no gradient under a loss that leaves it out).
        sums: where to add, one `ScoreSums` a layer. The loss must be the *sum* over examples of each one's own loss.

    Returns [..., out]. x must require a gradient, or follow something that does, for the backward to come by.
    A backward through the same forward twice adds twice. Raises ValueError or TypeError naming the argument.
    """
    choose("lora_linear_scored", {"reference": always})
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    assert x_ is not None
    assert weight_ is not None
    check_weight(x_, weight_, bias_)
    check_arguments(x_, lora_a, lora_b, weight_.shape[0])
    starts = check_offsets(offsets, x_.numel() // x_.shape[-1])
    for name, total, factor in zip(ScoreSums._fields, sums, (lora_a, lora_a, lora_b, lora_b)):
        if total.shape != factor.shape:
            raise ValueError(f"sums.{name} must be {list(factor.shape)}, got {list(total.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinearScored.apply(x_, weight_, bias_, lora_a, lora_b, scaling, starts, sums)  # type: ignore[return-value]
