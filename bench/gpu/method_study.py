"""As many runs of the study (bench/study.py) as fit, several processes beside each other on the one GPU.

The study begins no run that would not end within its minutes; what a line says is the study's business, and goes into
the results as it is. In a rehearsal one run of a tiny random model.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu import record
from bench.gpu.method_quickstart import NEEDED, RECIPE, ROOT, rehearsed
from bench.workers import die_with_the_parent

PROCESSES = 4
# Seconds kept back to read what was written.
RESERVE = 20


def main() -> None:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    left = min(record.remaining() - RESERVE, 3600)
    if left <= 0:
        record.skipped("study", "no time was left")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        file = place / "lines.jsonl"
        command = [sys.executable, "-m", "bench.study", "--budget", f"{left / 60:.2f}", "--output", str(file),
                   "--folder", str(place / "runs"), "--processes", str(PROCESSES)]  # fmt: skip
        if record.rehearsal():
            command += ["--recipe", str(tiny_recipe(place)), "--arms", "scores", "--seeds", "1"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, cwd=ROOT, preexec_fn=die_with_the_parent
        )
        try:
            status: int | str = process.wait(timeout=left if record.remaining() < 1e6 else None)
        except subprocess.TimeoutExpired:
            # Runs under way end with it; their lines are lost, those before them are not.
            process.kill()
            process.wait()
            status = 0
        if status:
            record.wrong("study", f"exit status {status}")
        runs = lines_of(file)
    for number, run in enumerate(runs):
        record.result(f"study, run {number}", "", 1, run=run)
    record.result("study", "", len(runs), headline="runs of the study that ended")


def tiny_recipe(folder: Path) -> Path:
    """The quickstart's recipe with a tiny model and few steps."""
    from lorapar.recipe.reading import dump_yaml, load_recipe

    words = rehearsed(folder / "model")
    overrides = [(key.removeprefix("--"), value) for key, value in zip(words[::2], words[1::2])]
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(load_recipe(ROOT / RECIPE, overrides).as_dict()), encoding="utf-8")
    return path


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Every whole line; a process that was killed may leave half of one."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line.strip()]
