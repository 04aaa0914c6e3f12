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

The scoring forms, opaque bases and a decoding step (lora_linear.py's FEW_TOKENS) have no such product to choose.
"""

import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import named
from .lora_layer import LoraLayer, as_rows, dense_weight, is_recorded

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


class GroupPlan:
    """All that the layers of one x launch, but for the tensors: made once for each set of shapes, strides and dtypes.

    Python takes longer to work a launch out than to make it, and a training step makes the same ones in every layer.

    Attributes:
        shrink, expand: of the forward.
        forward_kind: what a choice of the product holds for; None: there is none to choose.
        backwards: by what is needed and how the gradients lie, the plans of both passes and the kind of the backward.
    """

    def __init__(self, rows: Tensor, leading: Sequence[int], given: "_Given", p: float, keep_bits: bool):
        kernels = _kernels("lora_forward")
        layers = given.layers
        self.shrink = kernels.plan_shrink(rows, given.lora_as, p, keep_bits)
        parts = [plan.shapes[0] for plan in self.shrink for _ in given.lora_as[plan.here]]
        scalings = [layer.scaling for layer in layers]
        how = kernels.precision(rows)
        self.expand = kernels.plan_expand(
            parts, given.lora_bs, scalings, given.biases, given.bases, rows.dtype, how, leading
        )
        self.has_products = all(layer.weight is not None for layer in layers)
        self.forward_kind = _kind("forward", rows, layers, 0.0) if self.has_products else None
        self.backwards: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...] | None]] = {}

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, R: int, reads_bits: bool, given: "_Given", p: float,
        needs: Sequence[bool],
    ) -> tuple[Any, Any, tuple[Any, ...] | None]:  # fmt: skip
        """The plans of the passes over dY and over x, and the kind of the product."""
        # R: of the group that S was made in, of which not every layer need be here. The precision: of this call.
        key = R, _tf32(x), reads_bits, *needs, *[dy.stride(0) for dy in dys]
        found = self.backwards.get(key)
        if found is None:
            kernels, layers, n = _kernels("lora_backward"), given.layers, len(dys)
            needs_a, needs_b = needs[1 : n + 1], needs[n + 1 :]
            scalings = [layer.scaling for layer in layers]
            mask_as, mask_bs = [layer.mask_a for layer in layers], [layer.mask_b for layer in layers]
            output = kernels.plan_output(dys, given.lora_bs, R, scalings, p, mask_bs, needs_b)
            of_x = x, given.lora_as, R, p, reads_bits, mask_as, needs_a
            kind, passes = None, {"plain": kernels.plan_input(*of_x, needs[0])}
            if needs[0] and self.has_products:
                kind = (*_kind("backward", x, layers, p), any(needs_a))
                passes["fused"] = kernels.plan_input(*of_x, False)
            found = self.backwards[key] = output, passes, kind
        return found


class _Given(NamedTuple):
    """The tensors of a call, as the kernels take them: unit column strides, biases contiguous."""

    layers: Sequence[LoraLayer]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    biases: list[Tensor | None]
    bases: list[Tensor | None]

    @classmethod
    def of(cls, layers: Sequence[LoraLayer]) -> "_Given":
        lora_as, lora_bs, biases, bases = [], [], [], []
        for _, bias, y, a, b, *_ in layers:
            lora_as.append(a if a.stride(1) == 1 else a.contiguous())
            lora_bs.append(b if b.stride(1) == 1 else b.contiguous())
            biases.append(bias if bias is None else bias.contiguous())
            bases.append(y if y is None else as_rows(y))
        return cls(layers, lora_as, lora_bs, biases, bases)


_plans: dict[tuple[Any, ...], GroupPlan] = {}
PLANS = 4096  # kept; then all are made anew


def _tf32(x: Tensor) -> Any:
    """What decides how products of tensors like x are made."""
    return x.element_size() == 4 and torch.backends.cuda.matmul.fp32_precision


def _plan_of(rows: Tensor, leading: torch.Size, given: _Given, p: float, keep_bits: bool) -> GroupPlan:
    key: list[Any] = [leading, rows.shape, rows.stride(0), rows.dtype, rows.device, p, keep_bits, _tf32(rows)]
    for layer, a, b, bias, base in zip(*given):
        weight, _, _, _, _, scaling, mask_a, mask_b, _ = layer
        key += (
            a.shape, a.stride(0), a.dtype, b.shape, b.stride(0), b.dtype, scaling, weight is None,
            mask_a and mask_a.stripes is None, mask_b and mask_b.stripes is None,
        )  # fmt: skip
        if bias is not None:
            key.append(bias.dtype)
        if base is not None:
            key += base.dtype, base.stride(0)
    found = _plans.get(tuple(key))
    if found is None:
        if len(_plans) >= PLANS:
            _plans.clear()
        found = _plans[tuple(key)] = GroupPlan(rows, leading, given, p, keep_bits)
    return found


def forward(
    x: Tensor, layers: Sequence[LoraLayer], p: float, keep_bits: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Any]:
    """Each layer's output [..., out] of x [..., in]; each S [T, R]; if asked for, the dropout masks as bits; and the
    plan, which `backward` takes."""
    kernels = _kernels("lora_forward")
    rows, given = as_rows(x), _Given.of(layers)
    plan = _plan_of(rows, x.shape[:-1], given, p, keep_bits)
    parts, bits = kernels.run_shrink(plan.shrink, rows, given.lora_as, [layer.seed for layer in layers])

    def expand_first() -> tuple[list[Tensor], list[Tensor]]:
        outs, columns = kernels.run_expand(plan.expand, parts, given.lora_bs, given.biases, given.bases, x.dtype)
        for i, (out, layer) in enumerate(zip(outs, layers)):
            weight = layer.weight
            if weight is None:
                continue
            flat = out if out.ndim == 2 else out.view(-1, out.shape[-1])
            if is_recorded():
                outs[i] = torch.addmm(flat, rows, dense_weight(weight, x.dtype).t()).view(out.shape)
            else:
                flat.addmm_(rows, dense_weight(weight, x.dtype).t())
        return outs, columns

    def fused() -> tuple[list[Tensor], list[Tensor]]:
        product = _kernels("lora_product")
        columns = _summed(parts, x.dtype)
        outs = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in given.lora_bs]
        for out, layer, s in zip(outs, layers, columns):
            assert layer.weight is not None
            weight = dense_weight(layer.weight, x.dtype)
            product.output(rows, weight, layer.bias, s, layer.lora_b, layer.scaling, as_rows(out))
        return outs, columns

    if plan.forward_kind is None:
        return *expand_first(), bits, plan
    return *_run_chosen({"plain": expand_first, "fused": fused}, x, plan.forward_kind), bits, plan


def _summed(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each S [T, R] in `dtype` of its parts [n, T, R]; one part is S itself."""
    # Layers that one launch has no room for come in other numbers of parts.
    several = [part for part in parts if part.shape[0] > 1]
    summed = [part.new_empty(part.shape[1:], dtype=dtype) for part in several]
    if several:
        _kernels("lora_backward").reduce(several, summed, [None] * len(several), [1.0] * len(several))
    sums = iter(summed)
    return [part[0] if part.shape[0] == 1 else next(sums) for part in parts]


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    columns: Sequence[Tensor],
    bits: Sequence[Tensor],
    layers: Sequence[LoraLayer],
    p: float,
    needs: Sequence[bool],
    plan: GroupPlan | None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX [T, in] of what is not opaque, each dA and each dB, None where not needed.

    dys [T, out], x [T, in]; columns, bits, and the plan where it is at hand: of `forward`, for these layers; needs: of
    x, of each A, of each B.
    """
    kernels, n, given = _kernels("lora_backward"), len(layers), _Given.of(layers)
    plan = _plan_of(x, x.shape[:1], given, p, len(bits) > 0) if plan is None else plan
    output, passes, kind = plan.backward(dys, x, columns[0].shape[1], len(bits) > 0, given, p, needs)
    dss, dbs = kernels.run_output(output, dys, given.lora_bs, columns, [layer.mask_b for layer in layers])
    seeds, mask_as = [layer.seed for layer in layers], [layer.mask_a for layer in layers]
    of_x = x, given.lora_as, dss, seeds, bits, mask_as, needs[1 : n + 1]

    def expand_first() -> tuple[Tensor | None, list[Tensor | None]]:
        dx, das = kernels.run_input(passes["plain"], *of_x, needs[0])
        if dx is not None:
            for dy, layer in zip(dys, layers):
                if layer.weight is not None:
                    dx.addmm_(dy, dense_weight(layer.weight, dy.dtype))
        return dx, das

    def fused() -> tuple[Tensor | None, list[Tensor | None]]:
        product = _kernels("lora_product")
        _, das = kernels.run_input(passes["fused"], *of_x, False)
        dx = None
        for i, (dy, layer) in enumerate(zip(dys, layers)):
            assert layer.weight is not None
            weight = dense_weight(layer.weight, dy.dtype)
            kept = bits[i] if bits else None
            dx = product.input_gradient(dx, dy, weight, dss[i], layer.lora_a, layer.seed, p, kept)
        return dx, das

    if kind is None:
        return *expand_first(), dbs
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
