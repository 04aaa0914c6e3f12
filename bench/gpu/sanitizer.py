"""compute-sanitizer on one small case of each kernel: memcheck (accesses outside memory) and racecheck (races).

The cases first run without the tool, a process a group, which also leaves Triton's compiled kernels on disk: compiling
under the tool would take minutes. Then every group runs under both tools, all beside each other. torch's caching
allocator is off, so that a tensor ends where its memory ends and an access beyond it shows. One line a tool and kernel:
how many errors named it; what named others (torch's own) is told and is no fault of ours.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.gpu import cases, record, sanitizer_case

TOOLS = ("memcheck", "racecheck")
# The exit status by which the tool says that it found something.
FOUND = 9
# Seconds for the cases alone, and under a tool.
ALONE, UNDER = 60.0, 70.0
# How an error begins, whatever its case; a summary does not.
BEGINNINGS = "invalid|misaligned|illegal|error:|warning:|race |program hit|barrier|out-of-range"
ERROR = re.compile(rf"=========\s+({BEGINNINGS})", re.IGNORECASE)


@dataclass
class Run:
    """A group's process, alone (tool "") or under a tool."""

    tool: str
    group: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    ends: float

    def output(self) -> tuple[int | None, str]:
        """Exit status and what was said; None where it ran past its time and was ended."""
        status: int | None = None
        try:
            status = self.process.wait(timeout=max(0.1, self.ends - time.time()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.seek(0)
        return status, self.log.read().decode(errors="replace")


def tool_path() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def start(tool: str, group: str, path: str | None) -> Run:
    """Into a file, since a pipe that is not read while others are waited for would fill and stop it."""
    command = [sys.executable, "-m", "bench.gpu.sanitizer_case", group]
    env = {key: value for key, value in os.environ.items() if key not in ("LORAPAR_GPU_RESULTS", "LORAPAR_GPU_INJECT")}
    env["OMP_NUM_THREADS"] = "2"
    if tool:
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
        # torch asks the driver for things that a GPU need not have, and takes no for an answer.
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [str(path), *options, *command]
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    log = tempfile.TemporaryFile()  # noqa: SIM115 (Run.output reads it)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    seconds = min(UNDER if tool else ALONE, record.remaining() - 5.0)
    return Run(tool, group, process, log, time.time() + seconds)


def main() -> None:
    cases.begin()
    if record.rehearsal():
        rehearse()
        return
    path = tool_path()
    if path is None:
        record.skipped("compute-sanitizer", "it is neither on PATH nor in /usr/local/cuda/bin")
    runs = [start("", group, path) for group in sanitizer_case.GROUPS]
    sound = [run.group for run in runs if alone(run)]
    if path is None:
        return
    # The order in which they are waited for: memcheck tells most.
    for run in [start(tool, group, path) for tool in TOOLS for group in sound]:
        status, said = run.output()
        tell(run.tool, run.group, status, said)


def alone(run: Run) -> bool:
    """Whether the group runs to its end without a tool; what raises on the way is told."""
    status, said = run.output()
    case = f"{run.group} without a tool"
    faults = [line.removeprefix(sanitizer_case.FAULT) for line in said.splitlines()
              if line.startswith(sanitizer_case.FAULT)]  # fmt: skip
    for fault in faults:
        record.wrong(case, fault)
    if status == sanitizer_case.MISSING:
        record.skipped(case, last_line(said))
    elif status == 0:
        record.result(case, "exit status", 0.0)
    elif not faults:
        record.wrong(case, f"exit status {status}: {last_line(said)}")
    return status in (0, sanitizer_case.FAILED)


def last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


def tell(tool: str, group: str, status: int | None, said: str) -> None:
    """A line for each kernel of the group, from what the tool said."""
    kernels = sanitizer_case.GROUPS[group][1]
    whole = f"{group} under {tool}"
    if status not in (0, FOUND, sanitizer_case.FAILED):
        why = "it took too long" if status is None else f"exit status {status}: {last_line(said)}"
        # The tool itself can fail on a machine; the program under it ran alone before.
        record.skipped(whole, why)
        return
    blocks = errors(said)
    for kernel in kernels:
        mine = [block for block in blocks if names(block, kernel)]
        wrong = [block for block in mine if not block.lower().startswith("warning")]
        if wrong:
            record.wrong(f"{kernel} under {tool}", short(wrong[0]), errors=len(wrong))
        else:
            warnings = {"warnings": len(mine), "first": short(mine[0])} if mine else {}
            record.result(f"{kernel} under {tool}", "errors", 0.0, **warnings)
    others = [block for block in blocks if not any(names(block, kernel) for kernel in kernels)]
    if others:
        record.result(f"{whole}, in kernels not ours", "errors", len(others), first=short(others[0]))
    elif status == FOUND and not blocks:
        record.wrong(whole, f"it found something that was not understood: {last_line(said)}")


def short(block: str) -> str:
    return " ".join(block.split())[:300]


def names(block: str, kernel: str) -> bool:
    """Whether the error names this kernel, and not one whose name ends alike (pack_mask_kernel, mask_kernel)."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(kernel)}(?![A-Za-z0-9])", block) is not None


def errors(said: str) -> list[str]:
    """The tool's errors, each with the lines that belong to it: from its first line to the next empty one."""
    found: list[str] = []
    inside = False
    for line in said.splitlines():
        if not line.startswith("========="):
            continue
        text = line.strip("= \t")
        if not text:
            inside = False
        elif ERROR.match(line):
            found.append(text)
            inside = True
        elif inside:
            found[-1] += f" {text}"
    return found


def rehearse() -> None:
    """The cases in this process, without the tool: starting eight more would take a rehearsal's time."""
    record.skipped("compute-sanitizer", "this is a CPU")
    for group in sanitizer_case.GROUPS:
        if group != "csrc" and "fused" not in cases.products():
            record.skipped(f"{group} without a tool", "Triton's kernels do not run here")
            continue
        failed = sanitizer_case.run(group)
        for name, words in failed.items():
            record.wrong(f"{group} without a tool", f"{name}: {words}")
        if not failed:
            record.result(f"{group} without a tool", "exit status", 0.0)
