"""The LoRA layers of one x by Triton's kernels, around the frozen products: two ways, and which of them a call takes.

    plain   expand first: one kernel writes s · S Bᵀ + bias, and torch's product adds x Wᵀ to it (beta = 1, a read that
            hides under the product); dX likewise begins as Σ keep ⊙ (dS A), written by dA's pass
    fused   one product that carries the expand in its accumulator (triton_kernels/lora_product.py)

Both compute the same sums; fused rounds once less. plain is the safe default, since whether our own product is fast
enough beside cuBLAS's depends on the GPU and on the shape. So on
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
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import named
from .lora_layer import LoraLayer, as_rows, dense_weight

VARIABLE, WAYS = "LORAPAR_PRODUCT", ("plain", "fused")
# Rounds of timing, and calls a round; the share of plain's time below which fused is taken: less than that is noise.
ROUNDS, CALLS, MARGIN = 5, 4, 0.98
# More clock cycles a second than any GPU has, so that a wait is at least as long as asked.
CYCLES = 3e9
Choices = dict[str, dict[str, str]]
# Of this process, by kind of call; and those it was given, by the GPU's name and the kind in words.
_chosen: dict[tuple[Any, ...], str] = {}
_given: Choices = {}


@functools.cache
def _kernels(name: str) -> Any:
    """A module of Triton's kernels, imported at the first call; an import inside a function takes 1.2 µs a call."""
    return importlib.import_module(f".triton_kernels.{name}", __package__)


def forward(
    x: Tensor, layers: Sequence[LoraLayer], p: float, keep_bits: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each layer's output [..., out] of x [..., in]; each S [T, R] and, if asked for, the dropout masks as bits."""
    kernels = _kernels("lora_forward")
    rows, lora_bs = as_rows(x), [layer.lora_b for layer in layers]
    parts, bits = kernels.shrink(
        rows, [layer.lora_a for layer in layers], p, [layer.seed for layer in layers], keep_bits
    )

    def expand_first() -> tuple[list[Tensor], list[Tensor]]:
        outs, columns = kernels.expand(
            parts,
            lora_bs,
            [layer.scaling for layer in layers],
            [layer.bias for layer in layers],
            [None if layer.y is None else as_rows(layer.y) for layer in layers],
            x.dtype,
            x.shape[:-1],
        )
        for out, layer in zip(outs, layers):
            if layer.weight is not None:
                as_rows(out).addmm_(rows, dense_weight(layer.weight, x.dtype).t())
        return outs, columns

    def fused() -> tuple[list[Tensor], list[Tensor]]:
        product = _kernels("lora_product")
        columns = _summed(parts, x.dtype)
        outs = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_bs]
        for out, layer, s in zip(outs, layers, columns):
            assert layer.weight is not None
            weight = dense_weight(layer.weight, x.dtype)
            product.output(rows, weight, layer.bias, s, layer.lora_b, layer.scaling, as_rows(out))
        return outs, columns

    if not _has_products(layers):
        return *expand_first(), bits
    ways = {"plain": expand_first, "fused": fused}
    return *_run_chosen(ways, x, _kind("forward", x, layers, 0.0)), bits


def _summed(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each S [T, R] in `dtype` of its parts [n, T, R]."""
    if parts[0].shape[0] == 1:
        return [part[0] for part in parts]
    columns = [part.new_empty(part.shape[1:], dtype=dtype) for part in parts]
    _kernels("lora_backward").reduce(parts, columns, [None] * len(parts), [1.0] * len(parts))
    return columns


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    columns: Sequence[Tensor],
    bits: Sequence[Tensor],
    layers: Sequence[LoraLayer],
    p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX [T, in] of what is not opaque, each dA and each dB, None where not needed.

    dys [T, out], x [T, in], columns and bits of `forward`; needs: of x, of each A, of each B.
    """
    kernels, n = _kernels("lora_backward"), len(layers)
    needs_x, needs_a, needs_b = needs[0], list(needs[1 : n + 1]), list(needs[n + 1 :])
    lora_as, seeds = [layer.lora_a for layer in layers], [layer.seed for layer in layers]
    dss, dbs = kernels.output_gradients(
        dys,
        [layer.lora_b for layer in layers],
        columns,
        [layer.scaling for layer in layers],
        p,
        [layer.mask_b for layer in layers],
        needs_b,
    )
    of_x = x, lora_as, dss, p, seeds, bits, [layer.mask_a for layer in layers], needs_a

    def expand_first() -> tuple[Tensor | None, list[Tensor | None]]:
        dx, das = kernels.input_gradients(*of_x, needs_x)
        if dx is not None:
            for dy, layer in zip(dys, layers):
                if layer.weight is not None:
                    dx.addmm_(dy, dense_weight(layer.weight, dy.dtype))
        return dx, das

    def fused() -> tuple[Tensor | None, list[Tensor | None]]:
        product = _kernels("lora_product")
        _, das = kernels.input_gradients(*of_x, False)
        dx = None
        for i, (dy, layer) in enumerate(zip(dys, layers)):
            assert layer.weight is not None
            weight = dense_weight(layer.weight, dy.dtype)
            kept = bits[i] if bits else None
            dx = product.input_gradient(dx, dy, weight, dss[i], layer.lora_a, layer.seed, p, kept)
        return dx, das

    if not (needs_x and _has_products(layers)):
        return *expand_first(), dbs
    kind = (*_kind("backward", x, layers, p), any(needs_a))
    dx, das = _run_chosen({"plain": expand_first, "fused": fused}, x, kind)
    return dx, das, dbs


def shrink_fake(x: Tensor, lora_a: Tensor) -> Tensor:
    """A tensor as each S of `forward` is, without values; x [T, in]."""
    return x.new_empty((x.shape[0], _kernels("lora_forward").padded_rank([lora_a])))


def _has_products(layers: Sequence[LoraLayer]) -> bool:
    return all(layer.weight is not None for layer in layers)


def refuse_fused(layers: Sequence[LoraLayer]) -> None:
    """ValueError where LORAPAR_PRODUCT=fused forces what only goes with Triton's passes, and others serve."""
    if named(VARIABLE, WAYS) == "fused" and _has_products(layers):
        raise ValueError(
            f"{VARIABLE}=fused cannot serve lora_linear: it goes with Triton's passes, which do not run here"
        )


def _kind(direction: str, x: Tensor, layers: Sequence[LoraLayer], p: float) -> tuple[Any, ...]:
    """What a choice holds for: numbers of tokens within a power of two, all else exactly."""
    tokens = int(x.numel() // x.shape[-1]).bit_length()  # torch.jit.trace gives tensors
    forward = direction == "forward"
    of_layers = []
    for layer in layers:
        factor = layer.lora_b if forward else layer.lora_a
        assert layer.weight is not None
        of_layers.append((layer.weight.shape, factor.shape, factor.dtype))
    return direction, x.device, x.dtype, tokens, p > 0.0, tuple(of_layers)


def _run_chosen(ways: Mapping[str, Callable[[], Any]], x: Tensor, kind: tuple[Any, ...]) -> Any:
    """The result of the way that is forced, or was chosen for this kind of call earlier, or is chosen now."""
    way = named(VARIABLE, WAYS) or _chosen.get(kind)
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
