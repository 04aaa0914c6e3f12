"""Masked LoRA linear layer: y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ, with gradients for x, A and B only.

Shapes: x [..., in], weight W [out, in], lora_a A [r, in], lora_b B [out, r], masks bool of A's and B's shape. W and x
share a dtype; A and B may be wider (PEFT keeps them in fp32 beside a bf16 base). With keep the dropout mask,
drop(x) = keep ⊙ x / (1 − p), S = drop(x) Aᵀ and dS = s / (1 − p) · dY B,

    dX = dY W + keep ⊙ (dS A),    dA = mask_a ⊙ dSᵀ (keep ⊙ x),    dB = mask_b ⊙ s · dYᵀ S.

Masks act on gradients, never on the forward: an inactive element keeps its value and takes part with it (LoRA-PAR,
paper section 3.4). Saved for backward: x, which q, k and v share, and S of rank r; the dropout mask is drawn again from
its seed, so that nothing else of x's or y's size is kept. The scale 1 / (1 − p) is applied at rank r, so that dropping
an element of x rounds nothing.

Three passes are all that a LoRA layer adds to the frozen layer's own products: `shrink` (reads x), `output_gradients`
(reads dY), `input_gradients` (reads x, adds to dX). Their specification is below, in plain PyTorch for any device;
triton_kernels/lora_passes.py has them as kernels. lora_product.py makes the frozen products and adds S Bᵀ to them. The
rest is here: autograd, and the op, which serves one layer and several layers of one x.

A gradient of a gradient (`create_graph`), forward-mode differentiation, and a call inside a transform of torch.func are
computed by `differentiable`, the layer in operations that torch itself differentiates: S and dS above are constants to
autograd.

Trade-offs: products run in x's dtype with the GEMM's own fp32 accumulation, so A and B are rounded to bf16 beside a
bf16 x, and their gradients are rounded once on the way out. Casting x up instead, as PEFT does, costs a copy of x a
layer. The plain passes make a product of r rows for each layer of one x, where the kernels read x once for all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import lora_product, native
from .backend import choose, no_obstacle
from .dropout import dropout_mask, triton_obstacle, zero_dropped
from .lora_product import expand

MAX_RANK = 256  # of the Triton kernels


def as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [T, n] with unit column stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def apply_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ⊙ x: x with the seeded dropout applied and nothing scaled."""
    if p == 0.0:
        return x
    assert seed is not None  # checked by `check_arguments`
    return zero_dropped(x, seed, p)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right [m, n] of left [k, m] and right [k, n], multiplied with the smaller of m and n as the rows.

    That is 1.6 to 4.6 times as fast in fp32 on a CPU (r = 8, 265 and 408 tokens, torch 2.13); bf16 is the same.
    """
    return left.t() @ right if left.shape[1] <= right.shape[1] else (right.t() @ left).t()


def masked(gradient: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient in its parameter's dtype, contiguous, exactly zero (also where it was NaN) outside the mask."""
    gradient = gradient.to(dtype).contiguous()
    return gradient if mask is None else gradient.masked_fill_(~mask, 0.0)


def shrink_reference(x: Tensor, factors: list[Tensor], p: float, seeds: Sequence[Tensor | None]) -> list[Tensor]:
    """S = drop(x) Aᵀ [T, r] of x [T, in] for each A of `factors`, in x's dtype."""
    # r rows as in `transposed_product`, but whatever T is, so that S has the same strides for any T.
    columns = [(a.to(x.dtype) @ apply_dropout(x, p, seed).t()).t() for a, seed in zip(factors, seeds)]
    return columns if p == 0.0 else [s.mul_(1.0 / (1.0 - p)) for s in columns]


def _shrink_fake(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as `shrink_reference` returns them, without values."""
    return [x.new_empty((a.shape[0], x.shape[0])).t() for a in factors]


def output_gradients_reference(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, p: float, mask: Tensor | None, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = scaling / (1 − p) · dY B [T, r] in dY's dtype, and dB = mask ⊙ scaling · dYᵀ S in B's."""
    ds = transposed_product(dy.t(), b.to(dy.dtype)).mul_(scaling / (1.0 - p))
    return ds, masked(transposed_product(dy, s).mul_(scaling), mask, b.dtype) if needs_b else None


def input_gradients_reference(
    x: Tensor,
    dx: Tensor | None,
    factors: list[Tensor],
    dss: list[Tensor],
    p: float,
    seeds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    needs_a: Sequence[bool],
) -> list[Tensor | None]:
    """Add Σ keep ⊙ (dS A) to dx [T, in] in place; dA = mask ⊙ dSᵀ (keep ⊙ x) in A's dtype for each A that needs it."""
    if dx is not None:
        for a, ds, seed in zip(factors, dss, seeds):
            if p == 0.0:
                dx.addmm_(ds, a.to(x.dtype))
            else:
                dx.add_(apply_dropout(ds @ a.to(x.dtype), p, seed))
    return [
        masked(ds.t() @ apply_dropout(x, p, seed), mask, a.dtype) if need else None
        for a, ds, seed, mask, need in zip(factors, dss, seeds, masks, needs_a)
    ]


def no_view(y: Tensor) -> Tensor:
    """`y` as no view: autograd refuses to have a view changed in place that a Function returned (DeBERTa does so)."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def differentiable(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    mask_as: Sequence[Tensor | None],
    mask_bs: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
) -> list[Tensor]:
    """Each layer's output in torch's own operations, differentiable to any order; arguments as of `_forward`."""
    bases = ys or [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    outs = []
    for base, a, b, mask_a, mask_b, seed, scaling in zip(bases, lora_as, lora_bs, mask_as, mask_bs, seeds, scalings):
        kept = x if seed is None else torch.where(dropout_mask(seed, list(x.shape), p), x, 0.0)
        a, b = (
            (factor if mask is None else torch.where(mask, factor, factor.detach())).to(x.dtype)
            for factor, mask in ((a, mask_a), (b, mask_b))
        )
        outs.append(base + F.linear(F.linear(kept, a) * (1.0 / (1.0 - p)), b) * scaling)
    return outs


def differentiable_gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *masks_seeds_scalings_p: Any,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dX, each dA and each dB with their own graph, None where not needed: `_gradients` under `create_graph`."""
    # Each place has a tensor of its own, also where one tensor was given twice.
    places = [given.view_as(given) for given in (x, *lora_as, *lora_bs)]
    n = len(lora_as)
    # What an opaque base returned adds no gradient here; any constant will do.
    ys = [] if weights else [dy.detach() for dy in dys]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        outs = differentiable(
            places[0], weights, [None] * n, ys, places[1 : n + 1], places[n + 1 :], *masks_seeds_scalings_p
        )
        wanted = [place for place, need in zip(places, needs) if need]
        found = iter(torch.autograd.grad(outs, wanted, dys, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]


class Passes(NamedTuple):
    """The three passes of one backend.

    Attributes:
        shrink_fake: tensors as `shrink` returns them, without values.
        fused: whether lora_product.py's fused product can run with them.
    """

    shrink: Callable[..., list[Tensor]]
    shrink_fake: Callable[..., list[Tensor]]
    output_gradients: Callable[..., tuple[Tensor, Tensor | None]]
    input_gradients: Callable[..., list[Tensor | None]]
    fused: bool


def reference_passes() -> Passes:
    """The specification above, which serves any device."""
    return Passes(shrink_reference, _shrink_fake, output_gradients_reference, input_gradients_reference, fused=False)


def triton_passes() -> Passes:
    """The Triton kernels; imports Triton."""
    from .triton_kernels import lora_passes as kernels

    return Passes(kernels.shrink, kernels.shrink_fake, kernels.output_gradients, kernels.input_gradients, fused=True)


def triton_obstacle_of(x: Tensor, rank: int) -> str | None:
    """Why the Triton kernels cannot serve x and this rank; None when they can."""
    if x.dtype == torch.float64:
        return "the kernels add in fp32, and x is float64"
    if rank > MAX_RANK:
        return f"the kernels hold at most rank {MAX_RANK}, got {rank}"
    return triton_obstacle(x.device)


def passes_for(op: str, x: Tensor, factors: Sequence[Tensor]) -> Passes:
    """The passes that serve this call of `op`."""
    rank = max(a.shape[0] for a in factors)
    obstacles: dict[str, Callable[[], str | None]] = {
        "triton": partial(triton_obstacle_of, x, rank),
        # torch's own products around csrc's dropout (dropout.py), or around the reference's.
        "native": partial(native.obstacle, x.device),
        "reference": no_obstacle,
    }
    order = ("native", "reference", "triton") if x.device.type == "cpu" else ("triton", "reference")
    name = choose(op, {backend: obstacles[backend] for backend in order})
    # Without tokens there is nothing to launch.
    return triton_passes() if name == "triton" and x.numel() > 0 else reference_passes()


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    mask_as: Sequence[Tensor | None],
    mask_bs: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
) -> list[Tensor]:
    """One layer, or several of one x. ys: what opaque bases returned for x, in place of weights.

    Returns each layer's output, and after them each S, which the backward needs.
    """
    passes = passes_for("lora_linear", x, lora_as)
    columns = passes.shrink(as_rows(x), list(lora_as), p, list(seeds))
    if weights:
        return lora_product.outputs(x, weights, biases, columns, lora_bs, scalings, passes.fused) + columns
    outs = [y.clone(memory_format=torch.contiguous_format) for y in ys]
    for out, s, b, scaling in zip(outs, columns, lora_bs, scalings):
        expand(out.view(-1, out.shape[-1]), s, b, scaling)
    return outs + columns


def _gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    columns: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    mask_as: Sequence[Tensor | None],
    mask_bs: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """needs: of x, of each A, of each B. Returns dX, each dA, each dB; an empty tensor for what is not needed."""
    n, passes = len(dys), passes_for("lora_linear", x, lora_as)
    needs_x, needs_a, needs_b = needs[0], list(needs[1 : n + 1]), needs[n + 1 :]
    flat, rows = as_rows(x), [as_rows(dy) for dy in dys]
    dss, dbs = [], []
    for dy, b, s, scaling, mask, need in zip(rows, lora_bs, columns, scalings, mask_bs, needs_b):
        ds, db = passes.output_gradients(dy, b, s, scaling, p, mask, need)
        dss.append(ds)
        dbs.append(db)
    of_x = list(lora_as), dss, p, list(seeds), list(mask_as), needs_a
    if needs_x and weights:
        dx, das = lora_product.input_gradients(flat, rows, weights, *of_x, passes.input_gradients, passes.fused)
    else:
        dx = torch.zeros_like(flat) if needs_x else None
        das = passes.input_gradients(flat, dx, *of_x)
    gradients = [None if dx is None else dx.view(x.shape), *das, *dbs]
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _save(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """Keep x, S, the weights and what is of the factors' size; nothing else of x's or y's size."""
    x, weights, _, ys, lora_as, lora_bs, mask_as, mask_bs, seeds, scalings, p = inputs
    n = len(lora_as)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *outputs[n:], *lora_as, *lora_bs, *mask_as, *mask_bs, *seeds, *weights)
    ctx.scalings, ctx.p, ctx.opaque = list(scalings), p, bool(ys)
    ctx.widths = [out.shape[-1] for out in outputs[:n]]


def _saved_gradients(
    gradients: Callable[..., list[Tensor]], ctx: Any, grads: Sequence[Tensor | None], needs: list[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each dY, and `gradients` of what `_save` kept, None where not needed."""
    n = len(ctx.widths)
    x, *rest = ctx.saved_tensors
    columns, lora_as, lora_bs, mask_as, mask_bs, seeds = (rest[i * n : (i + 1) * n] for i in range(6))
    # An output that nothing used has no gradient.
    dys = [x.new_zeros((*x.shape[:-1], width)) if grad is None else grad for grad, width in zip(grads, ctx.widths)]
    weights = rest[6 * n :]
    of_layers = lora_as, lora_bs, mask_as, mask_bs, seeds, ctx.scalings, ctx.p
    # In a backward: someone asked for create_graph.
    if torch.is_grad_enabled():
        return dys, differentiable_gradients(dys, x, weights, *of_layers, needs=needs)
    found = gradients(dys, x, columns, weights, *of_layers, needs)
    return dys, [gradient if need else None for gradient, need in zip(found, needs)]


class _LoraLinear(torch.autograd.Function):
    """`_forward` and `_gradients` in eager mode; torch.compile sees the op below, which computes the same.

    Neither can serve both (bench/LOG.md): torch's wrapping of an op with lists of tensors makes a small forward 3.4
    times as slow, and Dynamo refuses an autograd.Function that is given one tensor twice, as tied layers do.
    """

    @staticmethod
    def forward(ctx, sizes, scalings, p, x, *flat):  # type: ignore[override]
        groups, start = [], 0
        for size in sizes:
            groups.append(flat[start : start + size])
            start += size
        inputs: Any = (x, *groups, scalings, p)
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        ctx.sizes = sizes
        return tuple(map(no_view, outputs[: len(scalings)]))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        n_weights, n_biases, n_ys, n, *_ = ctx.sizes
        needs, first_a = ctx.needs_input_grad, 4 + n_weights + n_biases + n_ys
        needs = [needs[3], *needs[first_a : first_a + 2 * n]]
        dys, (dx, *of_factors) = _saved_gradients(_gradients, ctx, grads, needs)
        through = dys if ctx.opaque else []
        return None, None, None, dx, *[None] * (n_weights + n_biases), *through, *of_factors, *[None] * (3 * n)


_op = torch.library.custom_op("lorapar::lora_linear", _forward, mutates_args=())
_gradients_op = torch.library.custom_op("lorapar::lora_linear_backward", _gradients, mutates_args=())


@_op.register_fake
def _forward_fake(x, weights, biases, ys, lora_as, lora_bs, mask_as, mask_bs, seeds, scalings, p):
    outs = [y.new_empty(y.shape) for y in ys] or [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return outs + passes_for("lora_linear", x, lora_as).shrink_fake(as_rows(x), lora_as)


@_gradients_op.register_fake
def _gradients_fake(dys, x, columns, weights, lora_as, lora_bs, mask_as, mask_bs, seeds, scalings, p, needs):
    return [
        like.new_empty(like.shape) if need else x.new_empty(0) for like, need in zip([x, *lora_as, *lora_bs], needs)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _save(ctx, inputs, output)
    # torch takes a list with a None in it for one argument, whose gradient is None and not a list of them.
    ctx.nothing = [
        None if any(entry is None for entry in given) else [None] * len(given)
        for given in (inputs[1], inputs[2], *inputs[6:9])
    ]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n = len(ctx.widths)
    needs_x, _, _, needs_y, needs_a, needs_b, *_ = ctx.needs_input_grad
    dys, (dx, *of_factors) = _saved_gradients(_gradients_op, ctx, grads[:n], [needs_x, *needs_a, *needs_b])
    through = [dy if need else None for dy, need in zip(dys, needs_y)] if ctx.opaque else []
    of_weights, of_biases, *of_masks_and_seeds = ctx.nothing
    return dx, of_weights, of_biases, through, of_factors[:n], of_factors[n:], *of_masks_and_seeds, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _apply(x: Tensor, *groups: Sequence[Tensor | None], scalings: list[float], p: float) -> list[Tensor]:
    """Each layer's output of checked arguments: weights, biases, ys, factors A and B, masks of each, seeds."""
    n = len(scalings)
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return differentiable(x, *groups, scalings, p)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            return _op(x, *map(list, groups), scalings, p)[:n]
        flat = [tensor for group in groups for tensor in group]
        return list(_LoraLinear.apply(tuple(map(len, groups)), scalings, p, x, *flat))


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
    on_device(x, lora_a=lora_a, lora_b=lora_b, mask_a=mask_a, mask_b=mask_b, seed=seed if dropout_p > 0.0 else None)
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if torch.finfo(tensor.dtype).bits < torch.finfo(x.dtype).bits:
            raise TypeError(f"{name} must be at least as wide as x ({x.dtype}), got {tensor.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        got = "None" if seed is None else f"{seed.numel()} of {seed.dtype}"
        raise ValueError(f"seed must be a one-element int64 tensor where dropout_p > 0, got {got}")


def on_device(x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def check_input(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError("x must have at least one dimension [..., in], got a scalar")


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_input(x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [out, {x.shape[-1]}], got {list(weight.shape)}")
    on_device(x, weight=weight, bias=bias)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: the base is frozen, and gets none")
    if bias is None:
        return
    if bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if bias.requires_grad:
        raise ValueError("bias must not require a gradient: the base is frozen, and gets none")


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
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    assert x_ is not None
    assert weight_ is not None
    check_weight(x_, weight_, bias_)
    check_arguments(x_, lora_a, lora_b, weight_.shape[0], mask_a, mask_b, dropout_p, seed)
    drawn = seed if dropout_p > 0.0 else None
    groups = [weight_], [bias_], [], [lora_a], [lora_b], [mask_a], [mask_b], [drawn]
    return _apply(x_, *groups, scalings=[scaling], p=dropout_p)[0]


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
    """y + scaling · drop(x) Aᵀ Bᵀ, y [..., out] being what an opaque base layer (4-bit, 8-bit) returned for x.

    Arguments, dtypes and errors as in `lora_linear`; y keeps its dtype, and its gradient is passed through.
    """
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must be [{', '.join(map(str, x.shape[:-1]))}, out] as x is, got {list(y.shape)}")
    x_ = x.to(y.dtype)
    check_arguments(x_, lora_a, lora_b, y.shape[-1], mask_a, mask_b, dropout_p, seed)
    groups = [], [], [y], [lora_a], [lora_b], [mask_a], [mask_b], [seed if dropout_p > 0.0 else None]
    return _apply(x_, *groups, scalings=[scaling], p=dropout_p)[0]


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
    if count == 0:
        raise ValueError("weights must hold at least one layer, got none")
    none: list[None] = [None] * count
    x_, *rest = as_autocast(x, *weights, *(biases or none))
    assert x_ is not None
    weights_, biases_ = [weight for weight in rest[:count] if weight is not None], rest[count:]
    masks, drawn = (mask_as or none, mask_bs or none), seeds or none
    for weight, bias, a, b, mask_a, mask_b, seed in zip(weights_, biases_, lora_as, lora_bs, *masks, drawn):
        check_weight(x_, weight, bias)
        check_arguments(x_, a, b, weight.shape[0], mask_a, mask_b, dropout_p, seed)
    groups = weights_, biases_, [], lora_as, lora_bs, *masks, drawn if dropout_p > 0.0 else none
    return _apply(x_, *groups, scalings=list(scalings), p=dropout_p)
