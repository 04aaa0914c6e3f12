"""From two scores to who trains what (paper section 3.3): each system's kept set, then each stage's active set.

A unit is what is kept or dropped whole: an element, a tile or a rank slice. `system1_cost` is beyond the paper.
"""

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk

from ..errors import InputError, require
from ..recipe.checks import NO_COST, check_value
from ..recipe.sections import Granularity, PartitionConfig, Selection
from ..scoring.scores import Masks, Scores, shuffled, trainable_mask
from .partition import SETS, Partition

TILE_A, TILE_B = (16, 64), (64, 16)  # rows × columns (design.md, Contract)


def partition(
    scores_1: Mapping[str, Tensor],
    scores_2: Mapping[str, Tensor],
    theta: float = 0.9,
    alpha: float = 1.0,
    beta: float = 1.0,
    granularity: Granularity = "element",
    selection: Selection = "scores",
    seed: int = 0,
    rank: int | None = None,
    system1_cost: float = 0.0,
) -> Partition:
    """Divide the elements into S1-only, S2-only, shared and inactive, and say what each stage trains.

    Args:
        scores_1, scores_2: importance under System 1 and 2, {parameter name: tensor}, non-negative, the same names and
            shapes. A `Scores` brings its own `rank`.
        theta: share of each system's total importance that its kept set holds, in (0, 1]: the smallest prefix of the
            descending order over ALL elements together; equal scores go by position.
        alpha, beta: ⌊α·|shared|⌋ shared elements train in SFT (highest for System 1), ⌊β·|shared|⌋ in GRPO (highest for
            System 2), each in [0, 1].
        granularity: "element"; "tile" (16 × 64 of A, 64 × 16 of B) or "rank" (row i of A with column i of B), kept
            whole by their summed score until θ is held.
        selection: "scores"; "random": the same scores at shuffled places, a control of the same shares and overlap;
            "all": every trainable element active in both stages (plain LoRA).
        rank: trainable rows r where the adapter holds a twin (rows r.. of A, columns r.. of B never train).
        system1_cost: λ, at least 0. Above 0, GRPO trains the units of highest worth among all trainable ones, w_j =
            I2_j / ΣI2 − λ · I1_j / ΣI1 (equal ones by position), and as many as it otherwise would: |S2-only| +
            ⌊β·|shared|⌋, of tiles or rank slices by their summed shares. The kept sets and SFT's set stay as they are.
            0: the paper's choice. At β = 1 the two meet: as λ → 0 the highest by worth become K₂. Below 1 they do not:
            the paper drops shared units of the lowest score, a λ near 0 drops K₂'s lowest, shared or not. Predicts:
            stage 2 loses less of System 1, and gains a little less in System 2.

    Raises InputError for values out of range, mappings that differ, or scores that are all zero.
    """
    given = {"theta": theta, "alpha": alpha, "beta": beta, "granularity": granularity, "selection": selection,
             "system1_cost": system1_cost}  # fmt: skip
    for name, value in given.items():
        check_value(PartitionConfig, name, value)
    require(math.isfinite(system1_cost), "system1_cost", system1_cost, "a finite number")
    require(selection != "all" or not system1_cost, "system1_cost", system1_cost, NO_COST)
    _check_same(scores_1, scores_2)
    rank = rank if rank is not None else _metadata(scores_1).get("rank")
    names = sorted(scores_1)
    trainable = {name: trainable_mask(name, scores_1[name], rank) for name in names}
    by_system = [
        {name: torch.where(trainable[name], scores[name].detach().cpu().float(), 0.0) for name in names}
        for scores in (scores_1, scores_2)
    ]
    metadata = dict(theta=theta, alpha=alpha, beta=beta, granularity=granularity, selection=selection, seed=seed,
                    rank=rank, scores=_metadata(scores_1))  # fmt: skip
    # Only where it is used, so that a partition without it is the same file as before the key.
    metadata |= {"system1_cost": system1_cost} if system1_cost else {}
    if selection == "all":
        return Partition({kind: trainable for kind in SETS}, metadata)
    if selection == "random":
        by_system = shuffled(by_system, trainable, seed)
    sums = [_sums(scores, granularity) for scores in by_system]
    kept_units = [_keep(units, theta, f"System {i}") for i, units in enumerate(sums, start=1)]
    k1, k2 = (_trainable_of(units, trainable, granularity) for units in kept_units)
    shared = {name: k1[name] & k2[name] for name in names}
    active = {}
    for stage, own, other, scores, share in (
        ("sft", k1, k2, by_system[0], alpha),
        ("grpo", k2, k1, by_system[1], beta),
    ):
        top = _top_share(scores, shared, share)
        active[stage] = {name: (own[name] & ~other[name]) | top[name] for name in names}
    if system1_cost:
        can_train = _sums({name: trainable[name].float() for name in names}, granularity)
        worthiest = _worthiest(sums, kept_units, can_train, beta, system1_cost)
        active["grpo"] = _trainable_of(worthiest, trainable, granularity)
    return Partition({"s1": k1, "s2": k2, **active}, metadata)


def _keep(units: Masks, theta: float, what: str) -> Masks:
    try:
        return dict(zip(units, lk.top_mass(list(units.values()), theta)))
    except ValueError as error:
        raise InputError(f"scores of {what}: {error}") from None


def _sums(scores: Masks, granularity: Granularity) -> Masks:
    """Every unit's summed score: each element's own; a tile's, by factor; a rank slice's, by lora_A's name."""
    if granularity == "element":
        return scores
    if granularity == "tile":
        return {name: lk.tile_sums(scores[name], _tile_of(name)) for name in scores}
    for partner in _partners(scores).values():
        if partner not in scores:
            raise InputError(f"granularity: rank needs lora_A and lora_B together; {partner} is missing")
    return {
        name: lk.tile_sums(scores[name], (1, scores[name].shape[1]))[:, 0]
        + lk.tile_sums(scores[partner], (scores[partner].shape[0], 1))[0]
        for name, partner in _partners(scores).items()
    }


def _trainable_of(units: Masks, trainable: Masks, granularity: Granularity) -> Masks:
    """The trainable elements of the units chosen: single ones, whole tiles, or row i of A with column i of B."""
    if granularity == "element":
        spread = units
    elif granularity == "tile":
        spread = {name: lk.spread_tiles(units[name], trainable[name].shape, _tile_of(name)) for name in trainable}
    else:
        partners = _partners(trainable)
        of_a = {name: units[name][:, None].expand(trainable[name].shape) for name in partners}
        spread = of_a | {b: units[a][None, :].expand(trainable[b].shape) for a, b in partners.items()}
    return {name: spread[name] & mask for name, mask in trainable.items()}


def _tile_of(name: str) -> tuple[int, int]:
    return TILE_A if ".lora_A." in name else TILE_B


def _partners(scores: Masks) -> dict[str, str]:
    return {name: name.replace(".lora_A.", ".lora_B.") for name in scores if ".lora_A." in name}


def _worthiest(sums: list[Masks], kept: list[Masks], can_train: Masks, beta: float, cost: float) -> Masks:
    """The units that are worth most to System 2 less `cost` times what they are to System 1.

    Among those with an element that can train, and as many as are kept by System 2 alone, with ⌊β·|shared|⌋.
    """
    one, two = (_in_one_row(units).double() for units in sums)
    k1, k2 = (_in_one_row(units) for units in kept)
    count = int((k2 & ~k1).sum()) + _share_of(int((k1 & k2).sum()), beta)
    worth = two / two.sum() - cost * (one / one.sum())
    # A twin's worth is 0, more than that of an element which costs more than it brings.
    worth[_in_one_row(can_train) == 0] = -math.inf
    # Stable, so that equals go by position.
    order = worth.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(k1)
    chosen[order[:count]] = True
    parts = chosen.split([units.numel() for units in kept[0].values()])
    return {name: part.view(units.shape) for (name, units), part in zip(kept[0].items(), parts)}


def _in_one_row(units: Masks) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in units.values()])


def _share_of(number: int, share: float) -> int:
    """⌊share · number⌋, as a fraction, so that 0.29 of 100 is 29, not ⌊28.999…⌋."""
    return int(Fraction(str(share)) * number)


def _top_share(scores: Masks, shared: Masks, share: float) -> Masks:
    count = _share_of(sum(int(mask.sum()) for mask in shared.values()), share)
    kept = lk.top_count(list(scores.values()), count, among=[shared[name] for name in scores])
    return dict(zip(scores, kept))


def _metadata(scores: Mapping[str, Tensor]) -> dict[str, Any]:
    return json.loads(json.dumps(scores.metadata)) if isinstance(scores, Scores) else {}


def _check_same(scores_1: Mapping[str, Tensor], scores_2: Mapping[str, Tensor]) -> None:
    if not scores_1:
        raise InputError("scores_1: empty; expected {parameter name: tensor}")
    for name in [*scores_1, *scores_2]:
        if name not in scores_1 or name not in scores_2:
            raise InputError(f"scores: {name} is in one system's scores only")
        if scores_1[name].shape != scores_2[name].shape:
            shapes = list(scores_1[name].shape), list(scores_2[name].shape)
            raise InputError(f"scores: {name} is {shapes[0]} in System 1's scores, {shapes[1]} in System 2's")
