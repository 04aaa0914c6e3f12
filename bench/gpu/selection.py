"""`top_mass` over a 7B's 17.9 M LoRA elements (r = 8): GPU time by the profiler, and by the clock, waits included."""

import torch

from bench.gpu import record, timing
from bench.selection_case import ELEMENTS, SHARES, SORT, selection_ways


def main() -> None:
    elements = 10_000 if record.rehearsal() else ELEMENTS["7b"]
    ways = selection_ways(elements, record.device())
    mask = ways["ours"]()
    for other in (SORT, SHARES):
        if not torch.equal(mask, ways[other]()):
            record.wrong(f"{elements} scores", f"ours and {other} keep different elements")
    name = f"{elements / 1e6:.1f} M scores"
    # It reads back how many there are, so that it waits for the GPU within a call: only the clock sees all of it.
    medians = timing.say(name, timing.times(ways, ("clock",)), elements=elements, kept=int(mask.sum()))
    record.result(f"{name} | ours", "s", medians["ours"]["clock"], headline=f"top_mass of {name}, by the clock")
    record.result(f"{name} | a sort against ours", "x", medians[SORT]["clock"] / medians["ours"]["clock"])
    for way in ("ours", SHARES):
        kernels = timing.kernels(ways[way])
        for kernel, (launches, seconds) in kernels.items():
            record.result(f"{name} | {way} | {kernel[:80]}", "s", seconds, launches=launches)
        if kernels:
            total = sum(seconds for _, seconds in kernels.values())
            record.result(
                f"{name} | {way}, kernels alone", "s", total, headline=f"top_mass of {name}: {way}, kernels alone"
            )
