"""Time several ways of one thing in turns, A B A B, so that a machine that drifts drifts for all of them.

pytest-benchmark times our way; the others run in its set-up, right before each of our rounds. A case checks the results
for equality between `interleave` and `report`, so a speed-up of a wrong result is never printed.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timed:
    """Seconds a call of every way, our way first, and what the last call of each returned.

    `cpu_seconds` is this process's CPU time over all threads: what a machine that others use cannot stretch.
    """

    case: str
    device: str
    seconds: dict[str, list[float]]
    results: dict[str, Any]
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    required: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next(iter(self.seconds))

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def speedup(self, way: str) -> float:
        """How many times as fast as `way` ours is: the ratio of the medians."""
        return self.median(way) / self.median(self.ours)

    def cpu_speedup(self, way: str) -> float:
        """The same ratio in CPU time."""
        return statistics.median(self.cpu_seconds[way]) / statistics.median(self.cpu_seconds[self.ours])

    def short(self) -> list[str]:
        """What was required and not reached, a line each."""
        return [
            f"{self.case}: {self.speedup(way):.2f} times as fast as {way}, required {least}"
            for way, least in self.required.items()
            if self.speedup(way) < least
        ]

    def as_json(self) -> dict[str, Any]:
        ways = {
            way: {
                "median_s": self.median(way),
                "p20_s": percentile(times, 20),
                "p80_s": percentile(times, 80),
                "min_s": min(times),
                "max_s": max(times),
                "rounds": len(times),
            }
            for way, times in self.seconds.items()
        }
        others = list(self.seconds)[1:]
        speedup = {way: self.speedup(way) for way in others}
        cpu = {way: self.cpu_speedup(way) for way in others}
        return {
            "ours": self.ours,
            "ways": ways,
            "speedup": speedup,
            "speedup_cpu_time": cpu,
            "required": self.required,
            **self.facts,
        }


def percentile(times: list[float], percent: int) -> float:
    """By linear interpolation; the one time there is, where there is one."""
    return times[0] if len(times) == 1 else statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def interleave(
    benchmark: Any,
    case: str,
    ways: Mapping[str, Callable[[], Any]],
    device: str = "cpu",
    rounds: int = 5,
    calls: int = 1,
) -> Timed:
    """Run every way `rounds` times in turns, `calls` calls each time, and keep the seconds a call.

    Args:
        benchmark: pytest-benchmark's fixture. ways: name -> a call without arguments, our way first.
        device: "cpu" or "cuda", where the clock waits for the kernels at both ends.

    A case warms up by calling what it times before. `--benchmark-disable` runs one round.
    """
    ours, *others = ways
    timed = Timed(case, device, {way: [] for way in ways}, {}, {way: [] for way in ways})

    def run(way: str) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(calls):
            timed.results[way] = ways[way]()
        if device == "cuda":
            torch.cuda.synchronize()
        timed.seconds[way].append((time.perf_counter() - began) / calls)
        timed.cpu_seconds[way].append((time.process_time() - cpu_began) / calls)

    def run_others() -> None:
        for way in others:
            run(way)

    benchmark.pedantic(lambda: run(ours), setup=run_others, rounds=rounds)
    return timed
