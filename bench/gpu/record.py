"""What a step says: one JSON line a result, appended and fsynced the moment it exists.

A line holds the program, step and case; `unit` and `value` with the 20th, 50th and 80th percentile; the GPU, driver,
versions and commit; the time; and whatever facts the step adds. The driver hands the rest over in the environment:

    LORAPAR_GPU_RESULTS    the file to append to
    LORAPAR_GPU_STEP       the step's name
    LORAPAR_GPU_FACTS      JSON with what every line repeats: program, gpu, driver, versions, commit
    LORAPAR_GPU_DEVICE     cuda, or cpu for a rehearsal: small shapes, figures without meaning
    LORAPAR_GPU_DEADLINE   seconds since the epoch at which the step is ended
    LORAPAR_GPU_INJECT     crash:STEP, hang:STEP or raise:STEP, several with commas: that fault strikes this step

Without them (a step run by hand) lines go to the terminal alone.
"""

import ctypes
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAULTS = ("crash", "hang", "raise")


def device() -> str:
    """ "cuda", or "cpu" in a rehearsal."""
    return os.environ.get("LORAPAR_GPU_DEVICE", "cuda")


def rehearsal() -> bool:
    """Whether this is a rehearsal on a CPU: a step then takes its small shapes."""
    return device() == "cpu"


def remaining() -> float:
    """Seconds until the driver ends this step; a step with many cases stops by itself before then."""
    return float(os.environ.get("LORAPAR_GPU_DEADLINE", "inf")) - time.time()


def result(
    case: str,
    unit: str,
    value: float,
    p20: float | None = None,
    p50: float | None = None,
    p80: float | None = None,
    headline: str | None = None,
    **facts: Any,
) -> None:
    """One result. unit: "s", "x", "%", "B", "B/s", "FLOP/s", "tokens/s", ...; SI units, no prefixes.

    p20, p50, p80: percentiles of several readings; null where there was one. headline: the words by which the closing
    table shows this result first. facts: whatever else JSON can hold; detail=True: the tables may leave it out.
    """
    readings = {"value": float(value), "p20": p20, "p50": p50, "p80": p80}
    said = {} if headline is None else {"headline": headline}
    _line({"kind": "result", "case": case, "unit": unit, **readings, **said, **facts})


def spread(case: str, unit: str, values: Sequence[float], headline: str | None = None, **facts: Any) -> float:
    """One result of several readings: its value is their median, which is returned."""
    p20, p50, p80 = percentiles(values)
    result(case, unit, p50, p20, p50, p80, headline, readings=len(values), **facts)
    return p50


def skipped(case: str, why: str) -> None:
    """A case that could not be run here, and why: it stands in the table, so that it cannot look like success."""
    _line({"kind": "skipped", "case": case, "why": why})


def wrong(case: str, why: str, **facts: Any) -> None:
    """A case that ran and gave a wrong result. The step continues; run.py exits with 1 at its end."""
    global _wrong
    _wrong += 1
    _line({"kind": "wrong", "case": case, "why": why, **facts})


def wrongs() -> int:
    """How many cases of this process were wrong."""
    return _wrong


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th by linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def append(path: str, line: dict[str, Any]) -> None:
    """One line, whole and on disk when this returns; lines of several processes never mix (O_APPEND, one write).

    Errors name files of the checkout by their place in it: where it lies on a machine is nobody's business.
    """
    text = json.dumps({key: _finite(value) for key, value in line.items()}) + "\n"
    text = text.replace(f"{ROOT}{os.sep}", "")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def strike() -> None:
    """The fault that LORAPAR_GPU_INJECT wants of this step; called after its first result, and at its end."""
    step = os.environ.get("LORAPAR_GPU_STEP", "")
    for wish in filter(None, os.environ.get("LORAPAR_GPU_INJECT", "").split(",")):
        fault, _, target = wish.partition(":")
        if target != step:
            continue
        if fault == "crash":
            ctypes.string_at(0)
        if fault == "hang":
            # As a kernel that never ends: only KILL helps.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(60)
        raise RuntimeError(f"LORAPAR_GPU_INJECT asked {step} to raise")


_wrong = 0


def _line(said: dict[str, Any]) -> None:
    facts = json.loads(os.environ.get("LORAPAR_GPU_FACTS", "{}"))
    line = {"step": os.environ.get("LORAPAR_GPU_STEP", ""), **said, **facts, "time": now()}
    path = os.environ.get("LORAPAR_GPU_RESULTS")
    if path:
        append(path, line)
    # The log tells a reader what the results file tells a program.
    print(" ".join(f"{key}={value}" for key, value in said.items()), file=sys.stderr, flush=True)
    strike()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
