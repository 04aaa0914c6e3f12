"""As many runs of the study (bench/study.py) as fit, several processes beside each other on the one GPU.

Each process appends JSON lines to a file of its own and ends by itself within the minutes that it is given; what a
line says is the study's business, and goes into the results as it is.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu import record
from bench.workers import die_with_the_parent

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "bench" / "study.py"
PROCESSES = 4
# Seconds kept back to read what was written.
RESERVE = 20


def main() -> None:
    if not STUDY.is_file():
        record.skipped("study", "bench/study.py is not there yet")
        return
    if importlib.util.find_spec("trl") is None:
        raise ModuleNotFoundError("No module named 'trl'", name="trl")
    rehearsal = record.rehearsal()
    left = min(record.remaining() - RESERVE, 30 if rehearsal else 3600)
    if left <= 0:
        record.skipped("study", "no time was left")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.jsonl" for number in range(1 if rehearsal else PROCESSES)]
        processes = []
        for file in files:
            command = [sys.executable, "-m", "bench.study", "--budget", f"{left / 60:.2f}", "--output", str(file)]
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, cwd=ROOT,
                                              preexec_fn=die_with_the_parent))  # fmt: skip
        for number, process in enumerate(processes):
            try:
                status = process.wait(timeout=max(record.remaining() - 5, 1) if record.remaining() < 1e6 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = "killed when its time was over"
            if status:
                record.wrong(f"study, process {number}", f"exit status {status}")
        runs = [run for file in files for run in lines_of(file)]
    for number, run in enumerate(runs):
        record.result(f"study, run {number}", "", 1, run=run)
    record.result("study", "", len(runs), headline="runs of the study that ended")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Every whole line; a process that was killed may leave half of one."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line.strip()]
