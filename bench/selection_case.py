"""`top_mass` and other ways of one selection, of heavy-tailed scores as |g φ| has them."""

from collections.abc import Callable

import torch

import lorapar_kernels as lk

THETA = 0.9
SWEEP = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
SORT, SHARES, COPY = "torch.sort and cumsum", f"ours, {len(SWEEP)} shares", "a copy of the scores"
# LoRA elements of SmolLM2-135M and of a Llama-2-7B at r = 8.
ELEMENTS = {"135m": 2_165_760, "7b": 17_891_328}


def by_sorting(scores: torch.Tensor) -> torch.Tensor:
    values, order = scores.sort(descending=True, stable=True)
    mass = values.cumsum(0, dtype=torch.float64)
    count = int((mass < THETA * mass[-1]).sum()) + 1
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def selection_ways(elements: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """name -> a call that gives the mask (the copy: the scores); ours first."""
    generator = torch.Generator().manual_seed(0)
    # A product of normals: heavy-tailed, as |g φ| is.
    scores = torch.randn(elements, generator=generator).mul_(torch.randn(elements, generator=generator)).abs_()
    scores = scores.to(device)
    target = torch.empty_like(scores)
    return {
        "ours": lambda: lk.top_mass(scores, THETA),
        SORT: lambda: by_sorting(scores),
        SHARES: lambda: lk.top_mass(scores, SWEEP)[SWEEP.index(THETA)],
        COPY: lambda: target.copy_(scores),
    }
