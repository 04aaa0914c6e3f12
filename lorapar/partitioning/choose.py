"""From two scores to who trains what (paper section 3.3): each system's kept set, then each stage's active set."""

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk

from ..errors import InputError
from ..recipe.checks import check_value
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

    Raises InputError for values out of range, mappings that differ, or scores that are all zero.
    """
    given = {"theta": theta, "alpha": alpha, "beta": beta, "granularity": granularity, "selection": selection}
    for name, value in given.items():
        check_value(PartitionConfig, name, value)
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
    if selection == "all":
        return Partition({kind: trainable for kind in SETS}, metadata)
    if selection == "random":
        by_system = shuffled(by_system, trainable, seed)
    if granularity == "element":
        kept = [_keep_elements(scores, theta, f"System {i}") for i, scores in enumerate(by_system, start=1)]
    else:
        keep = _keep_tiles if granularity == "tile" else _keep_slices
        whole = [keep(scores, theta, f"System {i}") for i, scores in enumerate(by_system, start=1)]
        kept = [{name: masks[name] & trainable[name] for name in names} for masks in whole]
    k1, k2 = kept
    shared = {name: k1[name] & k2[name] for name in names}
    active = {}
    for stage, own, other, scores, share in (
        ("sft", k1, k2, by_system[0], alpha),
        ("grpo", k2, k1, by_system[1], beta),
    ):
        top = _top_share(scores, shared, share)
        active[stage] = {name: (own[name] & ~other[name]) | top[name] for name in names}
    return Partition({"s1": k1, "s2": k2, **active}, metadata)


def _keep_elements(scores: Masks, theta: float, what: str) -> Masks:
    try:
        return dict(zip(scores, lk.top_mass(list(scores.values()), theta)))
    except ValueError as error:
        raise InputError(f"scores of {what}: {error}") from None


def _keep_tiles(scores: Masks, theta: float, what: str) -> Masks:
    """Whole tiles by their summed score."""
    sides = {name: TILE_A if ".lora_A." in name else TILE_B for name in scores}
    sums = {name: lk.tile_sums(scores[name], sides[name]) for name in scores}
    kept = _keep_elements(sums, theta, what)
    return {name: lk.spread_tiles(kept[name], scores[name].shape, sides[name]) for name in scores}


def _keep_slices(scores: Masks, theta: float, what: str) -> Masks:
    """Whole rank slices, row i of A with column i of B, by the sum of both."""
    partners = {name: name.replace(".lora_A.", ".lora_B.") for name in scores if ".lora_A." in name}
    for partner in partners.values():
        if partner not in scores:
            raise InputError(f"granularity: rank needs lora_A and lora_B together; {partner} is missing")
    sums = {
        name: lk.tile_sums(scores[name], (1, scores[name].shape[1]))[:, 0]
        + lk.tile_sums(scores[partner], (scores[partner].shape[0], 1))[0]
        for name, partner in partners.items()
    }
    kept = _keep_elements(sums, theta, what)
    of_a = {name: kept[name][:, None].expand(scores[name].shape) for name in partners}
    of_b = {partner: kept[name][None, :].expand(scores[partner].shape) for name, partner in partners.items()}
    return of_a | of_b


def _top_share(scores: Masks, shared: Masks, share: float) -> Masks:
    # As a fraction, so that 0.29 of 100 is 29, not ⌊28.999…⌋.
    count = int(Fraction(str(share)) * sum(int(mask.sum()) for mask in shared.values()))
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
