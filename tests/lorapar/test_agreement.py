"""Agreement of voters against sums done by hand and by exact fractions."""

import random
from fractions import Fraction

import pytest

from lorapar.labeling.agreement import fleiss_kappa, measure


def test_kappa_of_the_published_example():
    # Fleiss's own table form: 10 subjects, 14 raters, 5 categories; kappa 0.210.
    table = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1), (7, 7, 0, 0, 0),
             (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]  # fmt: skip
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)


def exact(ratings):
    """Agreement of two ratings drawn from one item, over what chance gives, in fractions, by counting pairs."""
    items = [[c for c, n in enumerate(row) for _ in range(n)] for row in ratings if sum(row) >= 2]
    observed = sum(
        Fraction(sum(a == b for i, a in enumerate(item) for j, b in enumerate(item) if i != j),
                 len(item) * (len(item) - 1)) for item in items
    ) / len(items)  # fmt: skip
    everything = [c for item in items for c in item]
    chance = sum(Fraction(everything.count(c), len(everything)) ** 2 for c in set(everything))
    return (observed - chance) / (1 - chance)


def test_kappa_with_missing_votes_is_that_of_counted_pairs():
    draw = random.Random(0)
    for _ in range(50):
        ratings = [(draw.randint(0, 4), draw.randint(0, 4)) for _ in range(30)]
        assert fleiss_kappa(ratings) == pytest.approx(float(exact(ratings)), abs=1e-12)


def test_kappa_is_undefined_where_it_says_nothing():
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([(1, 0), (0, 1)]) is None
    assert fleiss_kappa([(3, 0), (3, 0)]) is None
    assert fleiss_kappa([(3, 0), (0, 3)]) == 1.0
    assert fleiss_kappa([(1, 1), (1, 1)]) == -1.0


def test_pairs_confusion_and_split():
    rows = [
        {"a": 1, "b": 1, "c": 2},
        {"a": 2, "b": 2, "c": 2},
        {"a": 1, "b": None, "c": 2},
        {"a": None, "b": None, "c": None},
        {"a": 1, "b": 1, "c": None},
    ]
    found = measure(rows)
    assert found.voters == ["a", "b", "c"]
    assert found.pairs == {("a", "b"): (3, 3), ("a", "c"): (3, 1), ("b", "c"): (2, 1)}
    assert found.pair("c", "a") == pytest.approx(1 / 3)
    assert found.split == [0, 2]
    # The majorities: row 0 System 1, row 1 System 2, row 2 a tie, row 3 none, row 4 System 1.
    assert dict(found.confusion["c", 1]) == {2: 1, None: 1}
    assert dict(found.confusion["c", 2]) == {2: 1}
    assert [found.with_majority(voter) for voter in "abc"] == [1.0, 1.0, 0.5]
    assert measure([{"a": 1, "b": None}]).pair("a", "b") is None


def test_the_majority_is_by_weight_and_kappa_is_not():
    rows = [{"a": 1, "b": 2, "c": 2}, {"a": None, "b": 1, "c": 2}, {"a": 2, "b": 1, "c": 1}]
    plain, weighted = measure(rows), measure(rows, {"a": 3.0})
    assert [plain.with_majority(voter) for voter in "abc"] == [0.0, 1.0, 1.0]
    assert [weighted.with_majority(voter) for voter in "abc"] == [1.0, 0.0, 0.0]
    assert dict(weighted.confusion["b", 1]) == {2: 1}
    assert dict(weighted.confusion["b", 2]) == {1: 1}
    assert (weighted.kappa, weighted.pairs, weighted.split) == (plain.kappa, plain.pairs, plain.split)
    # 0.1 + 0.2 against 0.3: a tie, which has no majority.
    assert measure(rows[:1], {"a": 0.3, "b": 0.1, "c": 0.2}).with_majority("a") is None
