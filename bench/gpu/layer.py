"""One LoRA layer, forward and backward, at 8,192 tokens: what it costs over the frozen one, and in which kernels.

Rank 16, dropout 0.05, element masks that keep 40 %, bf16 with fp32 factors. In the order in which it tells most: every
shape at dropout 0.05, then their kernels one by one, then dropout 0, where `addmm_` can take part.
"""

from dataclasses import asdict

import torch

from bench.gpu import cases, record, timing
from bench.lora_layers import ADDMM, FROZEN, OURS, PEFT, PEFT_NARROW, Layer, Made, Way

TOLD = (OURS["plain"], OURS["fused"], PEFT, PEFT_NARROW)
# A GPU's seconds for one shape at most, of which graph capture and warming are the most.
SECONDS = 8.0


def layers(p: float, device: str) -> list[Layer]:
    return [
        Layer(cases.tokens(), n_in, n_out, cases.RANK, p, torch.bfloat16, device, cases.ACTIVE)
        for n_in, n_out in cases.shapes()
    ]


def launches(device: str) -> None:
    for p in (cases.P, 0.0):
        for layer in layers(p, device):
            cases.launch_layer(layer)


def main() -> None:
    cases.begin()
    for layer in layers(cases.P, record.device()):
        measure(layer)
    for layer in layers(cases.P, record.device()):
        trace(layer)
    for layer in layers(0.0, record.device()):
        measure(layer)


def ways_of(case: str, made: Made) -> dict[str, Way]:
    ways = {FROZEN: made.frozen(), **cases.ours(made, unmasked=True), **cases.peft_ways(case, made)}
    return ways | ({ADDMM: made.addmm()} if made.layer.p == 0.0 else {})


def measure(layer: Layer) -> None:
    case = cases.label(layer)
    if not cases.enough_time(case, SECONDS):
        return
    made = Made(layer)
    ways = ways_of(case, made)
    results = cases.tried(case, ways)
    cases.compared(case, made, ways, results)
    del results
    facts = {**asdict(layer), "frozen_flops": layer.frozen_flops(), "least_bytes": layer.least_bytes()}
    facts["dtype"] = str(layer.dtype)
    medians = timing.say(case, timing.times(ways), **facts)
    cases.say_over(case, medians, FROZEN, TOLD if layer.p > 0.0 else (OURS["plain"], ADDMM))
    for name, way in ways.items():
        record.result(f"{case} | {name} [peak memory]", "B", timing.peak_bytes(way), way=name)


def trace(layer: Layer) -> None:
    """Seconds of each kernel of one call."""
    case = cases.label(layer)
    if not cases.enough_time(f"{case}, kernels", SECONDS):
        return
    made = Made(layer)
    ways = {FROZEN: made.frozen(), **cases.ours(made), **cases.peft_ways(case, made)}
    for name, way in ways.items():
        try:
            found = timing.kernels(way)
        # Told already where it was timed.
        except Exception as error:
            record.skipped(f"{case} | {name} | kernels", cases.one_line(error))
            continue
        record.result(f"{case} | {name} | kernels", "launches", sum(count for count, _ in found.values()), way=name)
        for kernel, (count, seconds) in found.items():
            record.result(f"{case} | {name} | {kernel[:80]}", "s", seconds, launches=count, way=name, kernel=kernel)
