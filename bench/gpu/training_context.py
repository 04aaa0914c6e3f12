"""The longest row of which a training step fits under 24 GB of reserved memory, ours and with PEFT's layers.

Llama-2-7B's shape with random weights, in NF4 and in bf16; the step is bench/plain_training.py's, without off-loading.
Peak memory is close to a line over the tokens: two short rows give the line, and the bisection begins around
where it meets the cap. Every bound that is reported was run: `longest` fits, `too_long` does not.
"""

import importlib.util
from collections.abc import Callable

from bench.gpu import record
from bench.workers import Worker, tell_failure

CAP = 24 * 10**9
MODEL = "llama-2-7b"
ASKED = [("nf4", "ours"), ("nf4", "peft"), ("bf16", "ours"), ("bf16", "peft")]
NAMES = {"ours": "ours", "peft": "PEFT's layers"}
SHORT = 4096, 8192
REHEARSED = 20_000  # tokens that fit where nothing is measured
STEP = 256  # tokens a length is a multiple of
LEAST_TO_LOAD, LEAST_TO_ASK = (1, 1) if record.rehearsal() else (25, 8)


class NoTime(Exception):
    """The next length would not end in time."""


class NoAnswer(Exception):
    """The worker has ended; what it said is the argument."""


def main() -> None:
    asked, longest = ASKED, {}
    model = "tiny" if record.rehearsal() else MODEL
    if importlib.util.find_spec("bitsandbytes") is None:
        record.skipped("nf4", "bitsandbytes is not installed")
        asked = [one for one in asked if one[0] != "nf4"]
    if record.rehearsal():
        asked = asked[:2]
    upcoming = Worker("bench.plain_training")
    try:
        for number, (base, way) in enumerate(asked):
            with upcoming as worker:
                if number + 1 < len(asked):
                    upcoming = Worker("bench.plain_training")
                case = f"{NAMES[way]} | {base} {model} under {CAP / 1e9:.0f} GB"
                if record.remaining() < LEAST_TO_LOAD:
                    record.skipped(case, "no time was left")
                    continue
                search(worker, base, model, way, case, longest)
            if way == "peft" and longest.get((base, "ours")) and longest.get((base, "peft")):
                words = f"longest row over PEFT's layers under {CAP / 1e9:.0f} GB, {base} {model}"
                ratio = longest[base, "ours"] / longest[base, "peft"]
                record.result(f"ours over PEFT's layers | {base} {model}", "x", ratio,
                              headline=words if base == asked[0][0] else None)  # fmt: skip
    finally:
        upcoming.close()


def search(worker: Worker, base: str, model: str, way: str, case: str, longest: dict[tuple[str, str], int]) -> None:
    """Find the bounds, and record what is known where the time ends before they are near each other."""
    rehearsal = record.rehearsal()
    low, high, peaks, took = 0, 0, {}, 0.0

    def peak_at(length: int) -> int | None:
        """Bytes reserved, None where it does not fit."""
        nonlocal took
        # Attention takes more than the length's share; as much again is left for that.
        if record.remaining() < max(LEAST_TO_ASK, 2 * took * length):
            raise NoTime
        said = worker.ask(
            {"way": way, "base": "nf4" if base == "nf4" else None, "model": model, "batch": 1,
             "dtype": "bfloat16", "device": record.device(), "length": length, "untimed": 0, "steps": 1, "cap": CAP},
            record.remaining() - 3,
        )  # fmt: skip
        if "failed" in said or "missing" in said:
            raise NoAnswer(said)
        if "seconds" in said:
            took = said["seconds"][-1] / length
        return None if said.get("out_of_memory") else said["reserved_bytes"]

    def fits(length: int) -> bool:
        nonlocal low, high
        # In a rehearsal nothing is capped: a made-up bound drives the same search.
        peak = peak_at(length) if not rehearsal else peak_at(64) and (1 if length < REHEARSED else None)
        low, high = (low, length) if peak is None else (length, high)
        if peak is not None:
            peaks[length] = peak
        return peak is not None

    try:
        if all(fits(length) for length in SHORT):
            bracket(fits, where_it_meets(peaks), lambda: (low, high))
        if low:
            halve(fits, lambda: (low, high))
    except NoTime:
        record.skipped(
            f"{case} [nearer bounds]", f"no time was left; {low} tokens fit, {high or 'nothing known'} do not"
        )
    except NoAnswer as error:
        tell_failure(f"{case} [nearer bounds]", error.args[0])
    if not low and not high:
        return
    near = 0 < high <= low + max(low // 16, STEP)
    if near:
        longest[base, way] = low
    record.result(case if near else f"{case} [at least]", "tokens", low, way=NAMES[way], too_long=high or None,
                  reserved_bytes=peaks.get(low), cap_bytes=CAP,
                  peaks={str(length): peak for length, peak in peaks.items()})  # fmt: skip


def where_it_meets(peaks: dict[int, int]) -> int:
    """Tokens at which a line through the two short rows' peaks reaches the cap."""
    if record.rehearsal():
        return REHEARSED + 100
    (x0, y0), (x1, y1) = sorted(peaks.items())[:2]
    slope = max(y1 - y0, 1) / (x1 - x0)
    return int(x1 + (CAP - y1) / slope)


def bracket(fits: Callable[[int], bool], guess: int, bounds: Callable[[], tuple[int, int]]) -> None:
    """Try a little below the guess and a little above it, wider each time, until one fits and one does not."""
    step = max(guess // 32, STEP)
    while guess - step > bounds()[0] and not fits(rounded(guess - step)):
        step *= 2
    step = max(guess // 32, STEP)
    while not bounds()[1]:
        fits(rounded(max(guess, bounds()[0]) + step))
        step *= 2


def halve(fits: Callable[[int], bool], bounds: Callable[[], tuple[int, int]]) -> None:
    """Halve what is between the bounds, to a sixteenth of the lower."""
    low, high = bounds()
    while high - low > max(low // 16, STEP):
        fits(rounded((low + high) // 2))
        low, high = bounds()


def rounded(length: int) -> int:
    return max(length // STEP, 1) * STEP
