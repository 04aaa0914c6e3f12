"""`top_mass` against a sort with a running sum, at SmolLM2-135M's and a 7B's number of LoRA elements (r = 8)."""

import pytest
import torch

import lorapar_kernels as lk
from bench.interleaved import interleave

THETA = 0.9


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
    ways = {"ours": lambda: lk.top_mass(scores, THETA), "torch.sort and cumsum": lambda: by_sorting(scores)}
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"top_mass {device} {elements / 1e6:.2f} M", ways, device, rounds=5)
    assert torch.equal(timed.results["ours"], timed.results["torch.sort and cumsum"])
    timed.facts = {"elements": elements, "kept": int(timed.results["ours"].sum())}
    report(timed)
