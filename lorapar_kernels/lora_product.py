"""A LoRA layer's frozen product together with its expand: two ways, and which of them a call takes.

    plain   torch's product, then the expand added to what it gave, so y and dX go through memory once more
    fused   one product that carries the expand in its accumulator (lora_product_triton.py), where Triton's passes run

The same sums, rounded once less by fused. plain is the specification, the only way without Triton's passes, and the
safe default: whether a product of our own stays near enough to cuBLAS's depends on the GPU and on the shape. So on a
CUDA device the first call of each kind of call (`_kind`) times both on its own tensors, some milliseconds, and the
process keeps to the faster. Nothing is timed while a CUDA graph is captured, nor under
torch.use_deterministic_algorithms, since two processes may choose differently: plain then serves.

    LORAPAR_PRODUCT=plain|fused     every lora_linear and lora_linear_grouped of some tokens takes this way, or fails

The scoring forms and opaque bases have no such product to choose.
"""

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lora_passes
from .backend import named
from .lora_passes import expand

VARIABLE, WAYS = "LORAPAR_PRODUCT", ("plain", "fused")
# Rounds of timing; and the share of plain's time below which fused is taken: less than that is noise.
ROUNDS, MARGIN = 5, 0.98
_chosen: dict[tuple[Any, ...], str] = {}


def outputs(
    passes: ModuleType,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    columns: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """x Wᵀ + bias + scaling · S Bᵀ [..., out] of each layer, x [..., in], S [T, r or more] of `columns`.

    passes: what `passes_for` gave for the call.
    """

    def plain() -> list[Tensor]:
        made = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        for y, s, b, scaling in zip(made, columns, lora_bs, scalings):
            expand(y.view(-1, y.shape[-1]), s, b, scaling)
        return made

    def fused() -> list[Tensor]:
        from . import lora_product_triton

        each = zip(weights, biases, columns, lora_bs, scalings)
        return [lora_product_triton.output(x, *of_layer) for of_layer in each]

    return _take({"plain": plain, "fused": fused}, passes, x, _kind("forward", x, weights, lora_bs, 0.0))


def input_gradients(
    passes: ModuleType,
    x: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    dss: Sequence[Tensor],
    p: float,
    seeds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    needs_a: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """dX = Σ dY W + keep ⊙ (dS A) [T, in], and each dA as the passes' `input_gradients` gives it; x [T, in]."""
    of_layers = lora_as, dss, p, seeds, masks, needs_a

    def plain() -> tuple[Tensor, list[Tensor | None]]:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx, passes.input_gradients(x, dx, *of_layers)

    def fused() -> tuple[Tensor, list[Tensor | None]]:
        from . import lora_product_triton

        das: list[Tensor | None] = [None] * len(dys)
        bits = None
        if any(needs_a):
            bits = lora_product_triton.room_for_bits(x, p, len(dys))
            das = passes.input_gradients(x, None, *of_layers, bits)
        dx = None
        for i, of_layer in enumerate(zip(dys, weights, dss, lora_as, seeds)):
            dx = lora_product_triton.input_gradient(dx, *of_layer, p, None if bits is None else bits[i])
        assert dx is not None
        return dx, das

    kind = (*_kind("backward", x, weights, lora_as, p), any(needs_a))
    return _take({"plain": plain, "fused": fused}, passes, x, kind)


def _kind(direction: str, x: Tensor, weights: Sequence[Tensor], factors: Sequence[Tensor], p: float) -> tuple[Any, ...]:
    """What a choice holds for: numbers of tokens within a power of two, all else exactly."""
    tokens = (x.numel() // x.shape[-1]).bit_length()
    layers = tuple((weight.shape, factor.shape, factor.dtype) for weight, factor in zip(weights, factors))
    return direction, x.device, x.dtype, tokens, p > 0.0, layers


def _take(ways: Mapping[str, Callable[[], Any]], passes: ModuleType, x: Tensor, kind: tuple[Any, ...]) -> Any:
    """The result of the way that is forced, or was chosen for this kind of call, or is chosen now."""
    way = named(VARIABLE, WAYS)
    if x.numel() == 0:
        way = "plain"
    elif passes is lora_passes:
        if way == "fused":
            raise ValueError(
                f"{VARIABLE}=fused cannot serve lora_linear: it goes with Triton's passes, which do not run here"
            )
        way = "plain"
    way = way or _chosen.get(kind)
    if way is None and _may_time(x.device):
        way = _chosen[kind] = _faster(ways)
    return ways[way or "plain"]()


def _may_time(device: torch.device) -> bool:
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _faster(ways: Mapping[str, Callable[[], Any]]) -> str:
    """fused where it takes clearly less time than plain, else plain."""
    try:
        times = seconds(ways)
    # The kernel may not compile for, or not fit, a GPU that it was never tried on; plain serves there, and says so.
    except Exception as error:
        warnings.warn(f"the fused product does not run here, so the plain one is taken: {error}", stacklevel=2)
        return "plain"
    return "fused" if times["fused"] < MARGIN * times["plain"] else "plain"


def seconds(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each way on the current CUDA stream: called in turns, after one call that compiles."""
    for call in ways.values():
        call()
    events: dict[str, list[tuple[Any, Any]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in ways.items():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            call()
            ended.record()
            events[way].append((began, ended))
    torch.cuda.synchronize()
    return {
        way: statistics.median(began.elapsed_time(ended) for began, ended in pairs) / 1e3
        for way, pairs in events.items()
    }


def in_force(device: torch.device) -> str:
    """Which way a `lora_linear` on this device takes, for people."""
    t = torch.ones(2, 2, device=device)
    try:
        way, passes = named(VARIABLE, WAYS), lora_passes.passes_for("lora_linear", t, [t])
    except ValueError as error:
        return f"fails: {error}"
    if passes is lora_passes:
        without = "Triton's passes do not run here"
        return f"fails: {VARIABLE}=fused, and {without}" if way == "fused" else f"plain  (fused: {without})"
    if way is not None:
        return f"{way}  ({VARIABLE})"
    if device.type != "cuda":
        return "plain  (fused: only where forced, off CUDA devices)"
    taken = [way for kind, way in _chosen.items() if kind[1].type == device.type]
    counts = ", ".join(f"{way} {taken.count(way)}" for way in WAYS)
    return f"the faster, timed at the first call of each kind  (so far: {counts})"
