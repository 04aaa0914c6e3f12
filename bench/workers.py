"""Processes that answer cases, a line of JSON for a line of JSON; no torch here, so that whoever asks starts quickly.

A worker imports its libraries when it is made and touches the GPU at its first case, so the next one is made ahead:
it is ready when the one before has ended and given back its memory.
"""

import ctypes
import json
import math
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu import record

# Seconds: a case is given what remains less a few, for its line to be written.
NEAR_THE_END = 10
PR_SET_PDEATHSIG = 1
# Loaded beforehand: between fork and exec nothing should be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Worker:
    """`python -m MODULE` with pipes at both ends, which dies with the process that made it."""

    def __init__(self, module: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by _end)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=Path(__file__).parents[1],
            preexec_fn=die_with_the_parent,
        )
        self.ended = False

    def ask(self, case: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer; {"failed": why} where there is none ("late": not within `seconds`): it has ended then."""
        if self.ended:
            return {"failed": "its process had ended before"}
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write((json.dumps(case) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self._end()}
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(max(seconds, 0) if math.isfinite(seconds) else None):
                self._end()
                return {"failed": f"no answer within {seconds:.0f} s", "late": True}
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else {"failed": self._end()}

    def close(self) -> None:
        """End it, and wait until its memory is given back."""
        if not self.ended:
            self._end()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> str:
        """Kill it; the last line that it said."""
        self.ended = True
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        self.errors.close()
        return lines[-1][:300] if lines else f"its process ended with status {status}"


def tell_failure(case: str, said: dict[str, Any]) -> None:
    """An answer without figures as a line: the step's time was over, a package is missing, or it went wrong."""
    if said.get("late") and record.remaining() < NEAR_THE_END:
        record.skipped(case, "the time ended while it ran")
    elif "missing" in said:
        record.skipped(case, f"{said['missing']} is not installed")
    else:
        record.wrong(case, said["failed"])


def die_with_the_parent() -> None:
    """For `preexec_fn`, on Linux: the process ends when the one that made it does.

    One that hangs in a kernel would hold the GPU's memory after its step was killed.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
