"""Masked LoRA linear layer: y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ, with gradients for x, A and B only.

Shapes: x [..., in], weight W [out, in], lora_a A [r, in], lora_b B [out, r], masks bool of A's and B's shape. W and x
share a dtype; A and B may be wider (PEFT keeps them in fp32 beside a bf16 base). With S = drop(x) Aᵀ and dS = s · dY B,

    dX = dY W + undrop(dS A),    dA = mask_a ⊙ dSᵀ drop(x),    dB = mask_b ⊙ s · dYᵀ S.

Masks act on gradients, never on the forward: an inactive element keeps its value and takes part with it (LoRA-PAR,
paper section 3.4). Saved for backward: x, which q, k and v share, and S of rank r; the dropout mask is drawn again from
its seed, so that nothing else of x's or y's size is kept.

Trade-off: products run in x's dtype with the GEMM's own fp32 accumulation, so A and B are rounded to bf16 beside a bf16
x, and their gradients are rounded once on the way out. Casting x up instead, as PEFT does, costs a copy of x a layer.

The plain PyTorch below is the specification, and the path on every device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import always, choose
from .dropout import dropout_mask


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x with the seeded dropout applied and the kept elements scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    assert seed is not None  # checked by `check_arguments`
    return torch.where(dropout_mask(seed, x.shape, p), x / (1.0 - p), 0.0)


def thin(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right [m, n] of left [k, m] and right [k, n], multiplied with the smaller of m and n as the rows.

    That is 1.6 to 4.6 times as fast in fp32 on a CPU (r = 8, 265 and 408 tokens, torch 2.13); bf16 is the same.
    """
    return left.t() @ right if left.shape[1] <= right.shape[1] else (right.t() @ left).t()


def add_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Add s · x aᵀ bᵀ to y in place, all of one dtype; returns S = x aᵀ, [tokens, r]."""
    s = thin(x.reshape(-1, x.shape[-1]).t(), a.t())
    y.view(-1, y.shape[-1]).addmm_(s, b.t(), alpha=scaling)
    return s


def add_input_gradient(dx: Tensor, ds: Tensor, a: Tensor, shape: torch.Size, p: float, seed: Tensor | None) -> None:
    """Add undrop(dS A) to dx [tokens, in] in place."""
    if p == 0.0:
        dx.addmm_(ds, a)
    else:
        dx.add_(drop((ds @ a).view(shape), p, seed).view_as(dx))


def masked(gradient: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient in its parameter's dtype, exactly zero (also where it was NaN) outside the mask."""
    gradient = gradient.to(dtype)
    return gradient if mask is None else gradient.masked_fill_(~mask, 0.0)


class _LoraLinear(torch.autograd.Function):
    """`weight` None: the base product is opaque and comes as `y`, whose gradient is dY itself."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_a, lora_b, scaling, mask_a, mask_b, p, seed):  # type: ignore[override]
        out = F.linear(x, weight, bias) if y is None else y.clone()
        s = add_lora(out, drop(x, p, seed), lora_a.to(x.dtype), lora_b.to(x.dtype), scaling)
        ctx.save_for_backward(x, s, weight, lora_a, lora_b, mask_a, mask_b, seed)
        ctx.scaling, ctx.p = scaling, p
        return out

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, s, weight, lora_a, lora_b, mask_a, mask_b, seed = ctx.saved_tensors
        needs_x, needs_y, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        ds = thin(rows.t(), b).mul_(ctx.scaling)
        dx = da = db = None
        if needs_x:
            dx = rows @ weight if weight is not None else rows.new_zeros(rows.shape[0], x.shape[-1])
            add_input_gradient(dx, ds, a, x.shape, ctx.p, seed)
            dx = dx.view(x.shape)
        if needs_a:
            da = masked(ds.t() @ drop(x, ctx.p, seed).reshape(-1, x.shape[-1]), mask_a, lora_a.dtype)
        if needs_b:
            db = masked(thin(rows, s).mul_(ctx.scaling), mask_b, lora_b.dtype)
        return dx, (dy if needs_y else None), None, None, da, db, None, None, None, None, None


def check_arguments(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    out_features: int,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError that names the first argument that does not fit, what was expected, what came."""
    check_input(x)
    if lora_a.ndim != 2 or lora_a.shape[1] != x.shape[-1] or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a must be [r >= 1, {x.shape[-1]}], got {list(lora_a.shape)}")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(f"lora_b must be [{out_features}, {lora_a.shape[0]}], got {list(lora_b.shape)}")
    for name, tensor, mask in (("mask_a", lora_a, mask_a), ("mask_b", lora_b, mask_b)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {mask.dtype}")
        if mask.shape != tensor.shape:
            expected, got = "×".join(map(str, tensor.shape)), "×".join(map(str, mask.shape))
            raise ValueError(f"{name} must have {expected} elements, got {got}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if torch.finfo(tensor.dtype).bits < torch.finfo(x.dtype).bits:
            raise TypeError(f"{name} must be at least as wide as x ({x.dtype}), got {tensor.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError("seed must be a one-element int64 tensor where dropout_p > 0")


def check_input(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError("x must have at least one dimension [..., in], got a scalar")


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_input(x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [out, {x.shape[-1]}], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: the base is frozen, and gets none")
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.requires_grad):
        raise ValueError(f"bias must be frozen and [{weight.shape[0]}], got {list(bias.shape)}")


def as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, x and the base's tensors in autocast's dtype; elsewhere as they are."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, differentiable in x, lora_a and lora_b.

    Args:
        x: [..., in], float64, fp32, bf16 or fp16; under autocast it is cast to autocast's dtype first.
        weight: [out, in] of x's dtype, frozen. bias: [out] or None, frozen.
        lora_a, lora_b: [r, in] and [out, r], of x's dtype or wider; each gradient has its tensor's dtype.
        scaling: lora_alpha / r.
        mask_a, mask_b: bool of lora_a's and lora_b's shape, True where an element is active; None: all are.
            Gradients are exactly zero elsewhere; the forward and x's gradient use every element.
        dropout_p: in [0, 1), on the LoRA branch's input. seed: one-element int64 tensor, see `dropout_mask`.

    Returns [..., out] in x's dtype. Raises ValueError or TypeError that names the argument that does not fit.
    """
    choose("lora_linear", {"reference": always})
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    assert x_ is not None
    assert weight_ is not None
    check_weight(x_, weight_, bias_)
    check_arguments(x_, lora_a, lora_b, weight_.shape[0], mask_a, mask_b, dropout_p, seed)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinear.apply(x_, None, weight_, bias_, lora_a, lora_b, scaling, mask_a, mask_b, dropout_p, seed)  # type: ignore[return-value]


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + scaling · drop(x) Aᵀ Bᵀ for a base layer that is opaque (4-bit, 8-bit): y [..., out] is what it gave for x.

    Arguments, dtypes and errors as in `lora_linear`; y keeps its dtype, and its gradient is passed through.
    """
    choose("lora_add", {"reference": always})
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must be [{', '.join(map(str, x.shape[:-1]))}, out] as x is, got {list(y.shape)}")
    x_ = x.to(y.dtype)
    check_arguments(x_, lora_a, lora_b, y.shape[-1], mask_a, mask_b, dropout_p, seed)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinear.apply(x_, y, None, None, lora_a, lora_b, scaling, mask_a, mask_b, dropout_p, seed)  # type: ignore[return-value]


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    mask_as: Sequence[Tensor | None] | None = None,
    mask_bs: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`lora_linear` for several layers of one x (q, k, v or gate, up), each with its own masks and dropout seed.

    Every sequence has one entry a layer; ValueError where the lengths differ.
    """
    count = len(weights)
    columns = {"lora_as": lora_as, "lora_bs": lora_bs, "scalings": scalings, "biases": biases,
               "mask_as": mask_as, "mask_bs": mask_bs, "seeds": seeds}  # fmt: skip
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise ValueError(f"{name} must have {count} entries, as weights has, got {len(column)}")
    none: list[None] = [None] * count
    return [
        lora_linear(x, weight, a, b, scaling, bias, mask_a, mask_b, dropout_p, seed)
        for weight, a, b, scaling, bias, mask_a, mask_b, seed in zip(
            weights, lora_as, lora_bs, scalings, biases or none, mask_as or none, mask_bs or none, seeds or none
        )
    ]
