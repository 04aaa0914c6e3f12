"""A partition whose second training stage goes by scores of the adapter that the first stage left.

Beyond the paper, which scores both systems once, before any training.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from ..errors import InputError, require
from ..partitioning import choose
from ..partitioning.partition import Partition
from ..scoring.scores import Masks, Scores

SETTINGS = ("theta", "alpha", "beta", "granularity", "selection", "seed", "rank")
SYSTEM_OF = {"sft": 1, "grpo": 2}


def renew(
    partition: Partition,
    scores_1: Mapping[str, Tensor],
    scores_2: Mapping[str, Tensor],
    stage: Literal["sft", "grpo"] = "grpo",
) -> Partition:
    """The partition for the second training stage, its system's scores measured again after the first.

    Args:
        partition: what `lorapar.partition` made of the first scores; its θ, α, β, granularity, selection, seed and
            system1_cost hold.
        scores_1, scores_2: as `lorapar.partition` takes them. Those of the second stage's system are of the adapter as
            the first stage left it (`lorapar.score` on the trained model), the others those that `partition` was made
            of.
        stage: the second training stage. "grpo": System 2 is renewed; "sft": System 1, where GRPO came first.

    Returns the first stage's sets as they were, bit for bit, and for the second its system's renewed kept set and what
    it trains: its own, and ⌊β·|shared|⌋ (for "sft" ⌊α·|shared|⌋) of what both systems keep, highest renewed score
    first. `metadata["renewed"]` says which system, and the Jaccard index of its old and its renewed kept set.

    Predicts: the kept set differs from the first one where training changed what the second system relies on; then
    the second stage gains more in its system. With an index near 1 nothing changes.

    Raises InputError for another stage, a partition of selection "all" (which has no scores), one that
    `lorapar.partition` did not make, and scores of the first system that give another kept set than `partition` has.
    """
    require(stage in SYSTEM_OF, "stage", stage, "sft or grpo")
    missing = [name for name in SETTINGS if name not in partition.metadata]
    require(not missing, "partition", f"metadata without {', '.join(missing)}", "what lorapar.partition made")
    settings = {name: partition.metadata[name] for name in SETTINGS}
    require(settings["selection"] != "all", "partition", "selection: all", "one made of scores")
    cost = partition.metadata.get("system1_cost", 0.0)
    made = choose.partition(scores_1, scores_2, **settings, system1_cost=cost)
    system = SYSTEM_OF[stage]
    first = 3 - system
    old, again = partition.masks[f"s{first}"], made.masks[f"s{first}"]
    if old.keys() != again.keys() or any(not old[name].equal(again[name]) for name in old):
        raise InputError(
            f"scores_{first}: they give another kept set of System {first} than the partition has; expected the scores "
            f"it was made of, as only System {system}'s are renewed"
        )
    renewed = {f"s{system}": made.masks[f"s{system}"], stage: made.masks[stage]}
    scores = (scores_1, scores_2)[system - 1]
    facts = {
        "stage": stage,
        "system": system,
        "jaccard": _jaccard(partition.masks[f"s{system}"], made.masks[f"s{system}"]),
        "partition": partition.hash,
        "scores": scores.metadata if isinstance(scores, Scores) else {},
    }
    return Partition({**partition.masks, **renewed}, {**partition.metadata, "renewed": facts})


def _jaccard(one: Masks, two: Masks) -> float:
    shared = sum(int((one[name] & two[name]).sum()) for name in one)
    union = sum(int((one[name] | two[name]).sum()) for name in one)
    return shared / union if union else 0.0
