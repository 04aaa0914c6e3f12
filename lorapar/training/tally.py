"""Whether GRPO has anything to learn from: its gradient comes from the differences between the rewards of a group."""

import logging
from dataclasses import dataclass

import torch

log = logging.getLogger("lorapar")
# Batches of groups after which it is said that all rewards were equal so far.
EARLY = 5


@dataclass
class RewardTally:
    """Groups of completions so far, how many of them had equal rewards, completions that no reward function gave a
    value, and those of this process that ended before they were cut off."""

    batches: int = 0
    groups: int = 0
    equal: int = 0
    completions: int = 0
    unscored: int = 0
    ended: int = 0
    total: float = 0.0

    def add(self, rewards: torch.Tensor, weights: torch.Tensor, size: int, apart: bool) -> None:
        """Count a batch.

        Args:
            rewards: [completions, functions], NaN for None; a group's `size` completions follow each other.
            weights: [functions]. apart: each function's rewards are normalised by themselves (TRL's
                normalize_then_sum), so they must be equal one by one.
        """
        rewards = rewards.detach().double().cpu()
        weighted = rewards * weights.double().cpu()
        unscored = rewards.isnan().all(1)
        summed = weighted.nansum(1).masked_fill(unscored, torch.nan)
        values = (weighted if apart else summed[:, None]).view(-1, size, weighted.shape[1] if apart else 1)
        low = values.nan_to_num(nan=torch.inf).amin(1)
        high = values.nan_to_num(nan=-torch.inf).amax(1)
        self.batches += 1
        self.groups += len(values)
        self.equal += int((high <= low).all(1).sum())
        self.completions += len(rewards)
        self.unscored += int(unscored.sum())
        self.total += float(summed.nansum())

    @property
    def all_equal(self) -> bool:
        return self.groups > 0 and self.equal == self.groups

    def said(self, remedies: str) -> str:
        """That all groups' rewards were equal, and what to try; `remedies`: what may make those of a group differ."""
        if self.unscored == self.completions:
            return (
                f"no reward function gave a value to any of {self.completions} completions (None, or nan); give the "
                "rows what it needs, such as answers, or take another"
            )
        mean = self.total / (self.completions - self.unscored)
        return (
            f"in all {self.groups} groups the completions' rewards were equal (mean {mean:.4g}), so they gave no "
            f"gradient; try {remedies}"
        )
