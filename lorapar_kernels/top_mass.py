"""The smallest set of elements, of several tensors together, that holds θ of the total (paper section 1.3).

    keep = the shortest prefix, in descending order of score, whose sum is at least θ · total

Exact, and the same on every machine: sums are those of the real numbers, rounded once to float64 (as
math.fsum's), the threshold is the float64 product θ · total, and at θ = 1 every score above zero is kept.
Ties go by index: lower flat index first, tensors in list order. A zero is never kept. A stable descending
sort with a float64 running sum gives the same set wherever the rounding of its running sum does not decide.

No sort. Non-negative floats are ordered as their bit patterns, so this is a radix selection by 16 bits a
level: sum the scores that share their top bits, find the bin in which the prefix ends, and go on inside it,
twice for float32 and four times for float64. The scores of one bin share an exponent, so float64 adds them
without rounding, in any order; the few thousand bins are then added as Python integers. csrc does the same for
float32, on the CPU and on CUDA devices, to the last element.

Whole tiles and rank slices are chosen by the same functions from `tile_sums`; `spread_tiles` makes masks of them.
"""

import ctypes
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import native
from .backend import choose, no_obstacle

# Elements a step, which bounds most temporaries to about 80 MB. Steps that fit the cache are no faster (30 ms
# for 17.9 M elements at 2 ** 18 and at 2 ** 20), and every one is several parallel regions, each of which can
# wait for a time slice where other processes share the cores: 2 ** 16 then took 15 s.
CHUNK = 1 << 22
DIGIT = 16


class _Float(NamedTuple):
    """What the selection needs to know of a floating-point type."""

    dtype: torch.dtype
    integer: torch.dtype  # of the same width
    bits: int
    exponent: int  # every finite value is an integer times 2 ** -exponent
    most: int  # elements whose per-bin sums float64 holds without rounding


# A float32 has 24 significant bits and a float64 sum 53, so 2 ** 29 of them add exactly; a float64 is split
# in two parts of 26 and 27 bits, of which 2 ** 26 do.
FLOATS = {
    torch.float32: _Float(torch.float32, torch.int32, 32, 149, 1 << 29),
    torch.float64: _Float(torch.float64, torch.int64, 64, 1074, 1 << 26),
}


def top_mass_reference(scores: Sequence[Tensor], theta: float) -> list[Tensor]:
    """The specification, slow: a stable sort and exact sums. Called as `top_mass` is with a list."""
    flat, kind = _flat_and_checked(scores)
    values, order = flat.sort(descending=True, stable=True)
    prefixes = list(itertools.accumulate(_units(values.double(), kind)))
    reached = _mass_reached(prefixes[-1], theta, kind)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order[: bisect_left(prefixes, True, key=reached) + 1]] = True
    return _as_given(kept, scores)


def _units(values: Tensor, kind: _Float) -> list[int]:
    """float64 sums of values of a kind as multiples of the kind's 2 ** -exponent, exactly."""
    fractions, exponents = torch.frexp(values)
    significands = (fractions * 2.0**53).to(torch.int64)
    pairs = zip(significands.tolist(), (exponents - 53 + kind.exponent).tolist())
    return [number << by if by >= 0 else number >> -by for number, by in pairs]


def _mass_reached(total: int, theta: float, kind: _Float) -> Callable[[int], bool]:
    """Whether a sum, in the kind's units, is θ of the total."""
    if theta == 1.0:
        return lambda units: units >= total
    # Python divides integers with one rounding, so this is the sum to the nearest float64.
    unit = 1 << kind.exponent
    threshold = theta * (total / unit)
    return lambda units: units / unit >= threshold


def _parts(values: Tensor) -> list[Tensor]:
    """float64 tensors that add up to the values and whose sums over one exponent are exact."""
    if values.dtype == torch.float32:
        return [values.double()]
    high = (values.view(torch.int64) & ~((1 << 27) - 1)).view(torch.float64)
    return [high, values - high]


def _digits(values: Tensor, shift: int, kind: _Float) -> Tensor:
    """The 16 bits from `shift` upwards, the sign left out, so that -0.0 is 0.0."""
    top = shift == kind.bits - DIGIT
    return (values.view(kind.integer) >> shift).bitwise_and_(0x7FFF if top else 0xFFFF)


def _histogram(values: Tensor, shift: int, kind: _Float, by_mass: bool) -> tuple[list[int], list[int]]:
    """The digits at `shift` whose sum is above 0, highest first, and the sums: in units, or of ones."""
    parts = 0
    for chunk in values.split(CHUNK):
        digits = _digits(chunk, shift, kind)
        weights = _parts(chunk) if by_mass else [None]
        parts = parts + torch.stack([torch.bincount(digits, weight, 1 << DIGIT) for weight in weights])
    assert isinstance(parts, Tensor)
    found = parts.ne(0).any(0).nonzero().squeeze(1).flip(0)
    if not by_mass:
        return found.tolist(), parts[0, found].tolist()
    return found.tolist(), [sum(units) for units in zip(*(_units(part[found], kind) for part in parts))]


def _cut(
    values: Tensor, kind: _Float, by_mass: bool, reached_of: Callable[[int], Callable[[int], bool]]
) -> tuple[float, int]:
    """Where the descending order is cut: kept are the values above the first, and so many of its equals.

    reached_of(total) says whether a prefix's sum is long enough.
    """
    before, bits, reached, inside = 0, 0, None, 0
    for shift in range(kind.bits - DIGIT, -1, -DIGIT):
        digits, sums = _histogram(values, shift, kind, by_mass)
        reached = reached or reached_of(sum(sums))
        # prefixes[i + 1] is the first that reaches, so the cut is inside digits[i].
        prefixes = list(itertools.accumulate(sums, initial=before))
        i = bisect_left(prefixes, True, lo=1, key=reached) - 1
        before, inside, bits = prefixes[i], sums[i], bits | digits[i] << shift
        values = torch.cat([part[_digits(part, shift, kind) == digits[i]] for part in values.split(CHUNK)])
    assert reached is not None
    # What is left are the equals of one value.
    one, equals = inside // values.numel(), range(1, values.numel() + 1)
    ties = equals[bisect_left(equals, True, key=lambda n: reached(before + n * one))]
    return float(torch.tensor(bits, dtype=kind.integer).view(kind.dtype)), ties


def _keep(flat: Tensor, among: Tensor | None, value: float, ties: int) -> Tensor:
    """The flat mask of a cut."""
    kept, equal = flat > value, flat == value
    if among is not None:
        kept, equal = kept & among, equal & among
    kept[equal.nonzero().squeeze(1)[:ties]] = True
    return kept


def _as_given(kept: Tensor, scores: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The flat mask cut into the scores' shapes, on their devices."""
    if isinstance(scores, Tensor):
        return [kept.view(scores.shape)]
    parts = kept.split([score.numel() for score in scores])
    # Cloned, or each would hold on to the memory of all.
    return [part.view(score.shape).to(score.device, copy=True) for part, score in zip(parts, scores)]


def _listed(scores: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], _Float]:
    """The scores as a list and their type; ValueError unless of one type that is known, and not too many."""
    listed = [scores] if isinstance(scores, Tensor) else list(scores)
    if not listed:
        raise ValueError("scores must hold at least one tensor, got an empty list")
    dtype = listed[0].dtype
    if dtype not in FLOATS:
        raise ValueError(f"scores must be torch.float32 or torch.float64, got {dtype}")
    for i, score in enumerate(listed):
        if score.dtype != dtype:
            raise ValueError(f"scores must all be {dtype} as scores[0] is, got {score.dtype} in scores[{i}]")
    n = sum(score.numel() for score in listed)
    if not 0 < n <= FLOATS[dtype].most:
        raise ValueError(f"scores must hold 1 to {FLOATS[dtype].most} elements of {dtype}, got {n}")
    return listed, FLOATS[dtype]


def _flat_and_checked(scores: Tensor | Sequence[Tensor]) -> tuple[Tensor, _Float]:
    """All scores in one row and their type; ValueError unless of one type, finite and not negative."""
    listed, kind = _listed(scores)
    flat = torch.cat([score.detach().reshape(-1).to(listed[0].device) for score in listed])
    low, high = (float(bound) for bound in torch.aminmax(flat))
    if not (low >= 0.0 and high < float("inf")):
        bad = (~((flat >= 0.0) & (flat < float("inf")))).nonzero().squeeze(1)
        at, i = int(bad[0]), 0
        while at >= listed[i].numel():
            at, i = at - listed[i].numel(), i + 1
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(
            f"scores must be finite and not negative, got {float(listed[i].reshape(-1)[at])} "
            f"at element {at} of scores[{i}]{more}"
        )
    return flat, kind


def _listed_masks(among: Tensor | Sequence[Tensor], scores: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The masks as a list; ValueError unless they fit the scores one by one."""
    if isinstance(among, Tensor) != isinstance(scores, Tensor):
        raise ValueError("among must be a tensor where scores are one, and a list where they are a list")
    masks = [among] if isinstance(among, Tensor) else among
    listed = [scores] if isinstance(scores, Tensor) else scores
    if len(masks) != len(listed):
        raise ValueError(f"among must hold {len(listed)} masks, one a tensor of scores, got {len(masks)}")
    for i, (mask, score) in enumerate(zip(masks, listed)):
        if mask.dtype != torch.bool or mask.shape != score.shape:
            raise ValueError(f"among[{i}] must be torch.bool {list(score.shape)}, got {mask.dtype} {list(mask.shape)}")
    return list(masks)


def _native_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why csrc's selection cannot serve these scores (and masks); None when it can."""
    if tensors[0].dtype != torch.float32:
        return f"csrc selects float32 scores, these are {tensors[0].dtype}"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"csrc selects on one device, the tensors are on {' and '.join(sorted(map(str, devices)))}"
    return native.obstacle(tensors[0].device)


def _backend(op: str, tensors: Sequence[Tensor]) -> str:
    return choose(op, {"native": partial(_native_obstacle, tensors), "reference": no_obstacle})


def _native_table(scores: list[Tensor], among: list[Tensor] | None, kept: list[Tensor] | None) -> Any:
    """The array of lorapar_scores; the tensors are contiguous."""
    rows = [
        native.Scores(
            score.data_ptr(),
            None if among is None else among[i].data_ptr(),
            None if kept is None else kept[i].data_ptr(),
            score.numel(),
        )
        for i, score in enumerate(scores)
    ]
    return (native.Scores * len(rows))(*rows)


def _native_keep(
    scores: list[Tensor], among: list[Tensor] | None, cut: native.Cut, room: tuple[int, int]
) -> list[Tensor]:
    kept = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    table = _native_table(scores, among, kept)
    native.call("keep", scores[0].device, table, len(scores), ctypes.byref(cut), *room)
    return kept


def _top_mass_native(scores: Sequence[Tensor], thetas: Sequence[float]) -> list[Tensor]:
    """`_top_mass_radix` by csrc, for all thetas from one pass over the scores and one more each."""
    contiguous = [score.contiguous() for score in scores]
    cuts, shares = (native.Cut * len(thetas))(), (ctypes.c_double * len(thetas))(*thetas)
    table = _native_table(contiguous, None, None)
    workspace = native.selection_workspace(contiguous[0].device, table)
    room = workspace.data_ptr(), workspace.numel()
    arguments = table, len(contiguous), shares, len(thetas), cuts, *room
    status = native.status_of("top_mass", contiguous[0].device, *arguments)
    if status in (native.ERROR_SCORE, native.ERROR_ZERO):
        # For its words, which name the element.
        _flat_with_mass(scores)
    native.check_status("top_mass", contiguous[0].device, status)
    return [mask for cut in cuts for mask in _native_keep(contiguous, None, cut, room)]


def _top_count_native(scores: Sequence[Tensor], count: int, among: Sequence[Tensor] | None) -> list[Tensor]:
    """`_top_count_radix` by csrc."""
    contiguous = [score.contiguous() for score in scores]
    masks = None if among is None else [mask.contiguous() for mask in among]
    cut, table = native.Cut(), _native_table(contiguous, masks, None)
    workspace = native.selection_workspace(contiguous[0].device, table)
    room = workspace.data_ptr(), workspace.numel()
    arguments = table, len(contiguous), count, ctypes.byref(cut), *room
    status = native.status_of("top_count", contiguous[0].device, *arguments)
    if status in (native.ERROR_SCORE, native.ERROR_COUNT):
        # For its words, and because csrc takes a count of 1 or more.
        return _top_count_radix(scores, count, among)
    native.check_status("top_count", contiguous[0].device, status)
    return _native_keep(contiguous, masks, cut, room)


def _flat_with_mass(scores: Sequence[Tensor]) -> tuple[Tensor, _Float]:
    """`_flat_and_checked`, and ValueError unless their sum is above zero and finite."""
    flat, kind = _flat_and_checked(scores)
    rough = float(flat.sum(dtype=torch.float64))
    if rough == 0.0:
        raise ValueError(f"scores must hold one above zero, got {flat.numel()} zeros")
    if rough == float("inf"):
        raise ValueError("scores must sum to a finite float64, got a larger sum")
    return flat, kind


def _top_mass_radix(scores: Sequence[Tensor], thetas: Sequence[float]) -> list[Tensor]:
    """The masks for the first theta, then for the next, in plain PyTorch on any device."""
    flat, kind = _flat_with_mass(scores)
    masks = []
    for theta in thetas:
        value, ties = _cut(flat, kind, True, lambda total, theta=theta: _mass_reached(total, theta, kind))
        masks += _as_given(_keep(flat, None, value, ties), scores)
    return masks


def _top_count_radix(scores: Sequence[Tensor], count: int, among: Sequence[Tensor] | None) -> list[Tensor]:
    flat, kind = _flat_and_checked(scores)
    mask = None if among is None else torch.cat([one.reshape(-1).to(flat.device) for one in among])
    candidates = flat if mask is None else flat[mask]
    if not 0 <= count <= candidates.numel():
        raise ValueError(f"count must be in 0..{candidates.numel()}, the number of candidates, got {count}")
    if count == 0:
        return _as_given(torch.zeros_like(flat, dtype=torch.bool), scores)
    value, ties = _cut(candidates, kind, False, lambda total: lambda n: n >= count)
    return _as_given(_keep(flat, mask, value, ties), scores)


# Opaque to torch.compile: the backend is chosen when they run.
@torch.library.custom_op("lorapar::top_mass", mutates_args=())
def _top_mass(scores: Sequence[Tensor], thetas: Sequence[float]) -> list[Tensor]:
    chosen = _backend("top_mass", scores)
    return _top_mass_native(scores, thetas) if chosen == "native" else _top_mass_radix(scores, thetas)


@_top_mass.register_fake
def _top_mass_fake(scores: Sequence[Tensor], thetas: Sequence[float]) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for _ in thetas for score in scores]


@torch.library.custom_op("lorapar::top_count", mutates_args=())
def _top_count(scores: Sequence[Tensor], count: int, among: Sequence[Tensor]) -> list[Tensor]:
    """`among` is empty where all take part."""
    chosen = _backend("top_count", [*scores, *among])
    radix = _top_count_native if chosen == "native" else _top_count_radix
    return radix(scores, count, among or None)


@_top_count.register_fake
def _top_count_fake(scores: Sequence[Tensor], count: int, among: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]


@overload
def top_mass(scores: Tensor, theta: float) -> Tensor: ...
@overload
def top_mass(scores: Sequence[Tensor], theta: float) -> list[Tensor]: ...
@overload
def top_mass(scores: Tensor, theta: Sequence[float]) -> list[Tensor]: ...
@overload
def top_mass(scores: Sequence[Tensor], theta: Sequence[float]) -> list[list[Tensor]]: ...
def top_mass(scores: Tensor | Sequence[Tensor], theta: float | Sequence[float]) -> Any:
    """True for the smallest set of elements, of all tensors together, that sums to θ of the total or more.

    Args:
        scores: a tensor or a list of them, float32 or float64 (all one), any shapes and devices, finite and ≥
            0.
        theta: in (0, 1], or a sequence of such, which costs less than as many calls.

    Returns bool masks of the same shapes and devices: a tensor for a tensor, a list for a list; for a sequence of
    θ a list of that, one a θ. Ties go to the lower flat index, then to the earlier tensor; zeros are never kept.
    Raises ValueError on any other θ, dtype or score, and when no score is above zero.
    """
    thetas = list(theta) if isinstance(theta, Sequence) else [theta]
    for one in thetas:
        if not 0.0 < one <= 1.0:
            raise ValueError(f"theta must be in (0, 1], got {one}")
    listed, _ = _listed(scores)
    masks = _top_mass([score.detach() for score in listed], thetas)
    by_theta = [masks[i : i + len(listed)] for i in range(0, len(masks), len(listed))]
    kept = [each[0] if isinstance(scores, Tensor) else each for each in by_theta]
    return kept if isinstance(theta, Sequence) else kept[0]


@overload
def top_count(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor: ...
@overload
def top_count(scores: Sequence[Tensor], count: int, among: Sequence[Tensor] | None = None) -> list[Tensor]: ...
def top_count(
    scores: Tensor | Sequence[Tensor], count: int, among: Tensor | Sequence[Tensor] | None = None
) -> Tensor | list[Tensor]:
    """True for the `count` highest scores where `among` holds (None: anywhere), of all tensors together.

    Args:
        scores: as for `top_mass`; zeros can be kept here.
        count: 0 up to the number of candidates.
        among: bool masks of the scores' shapes, a tensor for a tensor, a list for a list.

    Returns masks as `top_mass` does, with its ties. Raises ValueError on any other argument, naming it.
    """
    listed, _ = _listed(scores)
    masks = [] if among is None else _listed_masks(among, scores)
    kept = _top_count([score.detach() for score in listed], count, masks)
    return kept[0] if isinstance(scores, Tensor) else kept
