"""tests/kernels on this GPU, for as long as there is time: in several processes, those that are not slow first.

A test that fails is a line of its own the moment it fails. A process whose CUDA context an illegal access has poisoned
is ended with the first test after it, so that the others' results stand.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import record

ROOT = Path(__file__).parents[2]
# Seconds before the limit at which no further test is begun: most of a test's time goes into compiling.
MARGIN, SLOW_MARGIN = 15.0, 60.0
# What a rehearsal runs, and for how many seconds it begins another test.
QUICK, REHEARSED = ("tests/kernels/test_tiles.py", "tests/kernels/test_bitmask.py"), 6.0
POISON = "illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert"
# Tests between two lines that count them.
EVERY = 20


def main() -> None:
    parts = 2 if record.rehearsal() else max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-c", "import sys; from bench.gpu.matrix import part; sys.exit(part(*sys.argv[1:]))"]
    running = [subprocess.Popen([*command, str(i), str(parts)], cwd=ROOT) for i in range(parts)]
    codes = [process.wait() for process in running]
    # 0 all passed, 1 some failed (told already), 2 the time was up, 5 none was this part's.
    for i, code in enumerate(codes):
        if code not in (0, 1, 2, 5):
            record.wrong(f"part {i} of {parts}", f"pytest ended with {code}")


def part(place: str, parts: str) -> int:
    """Every test whose place in the order is `place` modulo `parts`; pytest's exit status."""
    import pytest

    return int(pytest.main(
        [*(QUICK if record.rehearsal() else ("tests/kernels", "--ignore=tests/kernels/interpret")),
         "-q", "-p", "no:cacheprovider", "--tb=short",
         "-k", "not cuda and not gpu" if record.rehearsal() else "cuda or gpu"],
        plugins=[Part(int(place), int(parts))],
    ))  # fmt: skip


def _slow(item: Any) -> bool:
    return item.get_closest_marker("slow") is not None


class Part:
    """Keeps a part of the tests, tells failures, counts, and stops before the time is up."""

    def __init__(self, place: int, parts: int) -> None:
        self.place, self.parts = place, parts
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.left = 0
        self.poisoned = False
        self.began = time.time()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        ordered = sorted(items, key=_slow)
        items[:] = ordered[self.place :: self.parts]
        self.left = len(items)

    def pytest_runtest_protocol(self, item: Any) -> None:
        rehearsed = record.rehearsal() and time.time() - self.began > REHEARSED
        if self.poisoned or rehearsed or record.remaining() < (SLOW_MARGIN if _slow(item) else MARGIN):
            item.session.shouldstop = "a test poisoned the CUDA context" if self.poisoned else "the time is up"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            text = str(report.longrepr)
            self.poisoned = self.poisoned or any(word in text for word in POISON)
            said = [line for line in text.splitlines() if line.startswith("E ")]
            record.wrong(report.nodeid, " ".join(" ".join(said[-3:]).split())[:300] or "failed")
        if report.when == "teardown":
            self.left -= 1
            if sum(self.counts.values()) % EVERY == 0:
                self.count()

    def pytest_sessionfinish(self) -> None:
        self.count()

    def count(self) -> None:
        record.result(f"tests passed, part {self.place}", "", self.counts["passed"], counts=self.counts, left=self.left)
