"""The closing table: the headline figures first, then how each step ended, then what else fits into 60 lines."""

from collections.abc import Sequence
from typing import Any

LINES = 60
# unit -> (what a value is divided by, what is then written), the first that is not larger than the value.
SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "B/s": ((1e12, "TB/s"), (1e9, "GB/s")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
}


def readable(value: float | None, unit: str) -> str:
    """A value with its unit, three figures: 0.00123 s is 1.23 ms."""
    if value is None:
        return "not finite"
    scales = SCALES.get(unit, ())
    for size, name in scales:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    if scales:
        size, name = scales[-1]
        return f"{value / size:.3g} {name}"
    if unit == "%":
        return f"{value:.1f} %"
    return f"{value:.4g} {unit}".strip()


def newest(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(step, case, unit) -> its last result: a run into the same folder replaces what it measured again."""
    return {(line["step"], line["case"], line["unit"]): line for line in lines if line["kind"] == "result"}


def _fair(headlines: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """At most `room` of them: each step's first ones, as many of one step as of another."""
    counts: dict[str, int] = {}
    place = []
    for line in headlines:
        place.append(counts.get(line["step"], 0))
        counts[line["step"]] = place[-1] + 1
    each = max(counts.values(), default=0)
    while each > 1 and sum(min(count, each) for count in counts.values()) > room:
        each -= 1
    return [line for line, of_step in zip(headlines, place) if of_step < each][:room]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """At most LINES - 1 lines: the driver adds the exit status."""
    results = list(newest(lines).values())
    ended = {line["step"]: line for line in lines if line["kind"] == "step"}
    headlines = _fair([line for line in results if "headline" in line], LINES - len(ended) - 8)
    rows = ["== headline", *(f"{readable(line['value'], line['unit']):>14}  {line['headline']}" for line in headlines)]
    rows.append("== steps")
    for step, line in ended.items():
        count = sum(one["step"] == step for one in results)
        wrong = sum(one["step"] == step and one["kind"] == "wrong" for one in lines)
        marks = f"{count} results" + (f", {wrong} WRONG" if wrong else "")
        rows.append(f"{step:<16} {line['status']:<11} {line['seconds']:7.1f} s  {marks}  {line['why'][:60]}".rstrip())
    rest = [(f"{line['step']}: {line['case']}: WRONG, {line['why']}") for line in lines if line["kind"] == "wrong"]
    rest += [
        (f"{line['step']}: {line['case']}: left out, {line['why']}") for line in lines if line["kind"] == "skipped"
    ]
    rest += [
        f"{readable(line['value'], line['unit']):>14}  {line['step']}: {line['case']}"
        for line in results
        if "headline" not in line and not line.get("detail")
    ]
    room = LINES - 2 - len(rows) - 1
    if rest and room > 1:
        rows.append("== more")
        shown = rest if len(rest) <= room else rest[: room - 1]
        rows += [line[:160] for line in shown]
        if len(shown) < len(rest):
            rows.append(f"... {len(rest) - len(shown)} more in results.jsonl")
    return "\n".join(rows[: LINES - 1])
