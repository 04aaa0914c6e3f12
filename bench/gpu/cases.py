"""What the steps share: sizes, masks, ways that are tried before they are timed, and which kernels they launch.

A step says what it launches once, as data, and runs that in two ways: `main()` on the device, in a rehearsal with small
sizes; and on the meta device, where nothing is computed, inside `recorded()`. So `variants()` is what the steps launch
and no copy of it, and whoever compiles those beforehand leaves no step to wait for a compiler.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lorapar_kernels as lk
from bench.gpu import record, timing
from bench.lora_layers import FROZEN, OURS, Layer, Made, Results, Way
from lorapar_kernels import lora_product
from lorapar_kernels.triton_kernels.launch import Variant, recording

# Modules by name, since the package holds functions of the same names.
linear = importlib.import_module("lorapar_kernels.lora_linear")
scoring = importlib.import_module("lorapar_kernels.importance")
# The share of elements that the paper's θ = 0.9 keeps (40.56 %), the rank and dropout that its script trains with.
ACTIVE, RANK, P = 0.4, 16, 0.05
# One attention product and one of the MLP of Llama-2-7B's shape, and one of Qwen2.5-7B's; a rehearsal's are two.
SHAPES = ((4096, 4096), (4096, 11008), (3584, 18944))
SMALL_SHAPES = ((32, 32), (32, 48))
TOKENS, SMALL_TOKENS = 8192, 32
# The tiles of the Contract.
TILE_A, TILE_B = (16, 64), (64, 16)
# Multiprocessors of an H100 or H200.
PROCESSORS = 132
# Bytes of NaN for the outputs of one case: y and dY in float32 would be 1.2 GB at the largest.
POISONED = 4 << 30
# Steps whose launches `variants` gathers: each has `launches(device)`.
LAUNCHING = ("correctness", "layer", "short", "decoder", "sanitizer_case")
# Largest difference over the largest value that rounding may make between ways: bf16 has 8 bits, and PEFT rounds at
# other places.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def shapes() -> tuple[tuple[int, int], ...]:
    return SMALL_SHAPES if record.rehearsal() else SHAPES


def tokens() -> int:
    return SMALL_TOKENS if record.rehearsal() else TOKENS


def begin() -> None:
    """Before anything else of a step: an interpreted rehearsal runs the Triton kernels on the CPU."""
    if record.rehearsal() and os.environ.get("TRITON_INTERPRET") == "1":
        # Faults of Triton's interpreter that the tests mend as well.
        importlib.import_module("tests.kernels.interpret.conftest")
        os.environ.setdefault("LORAPAR_BACKEND", "triton")


def products() -> tuple[str, ...]:
    """The ways of LORAPAR_PRODUCT that run here: fused goes with Triton's passes."""
    one = torch.ones(1, 1, device=record.device())
    return lora_product.WAYS if linear.passes_for("lora_linear", one, [one]).fused else ("plain",)


def label(layer: Layer) -> str:
    return f"{layer.n_in}→{layer.n_out} T={layer.tokens} r={layer.rank} p={layer.p}"


def masks(kind: str, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """kind: "none"; "elements", a share ACTIVE of them; "tiles", half of them, the first of each factor empty."""
    if kind == "none":
        return None, None
    if kind == "elements":
        return torch.rand_like(a) < ACTIVE, torch.rand_like(b) < ACTIVE
    return tiles(a, TILE_A), tiles(b, TILE_B)


def tiles(factor: Tensor, tile: tuple[int, int]) -> Tensor:
    (rows, columns), (height, width) = factor.shape, tile
    kept = torch.rand(-(-rows // height), -(-columns // width), device=factor.device) < 0.5
    kept[0, 0] = False
    return lk.spread_tiles(kept, factor.shape, tile)


# Ways


def ours(made: Made, unmasked: bool = False) -> dict[str, Way]:
    """Ours with each product that runs here; `unmasked`: without masks beside it, where the layer has some."""
    ways = {OURS[product]: made.ours(product) for product in products()}
    if unmasked and made.layer.active < 1.0:
        ways |= {f"{OURS[product]}, no masks": made.ours(product, masked=False) for product in products()}
    return ways


def peft_ways(case: str, made: Made) -> dict[str, Way]:
    """PEFT's layer; a PEFT that is missing, or of a version that wants other arguments, costs its own ways alone."""
    try:
        return made.peft_ways()
    except Exception as error:
        record.skipped(f"{case} | PEFT's layer", f"{type(error).__name__}: {one_line(error)}")
        return {}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def tried(case: str, ways: dict[str, Way]) -> dict[str, Results]:
    """What each way gives; one that raises is taken out of `ways` and told, and the others stand.

    A fault that leaves the GPU unusable is raised: there is nothing to go on with.
    """
    results: dict[str, Results] = {}
    for name in list(ways):
        try:
            results[name] = ways[name]()
            wait()
        except Exception as error:
            del ways[name]
            told = record.wrong if name.startswith("ours") else record.skipped
            told(f"{case} | {name}", f"{type(error).__name__}: {one_line(error)}")
            wait()
    return results


def wait() -> None:
    if not record.rehearsal():
        torch.cuda.synchronize()


def compared(case: str, made: Made, ways: dict[str, Way], results: Mapping[str, Results]) -> None:
    """Take out of `ways` what differs from our first way, and say so: a speed-up of a wrong result is never told.

    Where p > 0 the others draw other masks, so ours are held to each other alone; dA and dB where a mask is.
    """
    mine = [name for name in results if name.startswith("ours")]
    if not mine:
        return
    first = results[mine[0]]
    active = made.masks
    for name, result in results.items():
        if name in (FROZEN, mine[0]) or not (name.startswith("ours") or made.layer.p == 0.0):
            continue
        worst = 0.0
        for place, (one, other) in enumerate(zip(first, result, strict=True)):
            mask = active[place - 2] if place >= 2 else None
            if mask is not None:
                one, other = one.masked_fill(~mask, 0.0), other.masked_fill(~mask, 0.0)
            worst = max(worst, difference(one, other))
        if not worst < BOUND[made.layer.dtype]:
            record.wrong(f"{case} | {name}", f"differs from {mine[0]} by {worst:.3g} of the largest value")
            del ways[name]


def difference(one: Tensor, other: Tensor) -> float:
    """Of the largest value; NaN, which is not below any bound, counts as infinite."""
    off = float((one.float() - other.float()).abs().max() / other.float().abs().max())
    return off if off == off else float("inf")


def differing(one: Tensor, other: Tensor) -> int:
    """How many elements are not equal."""
    return int((one != other).sum())


def say_over(case: str, medians: dict[str, dict[str, float]], base: str, told: Sequence[str] = ()) -> None:
    """Per cent over `base`: of the GPU's time, by replay where both have it and else by events, and of the host's.

    told: the ways that are headlines, of the GPU's time."""
    if base not in medians:
        return
    by_replay, by_events = (timing.over(medians, base, kind) for kind in ("graph", "events"))
    for name in by_events:
        kind, percent = ("graph", by_replay[name]) if name in by_replay else ("events", by_events[name])
        headline = f"{case}: {name} over {base}" if name in told else None
        record.result(f"{case} | {name} over {base}", "%", percent, headline=headline, timed_by=kind, way=name)
    for name, percent in timing.over(medians, base, "host").items():
        record.result(f"{case} | {name} over {base} [host]", "%", percent, timed_by="host", way=name)


def enough_time(case: str, seconds: float) -> bool:
    """Whether so long remains, else a line that says what was left out."""
    if record.rehearsal() or record.remaining() > seconds:
        return True
    record.skipped(case, "no time was left")
    return False


# Memory that holds NaN, so that an output that nothing wrote shows


class _NanOutputs(TorchFunctionMode):
    """torch.empty, torch.empty_like and new_empty filled with NaN where they are floating-point."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, Tensor.new_empty) and made.is_floating_point():
            made.fill_(float("nan"))
        return made


@contextmanager
def poisoned(large: int | None = None, small: int = 64) -> Iterator[None]:
    """Within the block what is allocated holds NaN at first.

    On a GPU the allocator's free memory is returned, and one block of `large` bytes (POISONED) and `small` blocks of
    1 MB, which the allocator keeps apart from larger ones, are filled with bits that are NaN in every floating-point
    type.
    """
    if record.rehearsal():
        with _NanOutputs():
            yield
        return
    wait()
    torch.cuda.empty_cache()
    sizes = (POISONED if large is None else large, *[1 << 20] * small)
    filled = [torch.full((size,), 255, dtype=torch.uint8, device=record.device()) for size in sizes]
    del filled
    yield


# Which kernels the steps launch


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Launches are recorded and not made, for tensors on any device, so on the meta device too."""
    from lorapar_kernels.triton_kernels import importance as importance_triton

    put: list[tuple[Any, str, Any]] = [
        (linear, "passes_for", lambda *_: linear.triton_passes()),
        (scoring, "_backend", lambda *_: "triton"),
        # The tiles of the scoring pass depend on how many processors there are.
        (importance_triton, "grid", lambda *of, grid=importance_triton.grid: grid(*of[:3], PROCESSORS)),
        # torch has no autocast for the meta device, and raises when asked.
        (torch, "is_autocast_enabled", lambda *_: False),
        (torch, "autocast", lambda *_, **__: nullcontext()),
    ]
    with ExitStack() as stack:
        for owner, name, value in put:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield stack.enter_context(recording())


def variants(steps: Sequence[str] = LAUNCHING) -> list[Variant]:
    """Every Triton kernel that the steps launch, each specialisation once; nothing is computed."""
    with recorded() as found:
        for step in steps:
            importlib.import_module(f"bench.gpu.{step}").launches("meta")
    return found


def launch_layer(layer: Layer) -> None:
    """Ours of each product, with and without the layer's masks."""
    made = Made(layer)
    for product in lora_product.WAYS:
        for masked in {True, layer.active == 1.0}:
            made.ours(product, masked)()
