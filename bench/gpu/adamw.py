"""A step of `masked_adamw` over a 7B's LoRA elements (r = 8), 40 % and all of them active, fp32 and 8-bit moments.

Its number is an int, or is read from memory, as in a CUDA graph.
"""

from bench.gpu import record, timing
from bench.optimizer_case import COPY, EIGHT_BIT, FUSED, IN_MEMORY, optimizer_case


def main() -> None:
    model = "small" if record.rehearsal() else "7b"
    for active in (0.4, 1.0):
        case = optimizer_case(model, active, record.device())
        name = f"{case.elements / 1e6:.1f} M, {active:.0%} active"
        # Another way of timing calls each way as often as the others, so all stay at one step.
        found = timing.times(case.ways, ("events", "clock"), calls=4)
        case.check()
        medians = timing.say(name, found, elements=case.elements, kept=case.kept)
        for kind in ("events", "clock"):
            for way in ("ours", IN_MEMORY, EIGHT_BIT):
                words = f"AdamW {name}: {way} against {FUSED}, by {kind}" if active < 1.0 else None
                record.result(f"{name} | {way} against fused [{kind}]", "x",
                              medians[FUSED][kind] / medians[way][kind], headline=words)  # fmt: skip
        record.result(f"{name} | ours", "B/s", case.moved() / medians["ours"]["events"])
        record.result(f"{name} | a copy", "B/s", 24 * case.elements / medians[COPY]["events"])
        for words, bytes_ in zip(("fp32", "8-bit"), case.state):
            record.result(f"{name} | moments, {words}", "B", bytes_)
