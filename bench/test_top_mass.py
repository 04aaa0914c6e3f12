"""`top_mass` against a sort with a running sum, at SmolLM2-135M's and a 7B's number of LoRA elements (r = 8)."""

import pytest
import torch

import lorapar_kernels as lk
from bench.interleaved import interleave

THETA = 0.9
SWEEP = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
# Seconds that the 7B's selection may take, by device.
MOST = {"cpu": 0.4, "cuda": 0.005}


def by_sorting(scores: torch.Tensor) -> torch.Tensor:
    values, order = scores.sort(descending=True, stable=True)
    mass = values.cumsum(0, dtype=torch.float64)
    count = int((mass < THETA * mass[-1]).sum()) + 1
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


@pytest.mark.parametrize("elements", [2_165_760, 17_891_328], ids=["135m", "7b"])
def test_top_mass(benchmark, report, device, elements):
    generator = torch.Generator().manual_seed(0)
    # A product of normals: heavy-tailed, as |g φ| is.
    scores = torch.randn(elements, generator=generator).mul_(torch.randn(elements, generator=generator)).abs_()
    scores = scores.to(device)
    target = torch.empty_like(scores)
    ways = {
        "ours": lambda: lk.top_mass(scores, THETA),
        "torch.sort and cumsum": lambda: by_sorting(scores),
        f"ours, {len(SWEEP)} shares": lambda: lk.top_mass(scores, SWEEP)[SWEEP.index(THETA)],
        "a copy of the scores": lambda: target.copy_(scores),
    }
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"top_mass {device} {elements / 1e6:.2f} M", ways, device, rounds=5)
    assert torch.equal(timed.results["ours"], timed.results["torch.sort and cumsum"])
    assert torch.equal(timed.results["ours"], timed.results[f"ours, {len(SWEEP)} shares"])
    if elements > 10_000_000:
        assert timed.median("ours") < MOST[device]
    # Three readings of the scores and one byte of mask; a copy reads and writes.
    share = 13 / timed.median("ours") / (8 / timed.median("a copy of the scores"))
    timed.facts = {"elements": elements, "kept": int(timed.results["ours"].sum()), "share_of_a_copys_bandwidth": share}
    report(timed)
