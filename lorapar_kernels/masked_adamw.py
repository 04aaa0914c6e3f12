"""AdamW over the active elements of each parameter: the others have no state and are never written.

For the active elements, step t, g the gradient (times grad_scale; −g to maximise), as torch.optim.AdamW:

    φ ← φ − lr · weight_decay · φ
    m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
    φ ← φ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

Shapes: params, grads and masks as the parameter; m and v are 1-D, one entry an active element, in flat
row-major order: 8 bytes an active element, none for the rest. They are fp32 (fp64 beside an fp64 parameter)
and so is the arithmetic; a bf16 or fp16 parameter is rounded once, when it is written: to nearest, at random
without bias (bf16), or to nearest with what is left out carried to the next step (`compensations`).

8-bit moments (int8 m, uint8 v, with fp32 `scales` [2, tiles], a tile being 512 elements of the parameter): a code c
stands for ±(c / 127)² and (c / 255)⁴ of the largest in its tile. Linear codes would send most of v to zero, and the
step with it to infinity (Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022, use a table for
the same end); powers need no table and give the same bits on every device. Codes are rounded at random without bias,
as an average that moves by a thousandth a step would never leave one; v above 0 never gets a code below 2, so that
its root is no smaller than the least m.

In a CUDA graph the step's number, and the rate where it changes, are tensors: each replay reads them from the device's
memory. There β₁ᵗ and β₂ᵗ are products in double (by squaring); a step's constants are within a unit in the last place
of fp32 of those that a step of the same number as an int has.

The random bits are a hash of (seed, step, tensor's place in the list, element): csrc's library on the CPU or on CUDA
and the reference below give one another's results, to the bit in fp32 and below.

Departure from the paper's script, which zeroes the gradients of frozen elements and lets AdamW decay them:
here frozen means untouched, bit for bit.
"""

import ctypes
import math
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .backend import choose, no_obstacle
from .bitmask import TILE, MaskIndex, index_mask, unpack_mask

# LORAPAR_FLOAT32, LORAPAR_BFLOAT16, LORAPAR_FLOAT16.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STEP_TYPES = {torch.int64: 0, torch.float32: 1}
GRAD, FIELDS = 1, 10  # of lorapar_adamw_tensor: its gradient's place, and how many fields of eight bytes it has
LOW32, LOW64 = (1 << 32) - 1, (1 << 64) - 1
# The powers that the largest codes of the 8-bit moments stand for.
SCALE_1, SCALE_2 = 127.0**2, 255.0**4


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of both moments, and of the arithmetic, for a parameter of this dtype."""
    return torch.promote_types(dtype, torch.float32)


class Settings(NamedTuple):
    """What all tensors of a step share."""

    step: int | Tensor
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    stochastic: bool
    seed: int


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & LOW64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & LOW64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & LOW64
    return x ^ x >> 31


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, in int64: the products wrap, and their low words are right all the same."""
    x = (x ^ x >> 16) * 0x7FEB352D & LOW32
    x = (x ^ x >> 15) * 0x846CA68B & LOW32
    return x ^ x >> 16


def random_bits(seed: int, step: int, tensor: int, element: Tensor, stream: int) -> Tensor:
    """32 random bits (int64) for each element's number; stream 0 is the parameter's, 1 both moments'."""
    key = _splitmix64((_splitmix64((seed + step) & LOW64) + tensor) & LOW64)
    first = _mixed(element & LOW32 ^ (key & LOW32))
    return _mixed(first ^ (key >> 32) ^ _mixed(2 * (element >> 32) + stream & LOW32))


def _to_bfloat16_at_random(values: Tensor, random: Tensor) -> Tensor:
    bits = values.view(torch.int32).to(torch.int64) + (random & 0xFFFF)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def decode_moments(codes_1: Tensor, codes_2: Tensor, scales: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """The moments in fp32 that 8-bit codes stand for; `tile` is each active element's."""
    c, square = codes_1.float(), codes_2.float().square()
    return c * c.abs() * (scales[0, tile] / SCALE_1), square * square * (scales[1, tile] / SCALE_2)


def _sqrt(values: Tensor) -> Tensor:
    """The nearest root, as csrc's: torch's own fp32 roots on a CPU (MKL's) are a unit off in one of six."""
    return values.double().sqrt().to(values.dtype)


def _encode(values: Tensor, power: int, scale: float, tile: Tensor, largest: Tensor, random: Tensor) -> Tensor:
    """Codes of non-negative values, rounded up or down with `random` (16 bits); `largest` is written."""
    largest.zero_().scatter_reduce_(0, tile, values, "amax")
    of = largest[tile]
    target = values / of * scale
    low = (_sqrt(target) if power == 2 else _sqrt(_sqrt(target))).floor()
    if power == 2:
        share = (target - low * low) / (2.0 * low + 1.0)
    else:
        low_2, high_2 = low * low, (low + 1.0) * (low + 1.0)
        share = (target - low_2 * low_2) / (high_2 * high_2 - low_2 * low_2)
    codes = low + (random < share * 65536.0)
    # Tiles of zeros only, and with an infinity or NaN, decode to zeros and to NaN whatever the codes.
    return torch.where((of > 0.0) & of.isfinite(), codes, 1.0)


def encode_moments(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor, tile: Tensor, random: Tensor):
    """The reverse of `decode_moments`: returns int8 and uint8 codes, writes `scales`."""
    one = _encode(exp_avg.abs(), 2, SCALE_1, tile, scales[0], random & 0xFFFF).clamp_(max=127.0)
    two = _encode(exp_avg_sq, 4, SCALE_2, tile, scales[1], random >> 16)
    valid = (scales[1, tile] > 0.0) & scales[1, tile].isfinite() & (exp_avg_sq > 0.0)
    two = torch.where(valid, two.clamp(2.0, 255.0), two)
    valid = (scales[0, tile] > 0.0) & scales[0, tile].isfinite()
    return torch.where(valid & (exp_avg < 0.0), -one, one).to(torch.int8), two.to(torch.uint8)


def masked_adamw_reference(
    param: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None,
    compensation: Tensor | None,
    grad_scale: Tensor | None,
    settings: Settings,
    number: int,
) -> None:
    """The specification, to the bit: one parameter's step, in place; `number` is its place in the list.

    Gathers, computes and scatters, so it moves more bytes than the fused step. Each line is one operation of csrc's.
    """
    beta1, beta2 = settings.betas
    # Row-major positions, whatever the strides of the three.
    active = mask.reshape(-1).nonzero().squeeze(1)
    step, lr = int(settings.step), float(settings.lr)
    dtype = state_dtype(param.dtype)
    phi, gradient = param.take(active).to(dtype), grad.take(active).to(dtype)
    if compensation is not None:
        phi += compensation
    factor = -1.0 if settings.maximize else 1.0
    gradient = gradient * (factor if grad_scale is None else grad_scale * factor)
    random = partial(random_bits, settings.seed, step, number, active)
    m, v = (exp_avg, exp_avg_sq) if scales is None else decode_moments(exp_avg, exp_avg_sq, scales, active // TILE)
    # torch.lerp's two forms, so that a weight of 1 gives the gradient itself.
    difference, weight = gradient - m, torch.tensor(1.0 - beta1, dtype=dtype)
    m = m + weight * difference if weight < 0.5 else gradient - difference * (1.0 - weight)
    v = v * beta2 + gradient * (1.0 - beta2) * gradient
    root = _sqrt(v) * (1.0 / math.sqrt(1.0 - beta2**step)) + settings.eps
    phi = phi * (1.0 - lr * settings.weight_decay) + m / root * (-lr / (1.0 - beta1**step))
    if scales is not None:
        m, v = encode_moments(m, v, scales, active // TILE, random(1))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    rounded = _to_bfloat16_at_random(phi, random(0)) if settings.stochastic else phi.to(param.dtype)
    if compensation is not None:
        compensation.copy_(phi - rounded)
    # Both write the active elements and no others; the first is twice as fast.
    if param.is_contiguous():
        param.view(-1).index_copy_(0, active, rounded)
    else:
        param.index_put_(mask.nonzero(as_tuple=True), rounded)


class _Group:
    """Tensors of one dtype and device; an empty list stands for none."""

    def __init__(self, params, words, befores, exp_avgs, exp_avg_sqs, scales, compensations):
        self.params, self.words, self.befores, self.exp_avgs, self.exp_avg_sqs = (
            params, words, befores, exp_avgs, exp_avg_sqs)  # fmt: skip
        self.scales, self.compensations = scales, compensations
        self.table: array | None = None

    def written(self) -> tuple[Sequence[Tensor], ...]:
        return self.params, self.exp_avgs, self.exp_avg_sqs, self.scales, self.compensations

    def step(self, grads: Sequence[Tensor], grad_scale: Tensor | None, settings: Settings, skip: bool) -> Tensor:
        """One step, in place. Gives int32 [1]: 1 where it was skipped."""

        def native_obstacle() -> str | None:
            """Why csrc cannot step these tensors; None when it can."""
            if not self.params:
                return None
            for dtype in (self.params[0].dtype, grads[0].dtype):
                if dtype not in TYPES:
                    return f"csrc steps {', '.join(map(str, TYPES))}, got {dtype}"
            # The table is made once: another storage brings a new group.
            if self.table is None and not all(map(Tensor.is_contiguous, chain(*self.written()))):
                return "csrc steps contiguous parameters and moments, one is not"
            return native.obstacle(self.params[0].device)

        chosen = choose("masked_adamw", {"native": native_obstacle, "reference": no_obstacle})
        run = self._step_native if chosen == "native" else self._step_reference
        return run(grads, grad_scale, settings, skip)

    def _step_reference(self, grads, grad_scale, settings: Settings, skip: bool) -> Tensor:
        params = self.params
        masks = [unpack_mask(word, param.shape) for word, param in zip(self.words, params)]
        skipped = torch.zeros(1, dtype=torch.int32, device=params[0].device)
        if skip:
            factor = 1.0 if grad_scale is None else grad_scale
            scaled = (grad[mask].to(state_dtype(grad.dtype)) * factor for grad, mask in zip(grads, masks))
            if not all(bool(one.isfinite().all()) for one in scaled):
                return skipped.fill_(1)
        for i, (param, grad, mask) in enumerate(zip(params, grads, masks)):
            scale, compensation = (column[i] if column else None for column in (self.scales, self.compensations))
            masked_adamw_reference(
                param, grad, mask, self.exp_avgs[i], self.exp_avg_sqs[i], scale, compensation, grad_scale, settings, i
            )
        return skipped

    def _step_native(self, grads, grad_scale, settings: Settings, skip: bool) -> Tensor:
        """By csrc: all tensors in one call."""
        device, count = self.params[0].device, len(self.params)
        if self.table is None:
            # All but the gradients stays from step to step. A field of all tensors at once: a tensor at a time takes
            # five times as long.
            self.table = array("q", bytes(8 * FIELDS * count))
            columns = (self.params, (), self.words, self.befores, *self.written()[1:])
            addresses = [map(Tensor.data_ptr, column) for column in columns]
            for i, values in enumerate((*addresses, map(Tensor.numel, self.params), map(Tensor.numel, self.exp_avgs))):
                self.table[i::FIELDS] = array("q", values) or array("q", bytes(8 * count))
        grads = list(map(Tensor.contiguous, grads))
        self.table[GRAD::FIELDS] = array("q", map(Tensor.data_ptr, grads))
        skipped = torch.zeros(1, dtype=torch.int32, device=device)
        step, step_at, lr, lr_at = settings.step, None, settings.lr, None
        if isinstance(step, Tensor):
            step, step_at, step_type = 1, step.data_ptr(), STEP_TYPES[step.dtype]
        else:
            step_type = 0
        if isinstance(lr, Tensor):
            lr, lr_at = 0.0, lr.data_ptr()
        c_settings = native.AdamWSettings(
            lr, *settings.betas, settings.eps, settings.weight_decay, step, settings.seed,
            settings.maximize, settings.stochastic, TYPES[self.params[0].dtype], TYPES[grads[0].dtype],
            None if grad_scale is None else grad_scale.data_ptr(), skipped.data_ptr() if skip else None,
            step_at, lr_at, step_type,
        )  # fmt: skip
        rows = (native.AdamWTensor * count).from_buffer(self.table)
        native.call("masked_adamw", device, rows, count, ctypes.byref(c_settings))
        return skipped


torch.library.define(
    "lorapar::masked_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor[] words, Tensor[] befores, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] scales, Tensor(e!)[] compensations, Tensor? grad_scale, "
    "Tensor? step_at, Tensor? lr_at, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, bool stochastic, int seed, bool skip_nonfinite) -> Tensor",
)


def _masked_adamw(params, grads, words, befores, exp_avgs, exp_avg_sqs, scales, compensations, grad_scale, step_at,
                  lr_at, step, lr, beta1, beta2, eps, weight_decay, maximize, stochastic, seed,
                  skip_nonfinite) -> Tensor:  # fmt: skip
    group = _Group(params, words, befores, exp_avgs, exp_avg_sqs, scales, compensations)
    step, lr = step if step_at is None else step_at, lr if lr_at is None else lr_at
    settings = Settings(step, lr, (beta1, beta2), eps, weight_decay, maximize, stochastic, seed)
    return group.step(grads, grad_scale, settings, skip_nonfinite)


torch.library.impl("lorapar::masked_adamw", ("cpu", "cuda"), _masked_adamw)


@torch.library.register_fake("lorapar::masked_adamw")
def _masked_adamw_fake(params, *others) -> Tensor:
    return params[0].new_empty(1, dtype=torch.int32)


def _check_shapes(name: str, of: str, tensors: Sequence[Tensor] | Sequence[MaskIndex], shapes: list) -> None:
    got = [tensor.shape for tensor in tensors]
    if got != shapes:
        i = next(i for i, shape in enumerate(shapes) if got[i] != shape)
        raise ValueError(f"{name}[{i}] must be {list(shapes[i])}, {of}, got {list(got[i])}")


def _check_kind(i: int, dtypes: dict[str, torch.dtype], devices: dict[str, torch.device]) -> None:
    """ValueError where tensors of these dtypes and devices make no step; `i` is the first place they are at."""
    param, eight = dtypes["params"], dtypes["exp_avgs"] == torch.int8
    if not param.is_floating_point:
        raise ValueError(f"params[{i}] must be of a floating-point dtype, got {param}")
    if ("scales" in dtypes) != eight:
        raise ValueError(
            f"scales must be given for 8-bit moments and for no others, exp_avgs[{i}] is {dtypes['exp_avgs']}"
        )
    if "compensations" in dtypes and param not in (torch.bfloat16, torch.float16):
        raise ValueError(f"compensations are for bf16 and fp16 parameters, params[{i}] is {param}")
    moments = (torch.int8, torch.uint8) if eight else (state_dtype(param),) * 2
    expected = dict(zip(("exp_avgs", "exp_avg_sqs"), moments)) | {"scales": torch.float32, "compensations": param}
    for name, dtype in expected.items():
        if dtypes.get(name, dtype) != dtype:
            raise ValueError(f"{name}[{i}] must be {dtype} beside {param} parameters, got {dtypes[name]}")
    for name, device in devices.items():
        if device != devices["params"]:
            raise ValueError(f"{name}[{i}] must be on its parameter's device {devices['params']}, got {device}")


def _indexed(i: int, mask: Tensor | MaskIndex, shape: torch.Size) -> MaskIndex:
    if isinstance(mask, MaskIndex):
        return mask
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"masks[{i}] must be torch.bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    return index_mask(mask)


class PreparedAdamW:
    """Parameters, masks and state of `masked_adamw`, checked and laid out once for any number of steps.

    A step of a 7B's 384 tensors spends 4 ms on their checks and 12 on their elements; this leaves 1 of the 4. The
    arguments are `masked_adamw`'s, and so are the errors. The tensors are held, not copied: moments, scales and
    compensations must stay where they are, and where a parameter has got another storage all are checked again.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        masks: Sequence[Tensor | MaskIndex],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        *,
        scales: Sequence[Tensor] | None = None,
        compensations: Sequence[Tensor] | None = None,
    ):
        self._columns: dict[str, Sequence] = {
            "params": params, "masks": masks, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}  # fmt: skip
        optional = {"scales": scales, "compensations": compensations}
        self._columns |= {name: column for name, column in optional.items() if column is not None}
        for name, column in self._columns.items():
            if len(column) != len(params):
                raise ValueError(f"{name} must hold {len(params)} tensors, one a parameter, got {len(column)}")
        self._columns["masks"] = [_indexed(i, mask, params[i].shape) for i, mask in enumerate(masks)]
        self._prepare()

    def _prepare(self) -> None:
        columns, masks = self._columns, self._columns["masks"]
        shapes, active = [param.shape for param in columns["params"]], [(mask.active,) for mask in masks]
        _check_shapes("masks", "as its parameter", masks, shapes)
        for name in {"exp_avgs", "exp_avg_sqs", "compensations"} & columns.keys():
            _check_shapes(name, "one entry an active element", columns[name], active)
        if "scales" in columns:
            tiles = [(2, -(-shape.numel() // TILE)) for shape in shapes]
            _check_shapes("scales", "an entry a tile for each moment", columns["scales"], tiles)
        words, befores = [mask.words for mask in masks], [mask.before for mask in masks]
        tensors = columns | {"masks": words}
        kinds = list(zip(
            zip(*([tensor.dtype for tensor in column] for column in tensors.values())),
            zip(*([tensor.device for tensor in column] for column in tensors.values())),
        ))  # fmt: skip
        self._groups: list[tuple[list[int], _Group]] = []
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, one in enumerate(kinds) if one == kind]
            _check_kind(chosen[0], *(dict(zip(tensors, facts)) for facts in kind))
            names = ("exp_avgs", "exp_avg_sqs", "scales", "compensations")
            lists = (columns["params"], words, befores, *(columns.get(name, ()) for name in names))
            group = _Group(*([column[i] for i in chosen] if column else [] for column in lists))
            self._groups.append((chosen, group))
        self._shapes, self._places = shapes, self._where()

    def _where(self) -> array:
        return array("q", map(Tensor.data_ptr, self._columns["params"]))

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Tensor],
        step: int | Tensor,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        skip_nonfinite: bool = False,
        stochastic: bool = False,
        seed: int = 0,
    ) -> bool | Tensor:
        """One step, in place: `masked_adamw` says what its arguments and its answer are."""
        _check_settings(step, lr, betas, eps, weight_decay, seed, grad_scale)
        if len(grads) != len(self._shapes):
            raise ValueError(f"grads must hold {len(self._shapes)} tensors, one a parameter, got {len(grads)}")
        compiling = torch.compiler.is_compiling()
        if not compiling and self._where() != self._places:
            self._prepare()
        if any(grad is None for grad in grads):
            raise ValueError(f"grads[{list(map(type, grads)).index(type(None))}] must be a tensor, got None")
        # No list of shapes is made: hundreds of new objects a step would have Python look for garbage each time.
        if not all(grad.shape == shape for grad, shape in zip(grads, self._shapes)):
            _check_shapes("grads", "as its parameter", grads, self._shapes)
        if skip_nonfinite and len(self._groups) > 1:
            raise ValueError(
                f"skip_nonfinite must be False for parameters of several dtypes or devices, got {len(self._groups)}"
            )
        if stochastic and any(group.params[0].dtype != torch.bfloat16 for _, group in self._groups):
            raise ValueError("stochastic must be False but for bf16 parameters")
        if stochastic and "compensations" in self._columns:
            raise ValueError("stochastic must be False with compensations")
        ours = [[grads[i] for i in chosen] for chosen, _ in self._groups]
        for (chosen, group), theirs in zip(self._groups, ours):
            _check_grads(chosen, theirs, group.params[0].device)
            for name, value in (("step", step), ("lr", lr), ("grad_scale", grad_scale)):
                if isinstance(value, Tensor) and value.device != group.params[0].device:
                    raise ValueError(f"{name} must be on the parameters' device, got {value.device} beside "
                                     f"{group.params[0].device} at {chosen[0]}")  # fmt: skip
        settings = Settings(step, lr, betas, eps, weight_decay, maximize, stochastic, seed)
        skipped = []
        for (_, group), theirs in zip(self._groups, ours):
            if compiling:
                columns = (group.params, theirs, group.words, group.befores, *group.written()[1:])
                # A number that goes unread where a tensor is.
                read = [value if isinstance(value, Tensor) else None for value in (step, lr)]
                given = [1 if isinstance(step, Tensor) else step, 1.0 if isinstance(lr, Tensor) else lr]
                hyper = (*betas, eps, weight_decay, maximize, stochastic, seed, skip_nonfinite)
                skipped.append(torch.ops.lorapar.masked_adamw(*columns, grad_scale, *read, *given, *hyper))
            else:
                # The op takes 3 ms to hand over the tensors of a 7B.
                skipped.append(group.step(theirs, grad_scale, settings, skip_nonfinite))
        if skip_nonfinite and isinstance(step, Tensor):
            return (skipped[0] == 0).view(step.shape) if skipped else True
        return not (skip_nonfinite and any(int(one) for one in skipped))


def _check_grads(places: list[int], grads: Sequence[Tensor], device: torch.device) -> None:
    """Of parameters of one dtype and device, which csrc steps in one call."""
    dtype = grads[0].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"grads[{places[0]}] must be of a floating-point dtype, got {dtype}")
    if not all(grad.dtype == dtype for grad in grads):
        i, other = next((i, grad.dtype) for i, grad in zip(places, grads) if grad.dtype != dtype)
        raise ValueError(f"grads must be of one dtype, got {dtype} at {places[0]} and {other} at {i}")
    if not all(grad.device == device for grad in grads):
        i, other = next((i, grad.device) for i, grad in zip(places, grads) if grad.device != device)
        raise ValueError(f"grads[{i}] must be on its parameter's device {device}, got {other}")


def _check_tensor(name: str, tensor: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    if tensor.numel() != 1 or tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one {allowed} element, got {tensor.numel()} of {tensor.dtype}")


def _readable(tensor: Tensor) -> bool:
    """Whether a look at it waits for no device, and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_settings(step, lr, betas, eps, weight_decay, seed, grad_scale: Tensor | None) -> None:
    if isinstance(step, Tensor):
        _check_tensor("step", step, STEP_TYPES)
        value = step.item() if _readable(step) else 1
        if not (value >= 1 and value % 1 == 0):
            raise ValueError(f"step must hold a whole number of at least 1, got {value}")
    elif not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an int of at least 1, got {step!r}")
    else:
        value = step
    if value >= 1 << 63:
        raise ValueError(f"step must be below 2⁶³, got {value}")
    if isinstance(lr, Tensor):
        _check_tensor("lr", lr, (torch.float32,))
        lr = lr.item() if _readable(lr) else 0.0
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"betas must be two floats, got {betas!r}")
    rates = ("lr", lr), ("eps", eps), ("weight_decay", weight_decay)
    for name, value in (("betas", betas[0]), ("betas", betas[1]), *rates):
        if not isinstance(value, (int, float, Real)):
            raise ValueError(f"{name} must be a float, got {type(value).__name__}")
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    for name, value in rates:
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an int in [0, 2⁶³), got {seed}")
    if grad_scale is None:
        return
    if not isinstance(grad_scale, Tensor):
        raise ValueError(f"grad_scale must be a tensor, got {type(grad_scale).__name__}")
    _check_tensor("grad_scale", grad_scale, (torch.float32,))


def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | MaskIndex],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    skip_nonfinite: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    scales: Sequence[Tensor] | None = None,
    compensations: Sequence[Tensor] | None = None,
) -> bool | Tensor:
    """One AdamW step on the active elements of every parameter, in place on params and their state.

    Args:
        params, grads, masks: lists of one length; grads[i] and masks[i] (bool, or what `index_mask` made of
            it, which saves packing it at every step) of params[i]'s shape.
        exp_avgs, exp_avg_sqs: 1-D, masks[i].sum() entries each, fp32 (fp64 for an fp64 parameter), or int8 and uint8
            with scales; zeros at first.
        step: the number of this step, from 1 on; or a tensor that holds it, one int64 or fp32 element on the
            parameters' device. It is read when the step runs, and only read: the caller adds 1 before each step.
        lr: the rate, or a tensor of one fp32 element on the parameters' device.
        grad_scale: one fp32 element on the parameters' device that multiplies every gradient (the clipping factor,
            the inverse of a loss scale, or their product), or None. A tensor, so that nothing waits for the device.
        skip_nonfinite: where the scaled gradient of an active element, of any tensor, is not finite, change nothing.
        stochastic: round bf16 parameters at random, without bias. seed: of these bits, and of those that round 8-bit
            moments; from 0 up to 2⁶³.
        scales: fp32 [2, ceil(n / 512)] each, zeros at first, where moments are 8-bit.
        compensations: of the parameter's dtype (bf16, fp16), as long as its moments, zeros at first: what rounding
            leaves out, carried to the next step.

    Returns True, or False where the step was skipped (on CUDA the answer waits for the device, so only where asked).
    With skip_nonfinite and a tensor for `step` nothing waits: the answer is a bool tensor of `step`'s shape.

    To replay it in a CUDA graph, give `step` as a tensor, and lr too where it changes: with csrc's library nothing is
    read on the host and nothing waits. Gradients and the rest must stay where they were when the graph was captured;
    other arguments are the captured ones at each replay. A tensor whose value cannot be a step's or a rate's raises
    ValueError on a CPU; on CUDA, where that is not known without waiting, such a step changes nothing.

    An element outside its mask is not written, whatever it, its gradient or the decay are. Raises ValueError
    naming the argument; all are checked before anything is written.
    To step the same tensors again and again, `PreparedAdamW` checks them once.
    """
    prepared = PreparedAdamW(params, masks, exp_avgs, exp_avg_sqs, scales=scales, compensations=compensations)
    return prepared.step(
        grads, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, grad_scale=grad_scale,
        skip_nonfinite=skip_nonfinite, stochastic=stochastic, seed=seed,
    )  # fmt: skip
