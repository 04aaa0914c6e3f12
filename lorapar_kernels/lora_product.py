"""A LoRA layer's frozen product together with its expand, s · S Bᵀ: two ways, and which of them a call takes.

    plain   torch's product, then the expand added to its output, so y and dX go through memory once more
    fused   one product that carries the expand in its accumulator (triton_kernels/lora_product.py), where Triton runs

Both compute the same sums; fused rounds once less. plain is the specification, the only way without Triton's passes,
and the safe default: whether our own product is fast enough beside cuBLAS's depends on the GPU and on the shape. So on
a CUDA device the first call of each kind (`_kind`) times both on its own tensors, which takes some milliseconds, and
the process keeps the faster. The GPU's work is timed, not Python's: a captured graph of each way is replayed. Nothing
is timed while a CUDA graph is captured, or under torch.use_deterministic_algorithms, since two processes may choose
differently: plain then serves.

    LORAPAR_PRODUCT=plain|fused     every lora_linear and lora_linear_grouped with tokens takes this way, or fails
    choices = product_choices()     what was chosen so far, for a file beside a run's results
    set_product_choices(choices)    in another process: used as they are, and not timed again

The scoring forms and opaque bases have no such product to choose.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import named

VARIABLE, WAYS = "LORAPAR_PRODUCT", ("plain", "fused")
# Rounds of timing, and calls a round; the share of plain's time below which fused is taken: less than that is noise.
ROUNDS, CALLS, MARGIN = 5, 4, 0.98
# More clock cycles a second than any GPU has, so that a wait is at least as long as asked.
CYCLES = 3e9
Choices = dict[str, dict[str, str]]
# Of this process, by kind of call; and those it was given, by the GPU's name and the kind in words.
_chosen: dict[tuple[Any, ...], str] = {}
_given: Choices = {}


def expand(y: Tensor, s: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling · S Bᵀ to y [T, out] in place; S [T, r or more]: a kernel's S is padded."""
    y.addmm_(s[:, : b.shape[1]], b.to(y.dtype).t(), alpha=scaling)


def outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    columns: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    can_fuse: bool,
) -> list[Tensor]:
    """x Wᵀ + bias + scaling · S Bᵀ [..., out] of each layer, x [..., in], S [T, r or more] of `columns`.

    can_fuse: whether Triton's passes serve this call; the fused product needs them.
    """

    def plain() -> list[Tensor]:
        made = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        for y, s, b, scaling in zip(made, columns, lora_bs, scalings):
            expand(y.view(-1, y.shape[-1]), s, b, scaling)
        return made

    def fused() -> list[Tensor]:
        from .triton_kernels import lora_product as kernels

        each = zip(weights, biases, columns, lora_bs, scalings)
        return [kernels.output(x, *of_layer) for of_layer in each]

    return _run_chosen({"plain": plain, "fused": fused}, can_fuse, x, _kind("forward", x, weights, lora_bs, 0.0))


def input_gradients(
    x: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    dss: Sequence[Tensor],
    p: float,
    seeds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    needs_a: Sequence[bool],
    add_input_gradients: Callable[..., list[Tensor | None]],
    can_fuse: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """dX = Σ dY W + keep ⊙ (dS A) [T, in], and each dA; x [T, in].

    add_input_gradients: the passes' `input_gradients`, which adds to dX and makes each dA. can_fuse: as in `outputs`.
    """
    of_layers = lora_as, dss, p, seeds, masks, needs_a

    def plain() -> tuple[Tensor, list[Tensor | None]]:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx, add_input_gradients(x, dx, *of_layers)

    def fused() -> tuple[Tensor, list[Tensor | None]]:
        from .triton_kernels import lora_product as kernels

        das: list[Tensor | None] = [None] * len(dys)
        bits = None
        if any(needs_a):
            bits = kernels.room_for_bits(x, p, len(dys))
            das = add_input_gradients(x, None, *of_layers, bits)
        dx = None
        for i, of_layer in enumerate(zip(dys, weights, dss, lora_as, seeds)):
            dx = kernels.input_gradient(dx, *of_layer, p, None if bits is None else bits[i])
        assert dx is not None
        return dx, das

    kind = (*_kind("backward", x, weights, lora_as, p), any(needs_a))
    return _run_chosen({"plain": plain, "fused": fused}, can_fuse, x, kind)


def _kind(direction: str, x: Tensor, weights: Sequence[Tensor], factors: Sequence[Tensor], p: float) -> tuple[Any, ...]:
    """What a choice holds for: numbers of tokens within a power of two, all else exactly."""
    tokens = int(x.numel() // x.shape[-1]).bit_length()  # torch.jit.trace gives tensors
    layers = tuple((weight.shape, factor.shape, factor.dtype) for weight, factor in zip(weights, factors))
    return direction, x.device, x.dtype, tokens, p > 0.0, layers


def _run_chosen(ways: Mapping[str, Callable[[], Any]], can_fuse: bool, x: Tensor, kind: tuple[Any, ...]) -> Any:
    """The result of the way that is forced, or was chosen for this kind of call earlier, or is chosen now."""
    way = named(VARIABLE, WAYS)
    if x.numel() == 0:
        way = "plain"
    elif not can_fuse:
        if way == "fused":
            raise ValueError(
                f"{VARIABLE}=fused cannot serve lora_linear: it goes with Triton's passes, which do not run here"
            )
        way = "plain"
    way = way or _chosen.get(kind)
    if way is None:
        way = _given_way(x.device, kind)
        if way is None and _may_time(x.device):
            with torch.cuda.device(x.device):
                way = _faster(ways)
        if way is not None:
            _chosen[kind] = way
    return ways[way or "plain"]()


def _given_way(device: torch.device, kind: tuple[Any, ...]) -> str | None:
    return _given.get(_gpu(device), {}).get(_in_words(kind)) if _given and device.type == "cuda" else None


@functools.cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _in_words(kind: tuple[Any, ...]) -> str:
    """The kind but for its device, as a key that a person can read.

    "forward bfloat16 512+ tokens 11008x4096+11008x16:float32": for each layer W's shape, B's (A's in a backward) and
    its dtype.
    """
    direction, _, dtype, tokens, drops, layers, *wanted = kind
    words = [direction, _name(dtype), f"{1 << (tokens - 1)}+ tokens", *(["dropout"] if drops else [])]
    for weight, factor, factor_dtype in layers:
        words.append(f"{'x'.join(map(str, weight))}+{'x'.join(map(str, factor))}:{_name(factor_dtype)}")
    return " ".join([*words, *(["dA"] if any(wanted) else [])])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def product_choices() -> Choices:
    """Which product each kind of call takes, as far as it was chosen: {GPU's name: {kind of call: "plain" | "fused"}}.

    It can be written to a JSON file as it is, and includes all that `set_product_choices` was given. Empty where
    nothing was timed: off CUDA devices, under LORAPAR_PRODUCT, and under torch.use_deterministic_algorithms.
    """
    choices = {gpu: dict(ways) for gpu, ways in _given.items()}
    for kind, way in _chosen.items():
        choices.setdefault(_gpu(kind[1]), {})[_in_words(kind)] = way
    return choices


def set_product_choices(choices: Mapping[str, Mapping[str, str]]) -> None:
    """Take these choices (of `product_choices`) for the calls that they name; they replace the process's own.

    A call of another kind, or on a GPU of another name, is timed as ever. In a distributed run every process takes the
    same ones. Raises ValueError, and changes nothing, where `choices` is anything else.
    """
    if not isinstance(choices, Mapping):
        raise ValueError(f"choices must be a dict by GPU, got {type(choices).__name__}")
    for gpu, ways in choices.items():
        if not isinstance(ways, Mapping):
            raise ValueError(f"choices[{gpu!r}] must be a dict of kinds of calls, got {type(ways).__name__}")
    wrong = [way for ways in choices.values() for way in ways.values() if way not in WAYS]
    if wrong:
        raise ValueError(f"a choice must be one of {', '.join(WAYS)}, got {wrong[0]!r}")
    so_far = product_choices()
    for gpu in (*so_far, *choices):
        _given[gpu] = so_far.get(gpu, {}) | dict(choices.get(gpu, {}))
    _chosen.clear()


def _may_time(device: torch.device) -> bool:
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    with torch.cuda.device(device):
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
    """Median seconds that a call of each way takes the current GPU, on its current stream; in turns.

    Replays of a captured graph; or, where a way cannot be captured, calls. The GPU finds a round of them queued, since
    it waits before each for longer than Python takes to queue it: Python, which takes longer than the GPU below some
    thousand tokens, is not timed.
    """
    # Compiles, and takes what memory each needs.
    for call in ways.values():
        call()
    calls = _captured(ways) or ways
    wait = 2.0 * max(_seconds_to_queue(call) for call in calls.values())
    events: dict[str, list[tuple[Any, Any]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in calls.items():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(wait * CYCLES))
            began.record()
            for _ in range(CALLS):
                call()
            ended.record()
            events[way].append((began, ended))
    # The graphs' memory is read and written until here.
    torch.cuda.synchronize()
    return {
        way: statistics.median(began.elapsed_time(ended) for began, ended in pairs) / 1e3 / CALLS
        for way, pairs in events.items()
    }


def _captured(ways: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]] | None:
    """A replay of each way's captured graph; None where one cannot be captured (or its memory is not there).

    The graphs have one memory, from which each takes what its call allocates; torch's allocator takes it back when they
    are gone. Other threads (a loader's, NCCL's) may do what they like meanwhile: "thread_local".
    """
    graphs: dict[str, Any] = {}
    stream, pool = _side_stream(torch.cuda.current_device()), None
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for way, call in ways.items():
                graphs[way] = torch.cuda.CUDAGraph()
                graphs[way].capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    call()
                finally:
                    graphs[way].capture_end()
                pool = graphs[way].pool()
    except RuntimeError:
        return None
    return {way: graph.replay for way, graph in graphs.items()}


@functools.cache
def _side_stream(device: int) -> Any:
    """Where graphs are captured: one a device, since cuBLAS keeps up to 32 MB for each stream that it has worked on."""
    return torch.cuda.Stream(device)


def _seconds_to_queue(call: Callable[[], object]) -> float:
    """Python's time for a round of calls, with the GPU at rest before it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return time.perf_counter() - began


def in_force(device: torch.device, can_fuse: bool) -> str:
    """Which way a `lora_linear` on this device takes, in words; ValueError where LORAPAR_PRODUCT names no way.

    can_fuse: `fused` of the passes that serve there.
    """
    way = named(VARIABLE, WAYS)
    if not can_fuse:
        without = "Triton's passes do not run here"
        return f"fails: {VARIABLE}=fused, and {without}" if way == "fused" else f"plain  (fused: {without})"
    if way is not None:
        return f"{way}  ({VARIABLE})"
    if device.type != "cuda":
        return "plain  (fused: only where forced, off CUDA devices)"
    taken = [way for kind, way in _chosen.items() if kind[1].type == device.type]
    counts = ", ".join(f"{way} {taken.count(way)}" for way in WAYS)
    given = sum(map(len, _given.values()))
    noted = f"; {given} taken over from a run's record" if given else ""
    return f"the faster, timed at the first call of each kind  (so far: {counts}{noted})"
