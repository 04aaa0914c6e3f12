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

The random bits are a hash of (seed, step, tensor's place in the list, element): csrc's library on the CPU or on CUDA
and the reference below give one another's results, to the bit in fp32 and below.

Departure from the paper's script, which zeroes the gradients of frozen elements and lets AdamW decay them:
here frozen means untouched, bit for bit.
"""

import ctypes
import math
import operator
from array import array
from collections.abc import Sequence
from itertools import chain, repeat

import torch
from torch import Tensor

from . import native
from .adamw_reference import Settings, masked_adamw_reference, state_dtype
from .backend import choose, no_obstacle
from .bitmask import TILE, MaskIndex, index_mask, unpack_mask

# LORAPAR_FLOAT32, LORAPAR_BFLOAT16, LORAPAR_FLOAT16.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHAPE, DTYPE, DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))
GRAD, FIELDS = 1, 10  # of lorapar_adamw_tensor: its gradient's place, and how many fields of eight bytes it has


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
        c_settings = native.AdamWSettings(
            settings.lr, *settings.betas, settings.eps, settings.weight_decay, settings.step, settings.seed,
            settings.maximize, settings.stochastic, TYPES[self.params[0].dtype], TYPES[grads[0].dtype],
            None if grad_scale is None else grad_scale.data_ptr(), skipped.data_ptr() if skip else None,
        )  # fmt: skip
        rows = (native.AdamWTensor * count).from_buffer(self.table)
        native.call("masked_adamw", device, rows, count, ctypes.byref(c_settings))
        return skipped


torch.library.define(
    "lorapar::masked_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor[] words, Tensor[] befores, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] scales, Tensor(e!)[] compensations, Tensor? grad_scale, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, bool stochastic, int seed, "
    "bool skip_nonfinite) -> Tensor",
)


def _masked_adamw(params, grads, words, befores, exp_avgs, exp_avg_sqs, scales, compensations, grad_scale, step, lr,
                  beta1, beta2, eps, weight_decay, maximize, stochastic, seed, skip_nonfinite) -> Tensor:  # fmt: skip
    group = _Group(params, words, befores, exp_avgs, exp_avg_sqs, scales, compensations)
    settings = Settings(step, lr, (beta1, beta2), eps, weight_decay, maximize, stochastic, seed)
    return group.step(grads, grad_scale, settings, skip_nonfinite)


torch.library.impl("lorapar::masked_adamw", ("cpu", "cuda"), _masked_adamw)


@torch.library.register_fake("lorapar::masked_adamw")
def _(params, *others) -> Tensor:
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
        step: int,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        skip_nonfinite: bool = False,
        stochastic: bool = False,
        seed: int = 0,
    ) -> bool:
        """One step, in place: `masked_adamw` says what its arguments and its answer are."""
        _check_settings(step, lr, betas, eps, weight_decay, seed, grad_scale)
        if len(grads) != len(self._shapes):
            raise ValueError(f"grads must hold {len(self._shapes)} tensors, one a parameter, got {len(grads)}")
        compiling = torch.compiler.is_compiling()
        if not compiling and self._where() != self._places:
            self._prepare()
        # No list of shapes is made: hundreds of new objects a step would have Python look for garbage each time.
        if not all(map(operator.eq, map(SHAPE, grads), self._shapes)):
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
        settings = Settings(step, lr, betas, eps, weight_decay, maximize, stochastic, seed)
        skipped = []
        for (_, group), theirs in zip(self._groups, ours):
            if compiling:
                columns = (group.params, theirs, group.words, group.befores, *group.written()[1:])
                hyper = (step, lr, *betas, eps, weight_decay, maximize, stochastic, seed, skip_nonfinite)
                skipped.append(torch.ops.lorapar.masked_adamw(*columns, grad_scale, *hyper))
            else:
                # The op takes 3 ms to hand over the tensors of a 7B.
                skipped.append(group.step(theirs, grad_scale, settings, skip_nonfinite))
        return not (skip_nonfinite and any(int(one) for one in skipped))


def _check_grads(places: list[int], grads: Sequence[Tensor], device: torch.device) -> None:
    """Of parameters of one dtype and device, which csrc steps in one call."""
    dtype = grads[0].dtype
    if not dtype.is_floating_point or not all(map(operator.is_, map(DTYPE, grads), repeat(dtype))):
        i, other = next(((i, grad.dtype) for i, grad in zip(places, grads) if grad.dtype != dtype), (places[0], dtype))
        raise ValueError(f"grads must be of one floating-point dtype, got {dtype} and at {i} {other}")
    if not all(map(operator.eq, map(DEVICE, grads), repeat(device))):
        i, other = next((i, grad.device) for i, grad in zip(places, grads) if grad.device != device)
        raise ValueError(f"grads[{i}] must be on its parameter's device {device}, got {other}")


def _check_settings(step, lr, betas, eps, weight_decay, seed, grad_scale: Tensor | None) -> None:
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an int of at least 1, got {step!r}")
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be in [0, 2⁶³), got {seed}")
    if grad_scale is not None and (grad_scale.dtype != torch.float32 or grad_scale.numel() != 1):
        raise ValueError(f"grad_scale must be one float32 element, got {grad_scale.numel()} of {grad_scale.dtype}")


def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | MaskIndex],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
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
) -> bool:
    """One AdamW step on the active elements of every parameter, in place on params and their state.

    Args:
        params, grads, masks: lists of one length; grads[i] and masks[i] (bool, or what `index_mask` made of
            it, which saves packing it at every step) of params[i]'s shape.
        exp_avgs, exp_avg_sqs: 1-D, masks[i].sum() entries each, fp32 (fp64 for an fp64 parameter), or int8 and uint8
            with scales; zeros at first. step: the number of this step, from 1 on.
        grad_scale: one fp32 element on the parameters' device that multiplies every gradient (the clipping factor,
            the inverse of a loss scale, or their product), or None. A tensor, so that nothing waits for the device.
        skip_nonfinite: where the scaled gradient of an active element, of any tensor, is not finite, change nothing.
        stochastic: round bf16 parameters at random, without bias. seed: of these bits, and of those that round 8-bit
            moments; from 0 up to 2⁶³.
        scales: fp32 [2, ceil(n / 512)] each, zeros at first, where moments are 8-bit.
        compensations: of the parameter's dtype (bf16, fp16), as long as its moments, zeros at first: what rounding
            leaves out, carried to the next step.

    Returns True, or False where the step was skipped (on CUDA the answer waits for the device, so only where asked).
    An element outside its mask is not written, whatever it, its gradient or the decay are. Raises ValueError
    naming the argument; all are checked before anything is written.
    To step the same tensors again and again, `PreparedAdamW` checks them once.
    """
    prepared = PreparedAdamW(params, masks, exp_avgs, exp_avg_sqs, scales=scales, compensations=compensations)
    return prepared.step(
        grads, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, grad_scale=grad_scale,
        skip_nonfinite=skip_nonfinite, stochastic=stochastic, seed=seed,
    )  # fmt: skip
