"""A test passes or fails by the code, not by what was drawn: conftest.py seeds each; none seeds itself by chance."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

# Generators that start differently in every process, and property tests that choose their examples anew.
BY_CHANCE = re.compile(
    r"\btorch\.seed\(\)|\.seed\(\)|random\.Random\(\)|default_rng\(\)|SystemRandom|@settings\((?:(?!derandomize=True)[^)])*\)"
)


@pytest.mark.parametrize("again", [False, True])
def test_every_test_draws_the_same(again):
    torch.rand(5), random.random(), np.random.random()
    assert torch.initial_seed() == 0
    drawn = float(torch.rand(1)), random.random(), np.random.random()
    assert drawn == pytest.approx((0.6340786814689636, 0.7579544029403025, 0.7151893663724195))


def test_no_test_seeds_itself_by_chance():
    for source in ("torch.seed()", "generator.seed()", "random.Random()", "np.random.default_rng()", "@settings(a=1)"):
        assert BY_CHANCE.search(source)
    files = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__)]
    assert len(files) > 50
    found = [
        f"{path.name}: {by_chance.group()}" for path in files for by_chance in BY_CHANCE.finditer(path.read_text())
    ]
    assert found == []
