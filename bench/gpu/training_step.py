"""A training step of a 7B and an 8B shape, our layers beside PEFT's: tokens a second and peak memory.

The loop is bench/plain_training.py's for both: one row, gradient checkpointing, loss on all positions, random weights
in bf16 and in NF4. Ours takes the head in pieces and trains 40 % of the elements; PEFT's has transformers' head and
loss and torch's fused AdamW. "ours, whole head" has our layers and optimizer under transformers' head and loss, so that
the head's share can be told from the layers'. A peak is what the allocator had reserved, the model's own included.
"""

import importlib.util
import statistics
from typing import Any

from bench.gpu import record
from bench.workers import Worker, tell_failure

# The most telling first. "whole" is ours with transformers' head, at the first length alone.
ASKED = [
    ("nf4", "llama-2-7b", ("ours", "peft", "whole")),
    ("bf16", "llama-2-7b", ("ours", "peft")),
    ("nf4", "llama-3.1-8b", ("ours", "peft")),
    ("bf16", "llama-3.1-8b", ("ours", "peft", "whole")),
]
LENGTHS = 8192, 2048, 32768
NAMES = {"ours": "ours", "peft": "PEFT's layers", "whole": "ours, whole head"}
# Seconds under which no model is loaded, and no case begun.
LEAST_TO_LOAD, LEAST_TO_ASK = (1, 1) if record.rehearsal() else (25, 8)
# Seconds after which a case is given up, so that one that hangs does not take the others' time too.
MOST_FOR_A_CASE = 120


def case_of(way: str, base: str, model: str, length: int) -> dict[str, Any]:
    long = length > 16384
    return {
        "way": "peft" if way == "peft" else "ours", "whole_head": way == "whole", "model": model, "batch": 1,
        "base": "nf4" if base == "nf4" else None, "dtype": "bfloat16", "device": record.device(), "length": length,
        "untimed": 1, "steps": 1 if long else 3,
    }  # fmt: skip


def main() -> None:
    asked, lengths = ASKED, LENGTHS
    if importlib.util.find_spec("bitsandbytes") is None:
        for base, model, _ in asked:
            if base == "nf4":
                record.skipped(f"nf4 {model}", "bitsandbytes is not installed")
        asked = [one for one in asked if one[0] != "nf4"]
    if record.rehearsal():
        asked, lengths = [(asked[0][0], "tiny", ("ours", "peft"))], (64, 32)
    found: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    units = [(base, model, way) for base, model, ways in asked for way in ways]
    headline = (*asked[0][:2], "peft", lengths[0])
    with_next = Worker("bench.plain_training")
    try:
        for number, (base, model, way) in enumerate(units):
            with with_next as worker:
                if number + 1 < len(units):
                    with_next = Worker("bench.plain_training")
                a_token = 0.0
                for length in lengths[:1] if way == "whole" else lengths:
                    what = f"{base} {model}, {length} tokens"
                    # As much again as the length's share: attention takes more than that.
                    steps = sum(case_of(way, base, model, length)[key] for key in ("untimed", "steps"))
                    needed = max(LEAST_TO_ASK, 2 * a_token * length * steps)
                    if record.remaining() < (LEAST_TO_LOAD if length == lengths[0] else needed):
                        record.skipped(f"{NAMES[way]} | {what}", "no time was left")
                        continue
                    said = worker.ask(case_of(way, base, model, length), min(record.remaining() - 3, MOST_FOR_A_CASE))
                    found[base, model, way, length] = said
                    if "seconds" in said:
                        a_token = max(said["seconds"]) / length
                    tell(way, what, said)
                    compare(found, base, model, way, length, what, (base, model, way, length) == headline)
                    if "failed" in said:
                        break
    finally:
        with_next.close()


def tell(way: str, what: str, said: dict[str, Any]) -> None:
    case = f"{NAMES[way]} | {what}"
    if "failed" in said or "missing" in said:
        tell_failure(case, said)
    elif said.get("out_of_memory"):
        record.result(f"{case} [fits]", "", 0, way=NAMES[way], out_of_memory=True)
    else:
        facts = {"way": NAMES[way], "losses": said["losses"], "load_seconds": said["load_seconds"]}
        record.spread(f"{case} [speed]", "tokens/s", [said["length"] / s for s in said["seconds"]], **facts)
        record.result(f"{case} [reserved peak]", "B", said["reserved_bytes"], way=NAMES[way],
                      allocated_bytes=said["allocated_bytes"], before_bytes=said["before_bytes"],
                      model_bytes=said["model_bytes"])  # fmt: skip


def compare(
    found: dict[tuple[str, str, str, int], dict[str, Any]],
    base: str, model: str, way: str, length: int, what: str, headline: bool,
) -> None:  # fmt: skip
    """Ours over PEFT's, the moment both are there; the losses of the same tokens must be near each other first."""
    ours, peft = (found.get((base, model, one, length)) for one in ("whole" if way == "whole" else "ours", "peft"))
    if way == "ours" or ours is None or peft is None or "seconds" not in ours or "seconds" not in peft:
        return
    name = NAMES["whole" if way == "whole" else "ours"]
    one, other = ours["losses"][0], peft["losses"][0]
    # One has trained 40 % of the elements for a step or two, the other all.
    if not abs(one - other) <= 0.01 * abs(other):
        record.wrong(f"{name} over PEFT's layers | {what}", f"losses {one} and {other} of the same tokens")
        return
    speed = statistics.median(peft["seconds"]) / statistics.median(ours["seconds"])
    peak = ours["reserved_bytes"] / peft["reserved_bytes"]
    words = (f"{name} over PEFT's layers, {what}: tokens/s", f"{name} over PEFT's layers, {what}: peak memory")
    said: tuple[str | None, str | None] = words if headline else (None, None)
    record.result(f"{name} over PEFT's layers | {what} [speed]", "x", speed, headline=said[0])
    record.result(f"{name} over PEFT's layers | {what} [reserved peak]", "x", peak, headline=said[1])
