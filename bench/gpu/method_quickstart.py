"""The quickstart, all of it and as a user runs it: `lorapar run examples/quickstart.yaml`, from an empty run folder.

The recipe names no device and no dtype, so a GPU is taken where there is one, in bf16. What is reported comes
out of the run's own metrics.json; the whole time is the command's, with Python's start and, where the model lies in the
cache as a .gguf file (pieces.py), its conversion. In a rehearsal a few rows and steps of a tiny random model.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bench.gpu import record
from bench.workers import die_with_the_parent

ROOT = Path(__file__).parents[2]
RECIPE = "examples/quickstart.yaml"
NEEDED = "trl", "datasets", "reasoning_gym", "gguf", "matplotlib"
STAGES = "base", "sft", "grpo"


def main() -> None:
    # Asked for here, where it can be said which package it is; found, not imported, as the run imports them itself.
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "lorapar", "run", RECIPE, "--output_dir", str(out)]
        if record.rehearsal():
            command += rehearsed(Path(folder) / "model")
        began = time.perf_counter()
        why = run(command, log)
        seconds = time.perf_counter() - began
        metrics = out / "metrics.json"
        if why is not None:
            record.wrong("quickstart", why, seconds=seconds, done=sorted(path.name for path in out.glob("*")))
        if metrics.is_file():
            tell(json.loads(metrics.read_text()), seconds if why is None else None)


def run(command: list[str], log: Path) -> str | None:
    """None where the run ended well, else why it did not."""
    left = record.remaining() - 5
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            preexec_fn=die_with_the_parent,
        )  # fmt: skip
        try:
            status = process.wait(timeout=left if left < 1e6 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print(*lines[-60:], sep="\n", file=sys.stderr, flush=True)
    if status == 0:
        return None
    last = lines[-1][:300] if lines else "it said nothing"
    return f"stopped after {left:.0f} s: {last}" if status is None else f"exit status {status}: {last}"


def tell(metrics: dict[str, Any], seconds: float | None) -> None:
    """Every figure as a result; `seconds`: None where the run did not end well."""
    if seconds is not None:
        record.result("quickstart [whole]", "s", seconds, headline="the quickstart, whole")
    accuracy, n = metrics.get("accuracy", {}), metrics.get("n", {})
    for system in ("system1", "system2"):
        for stage in STAGES:
            if stage in accuracy:
                words = f"quickstart: {system.replace('system', 'System ')} accuracy after {stage}"
                record.result(
                    f"quickstart | {system} after {stage} [accuracy]", "%", 100 * accuracy[stage][system],
                    headline=words if stage == STAGES[-1] else None,
                    interval=metrics.get("interval", {}).get(stage, {}).get(system), rows=n.get(system),
                )  # fmt: skip
    for stage, took in metrics.get("seconds", {}).items():
        record.result(f"quickstart | {stage} [time]", "s", took)
    for stage, peak in metrics.get("peak_memory_bytes", {}).items():
        record.result(f"quickstart | {stage} [peak memory]", "B", peak)
    for stage, size in metrics.get("optimizer_state_bytes", {}).items():
        record.result(f"quickstart | {stage} [optimizer state]", "B", size)
    partition = metrics.get("partition", {})
    for name, share in partition.get("fraction", {}).items():
        record.result(f"quickstart | {name} [share of the elements]", "%", 100 * share)


def rehearsed(folder: Path) -> list[str]:
    """Overrides that make the recipe take seconds on a CPU."""
    sources = yaml.safe_load((ROOT / RECIPE).read_text())["data"]["sources"]
    for source in sources:
        source |= {"size": 60, "held_out": 4}
    overrides: dict[str, Any] = {
        "data.sources": sources, "model.device": "cpu", "score.examples": 8, "score.batch_size": 4,
        "sft.max_steps": 2, "sft.per_device_train_batch_size": 4, "sft.save_steps": 2,
        "grpo.max_steps": 1, "grpo.per_device_train_batch_size": 8, "grpo.save_steps": 1,
    }  # fmt: skip
    from tests.tiny import save_tiny_model

    save_tiny_model(folder)
    overrides["model.name"] = str(folder)
    return [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
