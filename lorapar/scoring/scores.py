"""The importance of every LoRA element as a value: by parameter name, in a file, at the trainable places."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import load_tensors, save_tensors

Masks = dict[str, Tensor]


class Scores(dict[str, Tensor]):
    """{parameter name: fp32 importance of the parameter's shape}, with the facts that made it in `metadata`."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]):
        super().__init__(tensors)
        self.metadata = dict(metadata)


def shuffled(by_system: list[Masks], trainable: Masks, seed: int) -> list[Masks]:
    """Each system's scores moved to the same random places among the trainable elements of the whole model."""
    names = sorted(trainable)
    flags = torch.cat([trainable[name].reshape(-1) for name in names])
    order = torch.randperm(int(flags.sum()), generator=torch.Generator().manual_seed(seed))
    moved = []
    for scores in by_system:
        flat = torch.cat([scores[name].reshape(-1) for name in names])
        flat[flags] = flat[flags][order]
        parts = flat.split([scores[name].numel() for name in names])
        moved.append({name: part.view(scores[name].shape) for name, part in zip(names, parts)})
    return moved


def facts_of(scores: Scores, system: int) -> dict[str, Any]:
    """What a stage records of a system's scores: how many examples they took, and whether and when they were stable."""
    facts = {f"examples_system{system}": scores.metadata["examples"]}
    if "until_stable" in scores.metadata:
        facts[f"stable_system{system}"] = scores.metadata["stable"]
        facts[f"looks_system{system}"] = scores.metadata["looks"]
    return facts


def save_scores(path: Path | str, scores_1: Scores, scores_2: Scores) -> None:
    """Write `system1/<parameter>` and `system2/<parameter>`, fp32, with both systems' metadata."""
    tensors = {f"system{i}/{name}": t for i, s in ((1, scores_1), (2, scores_2)) for name, t in s.items()}
    save_tensors(path, tensors, {"system1": scores_1.metadata, "system2": scores_2.metadata})


def load_scores(path: Path | str) -> tuple[Scores, Scores]:
    """Read what `save_scores` wrote; InputError where it is missing or corrupt."""
    tensors, metadata = load_tensors(path)
    both = []
    for system in ("system1", "system2"):
        prefix = f"{system}/"
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if not mine or system not in metadata:
            raise InputError(f"{path}: holds no scores of {system}")
        both.append(Scores(mine, metadata[system]))
    return both[0], both[1]


def trainable_mask(name: str, like: Tensor, rank: int | None) -> Tensor:
    """True on the r trainable rows of A (columns of B); everywhere where there is no twin."""
    mask = torch.ones(like.shape, dtype=torch.bool)
    if rank is not None:
        if ".lora_A." in name:
            mask[rank:] = False
        else:
            mask[:, rank:] = False
    return mask
