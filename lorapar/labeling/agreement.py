"""How far voters agree: in pairs, all together beyond chance (Fleiss' κ), and each with the majority."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .voting import majority

Votes = Mapping[str, int | None]


@dataclass
class Agreement:
    """Of n rows: `kappa` is Fleiss' κ over rows with two votes or more, None where it is not defined; `pairs` holds for
    two voters (rows on which both voted, rows on which they voted alike); `confusion` for a voter and a majority (1, 2)
    how often it voted 1, 2 or None; `split` the places of the rows on which votes differ. The majority is by weight, as
    it is for the labels; the rest counts every vote alike."""

    voters: list[str]
    kappa: float | None = None
    pairs: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    confusion: dict[tuple[str, int], Counter] = field(default_factory=dict)
    split: list[int] = field(default_factory=list)

    def pair(self, one: str, other: str) -> float | None:
        """The share of their common rows on which two voters cast the same vote."""
        both, alike = self.pairs.get((one, other)) or self.pairs[other, one]
        return alike / both if both else None

    def with_majority(self, voter: str) -> float | None:
        """The share of a voter's votes that are the majority's, over rows that have one."""
        cast = sum(self.confusion[voter, system][vote] for system in (1, 2) for vote in (1, 2))
        return sum(self.confusion[voter, system][system] for system in (1, 2)) / cast if cast else None


def measure(rows: Sequence[Votes], weights: Mapping[str, float] | None = None) -> Agreement:
    """The agreement of the voters of `rows`, each row's votes by voter (1, 2 or None); `weights` of voters, else 1."""
    voters = list(dict.fromkeys(name for votes in rows for name in votes))
    measured = Agreement(voters)
    measured.pairs = {pair: (0, 0) for pair in itertools.combinations(voters, 2)}
    measured.confusion = {(voter, system): Counter() for voter in voters for system in (1, 2)}
    ratings = []
    for place, votes in enumerate(rows):
        first, second = (sum(vote == system for vote in votes.values()) for system in (1, 2))
        ratings.append((first, second))
        if first and second:
            measured.split.append(place)
        for one, other in measured.pairs:
            a, b = votes.get(one), votes.get(other)
            if a is not None and b is not None:
                both, alike = measured.pairs[one, other]
                measured.pairs[one, other] = both + 1, alike + (a == b)
        system = majority(votes, weights or {})
        if system is not None:
            for voter in voters:
                measured.confusion[voter, system][votes.get(voter)] += 1
    measured.kappa = fleiss_kappa(ratings)
    return measured


def fleiss_kappa(ratings: Sequence[tuple[int, ...]]) -> float | None:
    """Fleiss' κ of items by how many raters chose each category; None where it is undefined.

    Items with fewer than two ratings are left out. The number of ratings may differ between items, because some
    teachers do not answer. Source: Fleiss 1971, with each item's agreement over its own pairs of ratings. None where no
    item is left, and where all ratings are of one category (0/0).
    """
    counted = [row for row in ratings if sum(row) >= 2]
    if not counted:
        return None
    total = sum(map(sum, counted))
    chance = sum((sum(column) / total) ** 2 for column in zip(*counted))
    if chance == 1.0:
        return None
    observed = sum(sum(n * (n - 1) for n in row) / (sum(row) * (sum(row) - 1)) for row in counted) / len(counted)
    return (observed - chance) / (1 - chance)
