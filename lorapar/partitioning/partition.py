"""Which LoRA elements belong to which system and train in which stage, as a value and a file.

Bool masks by parameter name, saved as one bit an element with the facts that made them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lorapar_kernels as lk

from ..errors import InputError
from ..files import load_tensors, save_tensors
from ..scoring.scores import Masks, trainable_mask

SETS = ("s1", "s2", "sft", "grpo")


class Partition:
    """Which LoRA elements belong to which system and train in which stage.

    Attributes:
        masks: {"s1" | "s2" | "sft" | "grpo": {parameter name: bool tensor}}: the kept sets of the two systems, and the
            elements active in each stage.
        metadata: theta, alpha, beta, granularity, selection, seed, rank, where the scores came from, and system1_cost
            where it is not 0. `lorapar.renew` adds "renewed": stage, system, jaccard, partition, scores.
    """

    def __init__(self, masks: Mapping[str, Masks], metadata: Mapping[str, Any]):
        self.masks = {name: dict(masks[name]) for name in SETS}
        self.metadata = dict(metadata)

    def active(self, stage: Literal["sft", "grpo"]) -> Masks:
        """{parameter name: bool}: what `stage` trains."""
        if stage not in ("sft", "grpo"):
            raise InputError(f"stage: got {stage!r}, allowed: sft, grpo")
        return self.masks[stage]

    def kept(self, system: Literal[1, 2]) -> Masks:
        """{parameter name: bool}: K₁ or K₂, the smallest set that holds θ of the system's importance."""
        return self.masks[f"s{system}"]

    @property
    def hash(self) -> str:
        """A digest of the four sets; two partitions with the same hash train the same elements."""
        digest = hashlib.sha256()
        for kind in SETS:
            for name in sorted(self.masks[kind]):
                digest.update(f"{kind}/{name}".encode())
                digest.update(lk.pack_mask(self.masks[kind][name]).numpy().tobytes())
        return digest.hexdigest()

    def trainable(self) -> int:
        """Elements of the r trainable rows, which shares are of (a twin's rows are not)."""
        rank = self.metadata.get("rank")
        return sum(trainable_mask(name, mask, rank).sum().item() for name, mask in self.masks["s1"].items())  # type: ignore[misc]

    def summary(self) -> dict[str, Any]:
        """θ, the Jaccard index of the kept sets, and the share of the trainable elements in each region.

        Where they are set: system1_cost, and which system was renewed with the Jaccard index of its two kept sets.
        """
        total = max(self.trainable(), 1)
        cost = {key: self.metadata[key] for key in ("system1_cost",) if key in self.metadata}
        renewed = self.metadata.get("renewed")
        pairs = [(self.masks["s1"][name], self.masks["s2"][name]) for name in self.masks["s1"]]
        shared = sum(int((k1 & k2).sum()) for k1, k2 in pairs)
        only_1 = sum(int((k1 & ~k2).sum()) for k1, k2 in pairs)
        only_2 = sum(int((k2 & ~k1).sum()) for k1, k2 in pairs)
        active = {stage: sum(int(mask.sum()) for mask in self.masks[stage].values()) for stage in ("sft", "grpo")}
        union = shared + only_1 + only_2
        return {
            "theta": self.metadata["theta"],
            **cost,
            **({"renewed": {key: renewed[key] for key in ("system", "jaccard")}} if renewed else {}),
            "jaccard": shared / union if union else 0.0,
            "trainable_elements": self.trainable(),
            "fraction": {
                "s1_only": only_1 / total,
                "s2_only": only_2 / total,
                "shared": shared / total,
                "active_sft": active["sft"] / total,
                "active_grpo": active["grpo"] / total,
            },
        }

    def save(self, path: Path | str) -> None:
        """Write safetensors: `s1/`, `s2/`, `sft/`, `grpo/` before each name, as mask words; shapes in the metadata."""
        words = {f"{kind}/{name}": lk.pack_mask(mask) for kind in SETS for name, mask in self.masks[kind].items()}
        shapes = {name: list(mask.shape) for name, mask in self.masks["s1"].items()}
        save_tensors(path, words, {"shapes": shapes, "hash": self.hash, **self.metadata})

    @classmethod
    def load(cls, path: Path | str) -> "Partition":
        """Read what `save` wrote; InputError where it is missing, corrupt, or not what its hash says."""
        words, metadata = load_tensors(path)
        try:
            shapes, digest = metadata.pop("shapes"), metadata.pop("hash")
            masks = {
                kind: {name: lk.unpack_mask(words[f"{kind}/{name}"], shape) for name, shape in shapes.items()}
                for kind in SETS
            }
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not a whole partition ({error})") from None
        partition = cls(masks, metadata)
        if partition.hash != digest:
            raise InputError(f"{path}: corrupt: its masks do not give the hash {digest[:12]} that it records")
        return partition
