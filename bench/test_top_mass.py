"""`top_mass` against a sort with a running sum, at SmolLM2-135M's and a 7B's number of LoRA elements (r = 8)."""

import pytest
import torch

from bench.interleaved import interleave
from bench.selection_case import COPY, ELEMENTS, SHARES, SORT, selection_ways

# Seconds that the 7B's selection may take, by device.
MOST = {"cpu": 0.4, "cuda": 0.005}


@pytest.mark.parametrize("model", ELEMENTS)
def test_top_mass(benchmark, report, device, model):
    elements = ELEMENTS[model]
    ways = selection_ways(elements, device)
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"top_mass {device} {elements / 1e6:.2f} M", ways, device, rounds=5)
    assert torch.equal(timed.results["ours"], timed.results[SORT])
    assert torch.equal(timed.results["ours"], timed.results[SHARES])
    # Three readings of the scores and one byte of mask; a copy reads and writes.
    share = 13 / timed.median("ours") / (8 / timed.median(COPY))
    timed.facts = {"elements": elements, "kept": int(timed.results["ours"].sum()), "share_of_a_copys_bandwidth": share}
    report(timed)
    # After the report: a figure that is short is still a figure.
    if model == "7b":
        assert timed.median("ours") < MOST[device]
