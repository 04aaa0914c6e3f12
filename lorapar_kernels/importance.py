"""Importance of every LoRA element from per-example gradients, gathered inside the backward (paper section 3.3).

For an example i with tokens T_i, and dS = s · dY B, S = x Aᵀ:

    G_A = Σ_{t in T_i} dS_tᵀ x_t   [r, in],        G_B = s · Σ_{t in T_i} dY_tᵀ S_t   [out, r].

The backward adds Gφ and (Gφ)² of each example to two sums a factor; no per-example gradient outlives the example, and
no `.grad` is written. The mean over N examples is, for g = mean G and F = mean G² (per-example squares, the
empirical diagonal Fisher),

    I(φ) = | g φ − ½ F φ² | = | Σ Gφ / N − ½ Σ (Gφ)² / N |.

Every token of an example takes part, its prompt's too: the loss lies on the answer, but what the prompt's tokens hand
to attention moves it, so their dY is not zero.

A sum is kept as an unevaluated pair of fp32, the rounded total and its rest: 48 bits, so that 100,000 examples lose
nothing, at 16 bytes an element for both sums.

Trade-off: each example's G is made once, [r, in] and [out, r], instead of a batch of them at a time, which costs small
GEMMs and keeps the extra memory at one example's gradient for any batch.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose, no_obstacle
from .dropout import triton_obstacle
from .lora_layer import as_rows
from .lora_linear import (
    as_autocast,
    check_arguments,
    check_weight,
    expand_reference,
    input_gradient_reference,
    no_view,
    shrink_reference,
    transposed_product,
)


class _FourSums(NamedTuple):
    a_gphi: Tensor
    a_gphi_sq: Tensor
    b_gphi: Tensor
    b_gphi_sq: Tensor


class ScoreSums(_FourSums):
    """Σ Gφ and Σ (Gφ)² over examples for one layer: fp32 (fp64 for fp64 factors), of lora_a's and lora_b's shape.

    The four are totals that can be read at any time. `rests`, in their order, holds what rounding them has left over.
    """

    rests: _FourSums

    def __new__(cls, a_gphi: Tensor, a_gphi_sq: Tensor, b_gphi: Tensor, b_gphi_sq: Tensor) -> "ScoreSums":
        made = super().__new__(cls, a_gphi, a_gphi_sq, b_gphi, b_gphi_sq)
        made.rests = _FourSums(*(torch.zeros_like(total) for total in made))
        return made

    @classmethod
    def zeros_like(cls, lora_a: Tensor, lora_b: Tensor) -> "ScoreSums":
        """All-zero sums beside the given factors, fp32 or wider."""
        return cls(
            *(
                torch.zeros_like(
                    factor, dtype=torch.promote_types(factor.dtype, torch.float32), requires_grad=False
                ).contiguous()
                for factor in (lora_a, lora_a, lora_b, lora_b)
            )
        )


class Examples(NamedTuple):
    """Checked offsets: where each example's tokens begin and end, for the host and for a device."""

    starts: list[int]
    offsets: Tensor

    @classmethod
    def of(cls, offsets: Tensor, device: torch.device | str | None = None) -> "Examples":
        """Check `offsets` (integer [N + 1], from 0 and rising) once for all layers that share them; else ValueError."""
        starts = check_offsets(offsets)
        return cls(starts, offsets.to(device=device or offsets.device, dtype=torch.int64))


def importance(sum_gphi: Tensor, sum_gphi_sq: Tensor, n_examples: int) -> Tensor:
    """I(φ) = |Σ Gφ / N − ½ Σ (Gφ)² / N|, elementwise, in the sums' dtype. ValueError unless n_examples ≥ 1."""
    if n_examples < 1:
        raise ValueError(f"n_examples must be at least 1, got {n_examples}")
    return (sum_gphi - 0.5 * sum_gphi_sq).abs_().div_(n_examples)


def add_example_products_reference(
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    left: Tensor,
    right: Tensor,
    phi: Tensor,
    scale: float,
    starts: list[int],
) -> None:
    """Add Gφ and (Gφ)² for G = scale · leftᵀ right over each example's rows to (Σ, its rest, Σ of squares, its rest).

    left [tokens, m], right [tokens, n], phi [m, n]. The specification: sums in fp64, rounded to their pair at the end.
    fp16 is multiplied in fp32, since a product of many tokens leaves its range.
    """
    total, total_rest, square, square_rest = sums
    if left.dtype == torch.float16:
        left, right = left.float(), right.float()
    phi = phi.double() * scale
    gphi_sum, gphi_sq_sum = total_rest.double() + total, square_rest.double() + square
    for start, end in itertools.pairwise(starts):
        gphi = transposed_product(left[start:end], right[start:end]).double().mul_(phi)
        gphi_sum += gphi
        gphi_sq_sum.addcmul_(gphi, gphi)
    for exact, high, low in ((gphi_sum, total, total_rest), (gphi_sq_sum, square, square_rest)):
        high.copy_(exact)
        low.copy_(exact.sub_(high))


def _triton_obstacle(x: Tensor) -> str | None:
    """Why the Triton kernels cannot serve tensors like x; None when they can."""
    if x.dtype == torch.float64:
        return "the kernels add in fp32, and x is float64"
    return triton_obstacle(x.device)


def _backend(x: Tensor, op: str) -> str:
    triton, reference = (lambda: _triton_obstacle(x)), no_obstacle
    # On the CPU the kernels are only ever interpreted, for tests, so they have to be asked for.
    if x.device.type == "cpu":
        return choose(op, {"reference": reference, "triton": triton})
    return choose(op, {"triton": triton, "reference": reference})


class _LoraLinearScored(torch.autograd.Function):
    """`weight` None: the base product is opaque and comes as `y`, whose gradient is dY itself."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_a, lora_b, scaling, examples, sums, backend):  # type: ignore[override]
        (s,) = shrink_reference(as_rows(x), [lora_a], 0.0, [None])
        if y is None:
            out = F.linear(x, weight, bias)
            out.view(-1, out.shape[-1]).addmm_(s, lora_b.to(out.dtype).t(), alpha=scaling)
        else:
            out = expand_reference(as_rows(y), s, lora_b, scaling).view(y.shape)
        ctx.save_for_backward(x, s, weight, lora_a, lora_b)
        ctx.scaling, ctx.examples, ctx.sums, ctx.backend = scaling, examples, sums, backend
        return no_view(out)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("a scoring pass has no second derivative; call backward() without create_graph")
        x, s, weight, lora_a, lora_b = ctx.saved_tensors
        rows, columns = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        ds = transposed_product(rows.t(), lora_b.to(x.dtype)).mul_(ctx.scaling)
        sums, rests, (starts, offsets) = ctx.sums, ctx.sums.rests, ctx.examples
        of_a = sums.a_gphi, rests.a_gphi, sums.a_gphi_sq, rests.a_gphi_sq
        of_b = sums.b_gphi, rests.b_gphi, sums.b_gphi_sq, rests.b_gphi_sq
        if ctx.backend == "triton":
            from .triton_kernels import importance as kernels

            kernels.add_example_products(of_a, ds, columns, lora_a, False, 1.0, offsets)
            kernels.add_example_products(of_b, s, rows, lora_b, True, ctx.scaling, offsets)
        else:
            add_example_products_reference(of_a, ds, columns, lora_a, 1.0, starts)
            add_example_products_reference(of_b, rows, s, lora_b, ctx.scaling, starts)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = None if weight is None else rows @ weight
            dx = input_gradient_reference(dx, ds, lora_a, 0.0, None).view(x.shape)
        return dx, (dy if ctx.needs_input_grad[1] else None), *(None,) * 8


def check_offsets(offsets: Tensor) -> list[int]:
    """Offsets as a list; ValueError unless they rise strictly from 0 (an empty example has no gradient)."""
    if offsets.ndim != 1 or offsets.numel() < 2 or offsets.is_floating_point():
        raise ValueError(
            f"offsets must be a 1-D integer tensor of at least 2 entries, got {offsets.dtype} {list(offsets.shape)}"
        )
    values = [int(value) for value in offsets.tolist()]
    if values[0] != 0:
        raise ValueError(f"offsets must run from 0 to the tokens of x, got {values[0]} to {values[-1]}")
    for i, (start, end) in enumerate(itertools.pairwise(values)):
        if end <= start:
            raise ValueError(f"offsets must rise, got {start} then {end} at example {i}")
    return values


def _check(x: Tensor, lora_a: Tensor, lora_b: Tensor, offsets: Tensor | Examples, sums: ScoreSums) -> Examples:
    """The offsets as `Examples` on x's device, once they and the sums are known to fit."""
    examples = offsets if isinstance(offsets, Examples) else Examples.of(offsets, x.device)
    tokens = x.numel() // x.shape[-1]
    if examples.starts[-1] != tokens:
        raise ValueError(f"offsets must run from 0 to the {tokens} tokens of x, got 0 to {examples.starts[-1]}")
    if examples.offsets.device != x.device:
        examples = Examples(examples.starts, examples.offsets.to(x.device))
    for name, total, factor in zip(ScoreSums._fields, sums, (lora_a, lora_a, lora_b, lora_b)):
        if total.shape != factor.shape:
            raise ValueError(f"sums.{name} must be {list(factor.shape)}, got {list(total.shape)}")
        if total.device != x.device:
            raise ValueError(f"sums.{name} must be on x's device {x.device}, got {total.device}")
        if not total.is_contiguous():
            raise ValueError(f"sums.{name} must be contiguous, got strides {total.stride()}")
    return examples


def lora_linear_scored(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    offsets: Tensor | Examples,
    sums: ScoreSums,
    bias: Tensor | None = None,
) -> Tensor:
    """`lora_linear` for a scoring pass: the backward adds each example's Gφ and (Gφ)² to `sums` in place.

    Args:
        x: [..., in], its leading dimensions flattened are the tokens of all examples, one example after another.
        weight, lora_a, lora_b, scaling, bias: as in `lora_linear`; lora_a and lora_b get no gradient.
        offsets: integer [N + 1]: example i is tokens offsets[i]:offsets[i + 1]; a padded batch [N, T, in] has
            offsets 0, T, 2T, ... (padding has no gradient under a loss that leaves it out). `Examples.of(offsets)`
            checks and moves them once for many layers; on a GPU a plain tensor costs a wait a call.
        sums: where to add, one `ScoreSums` a layer. The loss must be the *sum* over examples of each one's own loss.

    Returns [..., out]. x or a factor must require a gradient, or no backward runs here; the factor gets none.
    A backward through the same forward twice adds twice. Squares are of fp32 products whatever x's dtype: an fp16
    square would overflow from |Gφ| = 256. Raises ValueError or TypeError naming the argument.
    """
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    assert x_ is not None
    assert weight_ is not None
    check_weight(x_, weight_, bias_)
    check_arguments(x_, lora_a, lora_b, weight_.shape[0])
    backend = _backend(x_, "lora_linear_scored")
    examples = _check(x_, lora_a, lora_b, offsets, sums)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinearScored.apply(  # type: ignore[return-value]
            x_, None, weight_, bias_, lora_a, lora_b, scaling, examples, sums, backend
        )


def lora_add_scored(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    offsets: Tensor | Examples,
    sums: ScoreSums,
) -> Tensor:
    """`lora_add` for a scoring pass: y + scaling · x Aᵀ Bᵀ, y [..., out] from an opaque base (4-bit, 8-bit).

    Arguments, dtypes and errors as in `lora_linear_scored`; y keeps its dtype, and its gradient is passed through.
    """
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must be [{', '.join(map(str, x.shape[:-1]))}, out] as x is, got {list(y.shape)}")
    x_ = x.to(y.dtype)
    check_arguments(x_, lora_a, lora_b, y.shape[-1])
    backend = _backend(x_, "lora_add_scored")
    examples = _check(x_, lora_a, lora_b, offsets, sums)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinearScored.apply(  # type: ignore[return-value]
            x_, y, None, None, lora_a, lora_b, scaling, examples, sums, backend
        )
