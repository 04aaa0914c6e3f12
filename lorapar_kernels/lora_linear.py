"""Masked LoRA linear layer: y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ, with gradients for x, A and B only.

Shapes: x [..., in], weight W [out, in], lora_a A [r, in], lora_b B [out, r], masks bool of A's and B's shape. W and x
share a dtype; A and B may be wider (PEFT keeps them in fp32 beside a bf16 base). With keep the dropout mask,
drop(x) = keep ⊙ x / (1 − p), S = drop(x) Aᵀ and dS = s / (1 − p) · dY B,

    dX = dY W + keep ⊙ (dS A),    dA = mask_a ⊙ dSᵀ (keep ⊙ x),    dB = mask_b ⊙ s · dYᵀ S.

Masks act on gradients, never on the forward: an inactive element keeps its value and takes part with it (LoRA-PAR,
paper section 3.4). Saved for backward: x, which the layers of one x share, and S of rank r; the dropout mask is drawn
again from its seed, or kept as bits (`keeps_bits`). The scale 1 / (1 − p) is applied at rank r, so that dropping an
element of x rounds nothing.

One op serves one layer and several layers of one x, as one node of autograd. Its specification is below, in plain
PyTorch for any device. On a GPU the small factors' share is written first, and the frozen products add to it
(lora_product.py; the kernels are in triton_kernels/lora_forward.py and lora_backward.py).

A gradient of a gradient (`create_graph`), forward-mode differentiation, and a call inside a transform of torch.func are
computed by `differentiable`, the layer in operations that torch itself differentiates: S and dS above are constants to
autograd. So are torch.jit.trace and torch.export, whose programs then run without this package.

Trade-offs: products run in x's dtype with the GEMM's own fp32 accumulation, so A and B are rounded to bf16 beside a
bf16 x, and their gradients are rounded once on the way out. Casting x up instead, as PEFT does, costs a copy of x a
layer. The reference makes a product of r rows for each layer of one x, where the kernels read x once for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import lora_product, native
from .backend import choose, no_obstacle
from .dropout import dropout_mask, is_batched, triton_obstacle, zero_dropped
from .lora_layer import FrozenWeight, LoraLayer, as_rows, dense_weight, is_recorded
from .tiles import TiledMask

MAX_RANK = 256  # of the Triton kernels
# A call of so few tokens without a gradient (a decoding step) is two small products beside the base's.
FEW_TOKENS = 16


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


def masked(gradient: Tensor, mask: TiledMask | None, dtype: torch.dtype) -> Tensor:
    """The gradient in its parameter's dtype, contiguous, exactly zero (also where it was NaN) outside the mask."""
    gradient = gradient.to(dtype).contiguous()
    return gradient if mask is None else gradient.masked_fill_(~mask.mask, 0.0)


def shrink_reference(x: Tensor, factors: Sequence[Tensor], p: float, seeds: Sequence[Tensor | None]) -> list[Tensor]:
    """S = drop(x) Aᵀ [T, r] of x [T, in] for each A of `factors`, in x's dtype."""
    # r rows as in `transposed_product`, but whatever T is, so that S has the same strides for any T.
    columns = [(a.to(x.dtype) @ apply_dropout(x, p, seed).t()).t() for a, seed in zip(factors, seeds)]
    if p == 0.0:
        return columns
    scale = 1.0 / (1.0 - p)
    return [s * scale if is_recorded() else s.mul_(scale) for s in columns]


def _shrink_fake(x: Tensor, lora_a: Tensor) -> Tensor:
    """A tensor as `shrink_reference` returns them, without values."""
    return x.new_empty((lora_a.shape[0], x.shape[0])).t()


def expand_reference(y: Tensor, s: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y + scaling · S Bᵀ, y [T, out], S [T, r], in y's dtype."""
    return torch.addmm(y, s, b.to(y.dtype).t(), alpha=scaling)


def output_gradients_reference(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, p: float, mask: TiledMask | None, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = scaling / (1 − p) · dY B [T, r] in dY's dtype, and dB = mask ⊙ scaling · dYᵀ S in B's."""
    ds = transposed_product(dy.t(), b.to(dy.dtype)).mul_(scaling / (1.0 - p))
    return ds, masked(transposed_product(dy, s).mul_(scaling), mask, b.dtype) if needs_b else None


def input_gradient_reference(dx: Tensor | None, ds: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ⊙ (dS A) [T, in] in dS's dtype, added to dx in place where that is given."""
    if p == 0.0:
        return ds @ a.to(ds.dtype) if dx is None else dx.addmm_(ds, a.to(ds.dtype))
    kept = apply_dropout(ds @ a.to(ds.dtype), p, seed)
    return kept if dx is None else dx.add_(kept)


def forward_reference(
    x: Tensor, layers: Sequence[LoraLayer], p: float, keep_bits: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], None]:
    """Each layer's output [..., out], each S [T, r], no dropout bits (they are drawn again), and no plan."""
    columns = shrink_reference(as_rows(x), [layer.lora_a for layer in layers], p, [layer.seed for layer in layers])
    outs = []
    for layer, s in zip(layers, columns):
        if layer.weight is None:
            assert layer.y is not None
            out = expand_reference(as_rows(layer.y), s, layer.lora_b, layer.scaling).view(layer.y.shape)
        else:
            out = F.linear(x, dense_weight(layer.weight, x.dtype), layer.bias)
            if is_recorded():
                out = expand_reference(as_rows(out), s, layer.lora_b, layer.scaling).view(out.shape)
            else:
                out.view(-1, out.shape[-1]).addmm_(s, layer.lora_b.to(x.dtype).t(), alpha=layer.scaling)
        outs.append(out)
    return outs, columns, [], None


def backward_reference(
    dys: Sequence[Tensor],
    x: Tensor,
    columns: Sequence[Tensor],
    bits: Sequence[Tensor],
    layers: Sequence[LoraLayer],
    p: float,
    needs: Sequence[bool],
    plan: None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX [T, in] of what is not opaque, each dA and each dB, None where not needed.

    dys [T, out], x [T, in]; needs: of x, of each A, of each B.
    """
    n = len(layers)
    of_outputs = [
        output_gradients_reference(dy, layer.lora_b, s, layer.scaling, p, layer.mask_b, need)
        for dy, layer, s, need in zip(dys, layers, columns, needs[n + 1 :])
    ]
    dx: Tensor | None = None
    if needs[0]:
        # Each layer's share as it would be alone, the last layer's first, as autograd adds up the gradients of x:
        # whether layers share a node then changes no bit, so that a run that is resumed repeats its own.
        for dy, layer, (ds, _) in reversed(list(zip(dys, layers, of_outputs))):
            share = None if layer.weight is None else dy @ dense_weight(layer.weight, dy.dtype)
            share = input_gradient_reference(share, ds, layer.lora_a, p, layer.seed)
            dx = share if dx is None else dx.add_(share)
    das = [
        masked(ds.t() @ apply_dropout(x, p, layer.seed), layer.mask_a, layer.lora_a.dtype) if need else None
        for layer, (ds, _), need in zip(layers, of_outputs, needs[1 : n + 1])
    ]
    return dx, das, [db for _, db in of_outputs]


def no_view(y: Tensor) -> Tensor:
    """`y` as no view: autograd refuses to have a view changed in place that a Function returned (DeBERTa does so)."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def differentiable(x: Tensor, layers: Sequence[LoraLayer], p: float) -> list[Tensor]:
    """Each layer's output in torch's own operations, differentiable to any order."""
    outs = []
    if p > 0.0 and torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace: a LoRA layer with dropout cannot be traced; call model.eval() first")
    for layer in layers:
        base = layer.y
        if base is None:
            assert layer.weight is not None
            weight = layer.weight
            # Kept by autograd, so in memory of its own.
            weight = weight if isinstance(weight, Tensor) else weight.dense(x.dtype).clone()
            base = F.linear(x, weight, layer.bias)
        kept = x if layer.seed is None else torch.where(dropout_mask(layer.seed, list(x.shape), p), x, 0.0)
        a, b = (
            (factor if mask is None else torch.where(mask.mask, factor, factor.detach())).to(x.dtype)
            for factor, mask in ((layer.lora_a, layer.mask_a), (layer.lora_b, layer.mask_b))
        )
        outs.append(base + F.linear(F.linear(kept, a) * (1.0 / (1.0 - p)), b) * layer.scaling)
    return outs


def differentiable_gradients(
    dys: Sequence[Tensor], x: Tensor, layers: Sequence[LoraLayer], p: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dX, each dA and each dB with their own graph, None where not needed: a backward under `create_graph`."""
    n = len(layers)
    # Each place has a tensor of its own, also where one tensor was given twice.
    given = x, *(layer.lora_a for layer in layers), *(layer.lora_b for layer in layers)
    places = [tensor.view_as(tensor) for tensor in given]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # What an opaque base returned adds no gradient here, and neither does a bias; any constant will do. (Of several
        # gradients at once torch can detach none.)
        put = [
            layer._replace(
                bias=None,
                y=x.new_zeros(()).expand(dy.shape) if layer.weight is None else None,
                lora_a=places[i + 1],
                lora_b=places[n + i + 1],
            )
            for i, (layer, dy) in enumerate(zip(layers, dys))
        ]
        outs = differentiable(places[0], put, p)
        wanted = [place for place, need in zip(places, needs) if need]
        found = iter(torch.autograd.grad(outs, wanted, dys, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]


class Passes(NamedTuple):
    """How one backend computes the layers of one x.

    Attributes:
        forward, backward: as `forward_reference` and `backward_reference`.
        shrink_fake: S as `forward` returns it for x [T, in] and A, without values.
        fused: whether lora_product.py's fused product can run with them.
    """

    forward: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor], Any]]
    backward: Callable[..., tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]]
    shrink_fake: Callable[[Tensor, Tensor], Tensor]
    fused: bool


def reference_passes() -> Passes:
    """The specification above, which serves any device."""
    return Passes(forward_reference, backward_reference, _shrink_fake, fused=False)


def triton_passes() -> Passes:
    """The Triton kernels around torch's products."""
    return Passes(lora_product.forward, lora_product.backward, lora_product.shrink_fake, fused=True)


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


def _passes_of(x: Tensor, layers: Sequence[LoraLayer]) -> Passes:
    return passes_for("lora_linear", x, [layer.lora_a for layer in layers])


def keeps_bits(x: Tensor, layers: Sequence[LoraLayer], p: float) -> bool:
    """Whether the dropout masks that the forward draws are kept for the backward, as bits: a sixteenth of a 16-bit x.

    A draw is about nine integer instructions an element and reading a bit three, while reading x takes an H200 as long
    as nine or ten. So one layer's draws hide behind reading x, and those of two or three layers of one x do not.
    Estimated, not measured on a GPU.
    """
    return p > 0.0 and len(layers) > 1 and x.element_size() == 2 and x.shape[-1] % 8 == 0


def _forward(
    passes: Passes, x: Tensor, layers: Sequence[LoraLayer], p: float, for_backward: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Any]:
    """Each layer's output; each S, the dropout bits and the plan, which the backward takes."""
    if not passes.fused and x.numel() > 0:
        lora_product.refuse_fused(layers)
    if not for_backward and passes.fused and len(layers) == 1 and layers[0].lora_b.dtype == x.dtype:
        # Two launches of ours would cost what torch's two products do.
        few = x.numel() <= FEW_TOKENS * x.shape[-1] and p == 0.0
        passes = reference_passes() if few else passes
    return passes.forward(x, layers, p, for_backward and keeps_bits(x, layers, p))


def _gradients(
    passes: Passes,
    dys: Sequence[Tensor],
    x: Tensor,
    columns: Sequence[Tensor],
    bits: Sequence[Tensor],
    layers: Sequence[LoraLayer],
    p: float,
    needs: Sequence[bool],
    plan: Any = None,
) -> list[Tensor | None]:
    """needs: of x, of each A, of each B. Returns dX, each dA, each dB; None for what is not needed."""
    dx, das, dbs = passes.backward([as_rows(dy) for dy in dys], as_rows(x), columns, bits, layers, p, needs, plan)
    return [None if dx is None else dx.view(x.shape), *das, *dbs]


# Whether the backward that runs was asked to keep the graph.
_keeps_graph: Any = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore[reportAttributeAccessIssue]
# As torch says it of what it saved.
CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: x, the weight, a "
    "factor or the seed of a LoRA layer"
)
SAVED: Any = object()  # in the place of a weight that autograd keeps


class _LoraLayers(torch.autograd.Function):
    """`_forward` and `_gradients` in eager mode; torch.compile sees the op below, which computes the same.

    Neither can serve both (bench/LOG.md): torch's wrapping of an op costs a small forward as much again, and Dynamo
    refuses an autograd.Function that is given one tensor twice, as tied layers do. `layers` comes as one object, since
    autograd looks at each argument: what can have a gradient follows it (x, each A, each B, each opaque base's y).
    """

    @staticmethod
    def forward(ctx, layers, p, x, *differentiable_of_layers):  # type: ignore[override]
        n, passes = len(layers), _passes_of(x, layers)
        outs, columns, bits, plan = _forward(passes, x, layers, p, True)
        ctx.set_materialize_grads(False)
        # Saved, and nothing else of x's or y's size: x, S and its bits, and the weights.
        weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
        ctx.save_for_backward(x, *columns, *bits, *weights)
        # Not among them: a change of one layer's factors is no matter of another's backward. A seed that is written
        # before the backward would draw another mask there.
        ctx.factors = differentiable_of_layers[: 2 * n]
        ctx.versions = [factor._version for factor in ctx.factors]
        ctx.versions += [0 if layer.seed is None else layer.seed._version for layer in layers]
        # Without the tensors that autograd saves, and without y: an opaque base's output would stay alive here.
        ctx.rest = [
            (SAVED if isinstance(weight, Tensor) else weight, scaling, mask_a, mask_b, seed)
            for weight, _, _, _, _, scaling, mask_a, mask_b, seed in layers
        ]
        ctx.passes, ctx.plan, ctx.p, ctx.n_bits = passes, plan, p, len(bits)
        ctx.kept = None
        outs = tuple(map(no_view, outs))
        if n > 1 and not ctx.needs_input_grad[2]:
            needs = ctx.needs_input_grad
            # A layer whose factors are frozen has no gradient beside ones that have.
            frozen = [i for i in range(n) if layers[i].y is None and not (needs[3 + i] or needs[3 + n + i])]
            ctx.mark_non_differentiable(*(outs[i] for i in frozen))
        return outs

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        n, needs = len(ctx.rest), ctx.needs_input_grad
        used, plan = [i for i, grad in enumerate(grads) if grad is not None], ctx.plan
        if not used:
            return (None,) * len(needs)
        x, *rest = ctx.saved_tensors if len(used) == n and ctx.kept is None else _saved(ctx, used)
        columns, bits, weights = rest[:n], rest[n : n + ctx.n_bits], iter(rest[n + ctx.n_bits :])
        factors = ctx.factors
        if any(factors[i]._version != ctx.versions[i] for k in used for i in (k, n + k)):
            raise RuntimeError(CHANGED)
        seeds = [rest[-1] for rest in ctx.rest]
        if any(seeds[i] is not None and seeds[i]._version != ctx.versions[2 * n + i] for i in used):
            raise RuntimeError(CHANGED)
        layers = [
            LoraLayer(next(weights) if weight is SAVED else weight, None, None, a, b, *of_layer)
            for (weight, *of_layer), a, b in zip(ctx.rest, factors[:n], factors[n:])
        ]
        through = [grad for grad, layer in zip(grads, layers) if layer.weight is None]
        if len(used) < n:
            # An output that nothing used has no gradient, and neither have its factors.
            plan = None
            columns, bits = [columns[i] for i in used], [bits[i] for i in used] if bits else []
            layers, grads = [layers[i] for i in used], [grads[i] for i in used]
        passes = ctx.passes
        if passes.fused and any(map(is_batched, grads)):
            # Several gradients at once have no memory that a kernel could read.
            passes, bits, plan = reference_passes(), [], None
            columns = [s[:, : layer.lora_a.shape[0]] for s, layer in zip(columns, layers)]
        wanted = [needs[2], *[needs[3 + i] for i in used], *[needs[3 + n + i] for i in used]]
        # In a backward: someone asked for create_graph.
        if torch.is_grad_enabled():
            found = differentiable_gradients(grads, x, layers, ctx.p, wanted)
        else:
            found = _gradients(passes, grads, x, columns, bits, layers, ctx.p, wanted, plan)
        if len(used) < n:
            of_factors: list[Tensor | None] = [None] * (2 * n)
            for place, i in enumerate(used):
                of_factors[i], of_factors[n + i] = found[1 + place], found[1 + len(used) + place]
            found = [found[0], *of_factors]
        return None, None, *found, *through


def _saved(ctx: Any, used: Sequence[int]) -> Sequence[Tensor]:
    """What the forward saved, for a backward through the outputs `used`.

    It is kept until every output had its backward, since layers of nodes of their own can have one each.
    """
    n, reached = len(ctx.rest), set(used)
    left, saved, versions = ctx.kept or (set(range(n)), None, [])
    if saved is not None and reached <= left:
        weights = accumulate((rest[0] is SAVED for rest in ctx.rest), initial=1 + n + ctx.n_bits)
        read = [0] + [at for i, at in enumerate(weights) if i in reached and ctx.rest[i][0] is SAVED]
        if any(saved[i]._version != versions[i] for i in read):
            raise RuntimeError(CHANGED)
    else:
        saved = ctx.saved_tensors
    if not _keeps_graph():
        left -= reached
        versions = versions or [tensor._version for tensor in saved]
        ctx.kept = (left, saved, versions) if left else None
    return saved


def _one_layer(
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
) -> list[LoraLayer]:
    mask_a_, mask_b_ = (None if mask is None else TiledMask(mask, None) for mask in (mask_a, mask_b))
    return [LoraLayer(weight, bias, y, lora_a, lora_b, scaling, mask_a_, mask_b_, seed)]


# One layer, without lists: torch's handling of an op with lists took 0.2 ms a call.
_ops = torch.library.Library("lorapar", "FRAGMENT")
_OF_LAYER = (
    "Tensor? weight, Tensor? bias, Tensor? y, Tensor lora_a, Tensor lora_b, Tensor? mask_a, Tensor? mask_b, "
    "Tensor? seed, float scaling, float p"
)
_ops.define(f"lora_linear(Tensor x, {_OF_LAYER}) -> (Tensor, Tensor)")
_ops.define(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor s, {_OF_LAYER}, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_ops, "lora_linear", "CompositeExplicitAutograd")
def _lora_linear_op(x: Tensor, *layer_and_p: Any) -> tuple[Tensor, Tensor]:
    *of_layer, p = layer_and_p
    layers = _one_layer(*of_layer)
    (out,), (s,), *_ = _forward(_passes_of(x, layers), x, layers, p, True)
    return out, s


@torch.library.impl(_ops, "lora_linear_backward", "CompositeExplicitAutograd")
def _lora_linear_backward_op(dy: Tensor, x: Tensor, s: Tensor, *layer_p_needs: Any) -> tuple[Tensor, ...]:
    *of_layer, p, needs = layer_p_needs
    layers = _one_layer(*of_layer)
    found = _gradients(_passes_of(x, layers), [dy], x, [s], [], layers, p, needs)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@torch.library.register_fake("lorapar::lora_linear", lib=_ops)
def _lora_linear_fake(x, weight, bias, y, lora_a, lora_b, *rest):
    out = x.new_empty((*x.shape[:-1], lora_b.shape[0]))
    return out, passes_for("lora_linear", x, [lora_a]).shrink_fake(as_rows(x), lora_a)


@torch.library.register_fake("lorapar::lora_linear_backward", lib=_ops)
def _lora_linear_backward_fake(dy, x, s, weight, bias, y, lora_a, lora_b, *rest):
    needs = rest[-1]
    return tuple(
        like.new_empty(like.shape) if need else x.new_empty(0) for like, need in zip((x, lora_a, lora_b), needs)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, y, lora_a, lora_b, mask_a, mask_b, seed, scaling, p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, mask_a, mask_b, seed)
    ctx.scaling, ctx.p, ctx.opaque = scaling, p, y is not None
    ctx.out_shape = output[0].shape


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, s, weight, lora_a, lora_b, mask_a, mask_b, seed = ctx.saved_tensors
    dy = x.new_zeros(ctx.out_shape) if grad is None else grad
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    of_layer = weight, None, None, lora_a, lora_b, mask_a, mask_b, seed, ctx.scaling
    if torch.is_grad_enabled():
        found = differentiable_gradients([dy], x, _one_layer(*of_layer), ctx.p, needs)
    else:
        made = torch.ops.lorapar.lora_linear_backward(dy, x, s, *of_layer, ctx.p, needs)
        found = [gradient if need else None for gradient, need in zip(made, needs)]
    dx, da, db = found
    return dx, None, None, grad if ctx.opaque else None, da, db, *(None,) * 5


torch.library.register_autograd("lorapar::lora_linear", _backward, setup_context=_setup_context, lib=_ops)


def lora_layers(x: Tensor, layers: Sequence[LoraLayer], p: float) -> list[Tensor]:
    """Each layer's output [..., out], of arguments that `check_layer` has accepted; one node of autograd.

    x is in the dtype that the layers compute in, also under autocast.
    """
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transformed or torch._C._get_tracing_state() is not None:
            return differentiable(x, layers, p)
        if torch.compiler.is_compiling():
            # What is exported runs where this package is not.
            if torch.compiler.is_exporting():
                return differentiable(x, layers, p)
            return [_op_of(x, layer, p) for layer in layers]
        inputs = (
            x,
            *(layer.lora_a for layer in layers),
            *(layer.lora_b for layer in layers),
            *(layer.y for layer in layers if layer.y is not None),
        )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return list(_LoraLayers.apply(layers, p, *inputs))  # type: ignore[arg-type]
        return _forward(_passes_of(x, layers), x, layers, p, False)[0]


def _op_of(x: Tensor, layer: LoraLayer, p: float) -> Tensor:
    masks = (None if mask is None else mask.mask for mask in (layer.mask_a, layer.mask_b))
    of_layer = layer.weight, layer.bias, layer.y, layer.lora_a, layer.lora_b, *masks, layer.seed, layer.scaling
    return torch.ops.lorapar.lora_linear(x, *of_layer, p)[0]


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


def check_weight(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None) -> None:
    check_input(x)
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [out, {x.shape[-1]}], got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    on_device(x, bias=bias)
    if isinstance(weight, Tensor):
        if weight.dtype != x.dtype:
            raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient: the base is frozen, and gets none")
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}")
    if bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if bias.requires_grad:
        raise ValueError("bias must not require a gradient: the base is frozen, and gets none")


def as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, x and the base's tensors in autocast's dtype; elsewhere as they are."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        # Integers stay, to be refused.
        tensor if tensor is None or not tensor.is_floating_point() else tensor.to(dtype)
        for tensor in (x, *others)
    )


def check_layer(x: Tensor, layer: LoraLayer, p: float) -> None:
    """Raise ValueError or TypeError that names the first argument that does not fit `lora_layers`."""
    mask_a, mask_b = (None if mask is None else mask.mask for mask in (layer.mask_a, layer.mask_b))
    if layer.weight is not None:
        check_weight(x, layer.weight, layer.bias)
    out_features = _out_features(layer)
    check_arguments(x, layer.lora_a, layer.lora_b, out_features, mask_a, mask_b, p, layer.seed)
    for name, mask, columns in (("mask_a", layer.mask_a, x.shape[-1]), ("mask_b", layer.mask_b, out_features)):
        if mask is not None:
            mask.check(name, columns)


def _out_features(layer: LoraLayer) -> int:
    if layer.weight is not None:
        return layer.weight.shape[0]
    assert layer.y is not None
    return layer.y.shape[-1]


def _check_types(numbers: Mapping[str, object], tensors: Mapping[str, object], optional: Mapping[str, object]) -> None:
    """TypeError that names the first argument of another type; what is optional may be None."""
    for name, value in (*tensors.items(), *optional.items()):
        if not isinstance(value, Tensor) and (value is not None or name in tensors):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, value in numbers.items():
        if not isinstance(value, (int, float, Real)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def _checked(x: Tensor, layers: list[LoraLayer], p: float) -> list[Tensor]:
    for layer in layers:
        check_layer(x, layer, p)
    return lora_layers(x, layers, p)


def _tiled(name: str, mask: Tensor | TiledMask | None) -> TiledMask | None:
    if mask is None:
        return mask
    tiled = mask if isinstance(mask, TiledMask) else TiledMask(mask, None)
    if not isinstance(tiled.mask, Tensor):
        raise TypeError(f"{name} must be a bool tensor or a TiledMask of one, got {type(tiled.mask).__name__}")
    return tiled


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    mask_a: Tensor | TiledMask | None = None,
    mask_b: Tensor | TiledMask | None = None,
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
            Gradients are exactly zero elsewhere; the forward and x's gradient use every element. A `TiledMask` of
            one, made once, has the kernels skip the stripes that hold nothing active.
        dropout_p: in [0, 1), on the LoRA branch's input. seed: one-element int64 tensor, see `dropout_mask`.

    Returns [..., out] in x's dtype. Raises ValueError or TypeError that names the argument that does not fit.
    """
    _check_types(
        {"dropout_p": dropout_p, "scaling": scaling},
        {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b},
        {"bias": bias, "seed": seed},
    )
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    assert x_ is not None
    masks = _tiled("mask_a", mask_a), _tiled("mask_b", mask_b)
    drawn = seed if dropout_p > 0.0 else None
    layer = LoraLayer(weight_, bias_, None, lora_a, lora_b, scaling, *masks, drawn)
    return _checked(x_, [layer], dropout_p)[0]


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask_a: Tensor | TiledMask | None = None,
    mask_b: Tensor | TiledMask | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + scaling · drop(x) Aᵀ Bᵀ, y [..., out] being what an opaque base layer (4-bit, 8-bit) returned for x.

    Arguments, dtypes and errors as in `lora_linear`; y keeps its dtype and its values, and its gradient is passed
    through.
    """
    numbers = {"dropout_p": dropout_p, "scaling": scaling}
    _check_types(numbers, {"y": y, "x": x, "lora_a": lora_a, "lora_b": lora_b}, {"seed": seed})
    check_input(x)
    if not y.is_floating_point():
        raise TypeError(f"y must be floating point, got {y.dtype}")
    on_device(x, y=y)
    if y.ndim < 1 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must be [{', '.join(map(str, x.shape[:-1]))}, out] as x is, got {list(y.shape)}")
    masks = _tiled("mask_a", mask_a), _tiled("mask_b", mask_b)
    drawn = seed if dropout_p > 0.0 else None
    layer = LoraLayer(None, None, y, lora_a, lora_b, scaling, *masks, drawn)
    return _checked(x.to(y.dtype), [layer], dropout_p)[0]


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    mask_as: Sequence[Tensor | TiledMask | None] | None = None,
    mask_bs: Sequence[Tensor | TiledMask | None] | None = None,
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
    # A tensor of as many entries is a sequence too, but no truth value.
    biases, seeds = none if biases is None else biases, none if seeds is None else seeds
    mask_as, mask_bs = none if mask_as is None else mask_as, none if mask_bs is None else mask_bs
    for i, (weight, a, b, scaling, bias, seed) in enumerate(zip(weights, lora_as, lora_bs, scalings, biases, seeds)):
        _check_types(
            {"dropout_p": dropout_p, f"scalings[{i}]": scaling},
            {"x": x, f"weights[{i}]": weight, f"lora_as[{i}]": a, f"lora_bs[{i}]": b},
            {f"biases[{i}]": bias, f"seeds[{i}]": seed},
        )
    x_, *rest = as_autocast(x, *weights, *biases)
    assert x_ is not None
    drawn = seeds if dropout_p > 0.0 else none
    given = zip(rest[:count], rest[count:], lora_as, lora_bs, scalings, mask_as, mask_bs, drawn)
    layers = [
        LoraLayer(weight, bias, None, a, b, scaling, _tiled("mask_a", mask_a), _tiled("mask_b", mask_b), seed)
        for weight, bias, a, b, scaling, mask_a, mask_b, seed in given
    ]
    return _checked(x_, layers, dropout_p)
