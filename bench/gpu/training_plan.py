"""`lorapar plan` on a GPU: what it says that stage 1 needs, against what a step reserved and allocated.

Before any weight is loaded the plan runs the model's own code without data; the measured step is ours out of
bench/plain_training.py, whose head is a little smaller or larger than the tiles that the plan counts, and which keeps
no copy to prove the frozen elements by. Positive: the plan says more than was needed.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu import record
from bench.workers import Worker, tell_failure

ASKED = [("nf4", "llama-2-7b"), ("bf16", "llama-2-7b"), ("nf4", "llama-3.1-8b"), ("bf16", "llama-3.1-8b")]
LENGTHS = 8192, 2048
LEAST_TO_LOAD, LEAST_TO_ASK = (1, 1) if record.rehearsal() else (20, 8)


def case_of(base: str, model: str, length: int) -> dict[str, Any]:
    return {
        "way": "ours", "base": "nf4" if base == "nf4" else None, "model": model, "batch": 1, "dtype": "bfloat16",
        "device": record.device(), "length": length, "untimed": 0, "steps": 1,
        "trainer": {"gradient_checkpointing": True},
    }  # fmt: skip


def main() -> None:
    asked, lengths = ASKED, LENGTHS
    if importlib.util.find_spec("bitsandbytes") is None:
        record.skipped("nf4", "bitsandbytes is not installed")
        asked = [one for one in asked if one[0] != "nf4"]
    if record.rehearsal():
        asked, lengths = [(asked[0][0], "tiny")], (64,)
    off: list[float] = []
    upcoming = Worker("bench.plain_training")
    try:
        for number, (base, model) in enumerate(asked):
            with upcoming as worker:
                if number + 1 < len(asked):
                    upcoming = Worker("bench.plain_training")
                for length in lengths:
                    what = f"{base} {model}, {length} tokens"
                    if record.remaining() < (LEAST_TO_LOAD if length == lengths[0] else LEAST_TO_ASK):
                        record.skipped(what, "no time was left")
                        continue
                    # Where the plan itself fails on a GPU, what the step needed is still worth a line.
                    planned = plan(what, case_of(base, model, length))
                    said = worker.ask(case_of(base, model, length), record.remaining() - 3)
                    if "failed" in said or "missing" in said:
                        tell_failure(what, said)
                        break
                    if said.get("out_of_memory"):
                        record.skipped(what, "out of memory")
                        continue
                    off += tell(what, planned, said)
    finally:
        upcoming.close()
    if off:
        record.result("worst", "%", max(off, key=abs), headline="lorapar plan off the reserved peak, at worst")


def tell(what: str, planned: dict[str, int] | None, said: dict[str, Any]) -> list[float]:
    for kind in ("reserved", "allocated"):
        record.result(f"measured | {what} [{kind}]", "B", said[f"{kind}_bytes"])
    if planned is None:
        return []
    record.result(f"planned | {what}", "B", sum(planned.values()), planned=planned)
    off = {kind: 100 * (sum(planned.values()) / said[f"{kind}_bytes"] - 1) for kind in ("reserved", "allocated")}
    for kind, per_cent in off.items():
        record.result(f"plan off | {what} [{kind}]", "%", per_cent)
    return [off["reserved"]]


def plan(what: str, case: dict[str, Any]) -> dict[str, int] | None:
    """The plan's columns in bytes; None, and a line, where it raised."""
    from bench.plain_training import Asked
    from bench.training_cases import folder_without_weights, recipe_of
    from lorapar.memory.needs import COLUMNS, Lengths, need

    try:
        with tempfile.TemporaryDirectory() as folder:
            asked = Asked(**case)
            recipe = recipe_of(asked, str(folder_without_weights(asked.model, Path(folder))))
            needed = need(recipe, Lengths(1, asked.length, "the case"), "sft")
    except Exception as error:
        record.wrong(f"planned | {what}", f"{type(error).__name__}: {error}"[:300])
        return None
    return {column: getattr(needed, column) for column in COLUMNS}
