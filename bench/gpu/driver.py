"""Run a program's steps, each a process of its own with a limit of its own, under one deadline for all.

    python -m bench.gpu.driver --program kernels --budget 530

What a step finds, it writes itself (record.py). The driver adds one line a step: how it ended, after how many seconds.
A step that is over its limit gets TERM, and five seconds later KILL, with all that it started; a step that crashes,
hangs, raises or lacks a package does not affect the others. $OUT never holds more than eight files: results.jsonl,
table.txt, a log for each step that is running and for the first two that failed, and steps.log with all other logs.

Exit status: 0 every step that was started ended well; 10 + N step N of `--list` was the first that did not (the
table's last line names each); 2 it cannot run here; 130 and 143 it was interrupted, and printed what there was.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu import record
from bench.gpu.programs import PROGRAMS, Row, Step, steps
from bench.gpu.run import MISSING
from bench.gpu.table import table

ROOT = Path(__file__).parents[2]
# Ten minutes are the longest that one call is lent for; what is left covers the table and the way back.
BUDGET = 530.0
# Between TERM and KILL.
GRACE = 5.0
# Kept free at the end, for a step that has to be killed and for the table.
RESERVE = GRACE + 3.0
FIRST = 10
FAILED_LOGS = 2
LOG_HEAD, LOG_TAIL = 1 << 18, 3 << 18
VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "numpy")
GOOD = ("ok", "skipped")


@dataclass
class Running:
    """A step's process, and when it has to be over (seconds since the epoch)."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    deadline: float


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    program: str
    out: Path
    deadline: float
    device: str
    limit: float
    only: tuple[str, ...] = ()


def run(request: Request, facts: Mapping[str, Any]) -> dict[str, str]:
    """Run the program's rows in order; step -> how it ended. The lines are in results.jsonl, the logs beside it."""
    ended: dict[str, str] = {}
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="lorapar-gpu-") as scratch:
        try:
            for row in PROGRAMS[request.program]:
                running = _start(row, request, facts, ended, scratch)
                while running:
                    running = [one for one in running if not _over(one, request, facts, ended)]
                    time.sleep(0.02)
        finally:
            for one in running:
                _end(one.process)
                _close(one, "interrupted", "the program was interrupted", request, facts, ended)
    return ended


def _start(row: Row, request: Request, facts: Mapping[str, Any], ended: dict[str, str], scratch: str) -> list[Running]:
    """The row's steps as processes, less those that are not asked for, have no time left, or lack a package."""
    started = []
    for step in row:
        if request.only and step.name not in request.only:
            continue
        left = request.deadline - RESERVE - time.time()
        lacking = [name for name in step.needs if importlib.util.find_spec(name) is None]
        if left < step.least:
            why = f"{max(0.0, left):.0f} s of the budget were left, it needs {step.least:.0f}"
            _say(step, "skipped", why, 0.0, request, facts, ended)
        elif lacking:
            _say(step, "missing", f"not installed: {', '.join(lacking)}", 0.0, request, facts, ended)
        else:
            log = request.out / f"{step.name}.log"
            began = time.time()
            deadline = began + min(left, step.limit, request.limit)
            environment = _environment(step, request, facts, deadline, scratch)
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bench.gpu.run", step.name],
                    cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    process_group=0,
                )  # fmt: skip
            started.append(Running(step, process, log, began, deadline))
    return started


def _environment(
    step: Step, request: Request, facts: Mapping[str, Any], deadline: float, scratch: str
) -> dict[str, str]:
    mine = {
        "LORAPAR_GPU_RESULTS": str(request.out / "results.jsonl"),
        "LORAPAR_GPU_STEP": step.name,
        "LORAPAR_GPU_FACTS": json.dumps(facts),
        "LORAPAR_GPU_DEVICE": request.device,
        "LORAPAR_GPU_DEADLINE": str(deadline),
        "TMPDIR": scratch,
        # Where a crash was goes into the log; and a log is complete when its step is killed.
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if request.device == "cpu":
        mine |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if step.interpreted else "0"}
    return os.environ | mine


def _over(one: Running, request: Request, facts: Mapping[str, Any], ended: dict[str, str]) -> bool:
    """Whether the step has ended; if so, or if its time is up, it is written down and what it started is ended."""
    code = one.process.poll()
    if code is None and time.time() < one.deadline:
        return False
    _end(one.process)
    if code is None:
        _close(one, "timeout", f"ended after {time.time() - one.began:.0f} s", request, facts, ended)
    elif code == 0:
        _close(one, "ok", "", request, facts, ended)
    elif code < 0:
        _close(one, "crashed", signal.Signals(-code).name, request, facts, ended)
    else:
        _close(one, "missing" if code == MISSING else "failed", _last_line(one.log), request, facts, ended)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """TERM to the step and all that it started, KILL after GRACE; nothing where all of it has ended."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        until = time.time() + patience
        while time.time() < until and _alive(process):
            time.sleep(0.02)
    process.poll()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _close(
    one: Running, status: str, why: str, request: Request, facts: Mapping[str, Any], ended: dict[str, str]
) -> None:
    """Write down how the step ended, and put its log where it stays."""
    _say(one.step, status, why, time.time() - one.began, request, facts, ended)
    text = one.log.read_bytes()
    if len(text) > LOG_HEAD + LOG_TAIL:
        left_out = len(text) - LOG_HEAD - LOG_TAIL
        text = text[:LOG_HEAD] + f"\n... {left_out} bytes left out ...\n".encode() + text[-LOG_TAIL:]
        one.log.write_bytes(text)
    failed = sum(status not in GOOD for status in ended.values())
    if status in GOOD or failed > FAILED_LOGS:
        with (request.out / "steps.log").open("ab") as file:
            file.write(f"==== {one.step.name}: {status} {why}\n".encode() + text)
        one.log.unlink()


def _say(
    step: Step, status: str, why: str, seconds: float, request: Request, facts: Mapping[str, Any],
    ended: dict[str, str],
) -> None:  # fmt: skip
    ended[step.name] = status
    line = {"step": step.name, "kind": "step", "status": status, "seconds": round(seconds, 2), "why": why}
    record.append(str(request.out / "results.jsonl"), {**line, **facts, "time": record.now()})
    print(f"{step.name:<16} {status:<9} {seconds:6.1f} s  {why}".rstrip(), flush=True)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def facts_of(program: str, device: str) -> dict[str, Any]:
    """What every line repeats; SystemExit(2) where a GPU is asked for and none answers."""
    name, driver = _gpu() if device == "cuda" else (f"rehearsal on {_processor()}", "")
    versions = {package: version for package in VERSIONS if (version := _installed(package))}
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "program": program,
        "gpu": name,
        "driver": driver,
        "versions": {"python": python, **versions},
        "commit": commit(),
    }


def _gpu() -> tuple[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if not said:
        print("bench/gpu.sh: nvidia-smi names no GPU; --cpu rehearses the program without one", file=sys.stderr)
        raise SystemExit(2)
    name, _, driver = said.splitlines()[0].partition(", ")
    return name, driver


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else 'a CPU'}, {os.cpu_count()} cores"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str:
    """The commit, with "+" where the tree differs from it; the file .commit first, where there is one: what was carried
    to another machine may have an older .git."""
    file = root / ".commit"
    if file.exists():
        return file.read_text().strip() or "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        head = None
    if head is not None and head.returncode == 0:
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return "unknown"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description="Ask a GPU what the project wants to know, most telling first, in the seconds there are.",
        epilog="Results: $OUT/results.jsonl (OUT=gpu-results unless set), then python -m bench.gpu.collect $OUT. "
        "Exit status: 0 all well, 10 + N step N of --list failed first, 2 it cannot run here.",
    )
    parser.add_argument("--program", choices=PROGRAMS, default="kernels", help="default: kernels")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="no step takes longer")
    parser.add_argument("--only", default="", metavar="STEP,...", help="these steps alone")
    parser.add_argument("--list", action="store_true", help="print the program's steps, one a line, and stop")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without a GPU: small shapes, no figures")
    options = parser.parse_args(given)
    names = [step.name for step in steps(options.program)]
    options.only = tuple(filter(None, options.only.split(",")))
    for name in options.only:
        if name not in names:
            parser.error(f"--only takes steps of {options.program}, which are {', '.join(names)}, got {name!r}")
    for wish in filter(None, os.environ.get("LORAPAR_GPU_INJECT", "").split(",")):
        fault, _, name = wish.partition(":")
        if fault not in record.FAULTS or name not in names:
            parser.error(f"LORAPAR_GPU_INJECT takes {'|'.join(record.FAULTS)}:STEP, STEP of --list, got {wish!r}")
    if options.budget <= RESERVE:
        parser.error(f"--budget must be more than {RESERVE:.0f} seconds, got {options.budget:g}")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _arguments(given)
    names = [step.name for step in steps(options.program)]
    if options.list:
        print(*names, sep="\n")
        return 0
    deadline = float(os.environ.get("LORAPAR_GPU_BEGAN") or time.time()) + options.budget
    device = "cpu" if options.cpu else "cuda"
    facts = facts_of(options.program, device)
    out = Path(os.environ.get("OUT") or "gpu-results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{facts['gpu']} {facts['driver']}, commit {facts['commit']}, {facts['versions']}", flush=True)
    status = 0
    request = Request(options.program, out, deadline, device, options.limit, options.only)
    ended: dict[str, str] = {}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        ended = run(request, facts)
    except KeyboardInterrupt:
        status = 130
    except Interrupted:
        status = 143
    lines = [json.loads(line) for line in _lines(out / "results.jsonl")]
    bad = [name for name in names if ended.get(name, "ok") not in GOOD]
    text = table([line for line in lines if line.get("program") == options.program])
    if bad:
        status = status or FIRST + 1 + names.index(bad[0])
    text += f"\nexit status {status}" + (f": failed {', '.join(bad)}; the logs are in {out}" if bad else "")
    (out / "table.txt").write_text(text + "\n")
    print(text)
    return status


class Interrupted(BaseException):
    """TERM, so that what runs is ended and what there is gets printed."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
