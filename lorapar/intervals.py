"""How sure a figure over rows is: intervals of shares and means, and the test of a change between paired answers."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
RESAMPLES = 2000


def wilson(successes: int, trials: int) -> list[float]:
    """The Wilson score interval of a proportion at 95 % (Wilson 1927): [low, high]."""
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At 0 and at 1 rounding could leave the share itself just outside.
    return [min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))]


def bootstrap(values: Sequence[float]) -> list[float]:
    """The percentile bootstrap's 95 % interval of a mean (Efron 1979): [low, high], the same at every call.

    2,000 resamples. It stays within the values' range, as a normal interval does not; of few rows it is narrow.
    """
    draw, sample = np.random.default_rng(0), np.asarray(values, dtype=np.float64)
    means = [sample[draw.integers(len(sample), size=len(sample))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def mcnemar(one_way: int, other_way: int) -> float:
    """The exact two-sided p value of McNemar's test (McNemar 1947), from the pairs that changed either way.

    The chance of a split at least as uneven if each changed pair were as likely to have changed one way as the other:
    a binomial at one half. 1 where no pair changed.
    """
    changed, fewer = one_way + other_way, min(one_way, other_way)
    # Whole numbers until the division: thousands of pairs would underflow as floats.
    tail, term = 0, 1
    for k in range(fewer + 1):
        tail += term
        term = term * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2**changed)
