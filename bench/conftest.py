"""Devices, the closing table, and the results file of a device."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bench.interleaved import Timed

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
VERSIONS = ("torch", "triton", "transformers", "peft", "pandas", "numpy")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
TIMED = pytest.StashKey[list[Timed]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, default=HERE / "results", help="folder for <device>.json (default: bench/results)"
    )
    parser.addoption(
        "--no-requirements", action="store_true", help="a case below its required ratio is told, and does not fail"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMED] = []


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """`report(timed, ...)`, once the results are known to be equal: to the table and the file; fails if `short`,
    unless --no-requirements."""

    def record(*timed: Timed) -> None:
        request.config.stash[TIMED].extend(timed)
        short = [line for one in timed for line in one.short()]
        assert not short or request.config.getoption("--no-requirements"), "; ".join(short)

    return record


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    # platform.processor() is empty or the architecture on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.machine()
    # Two machines of one name can differ in their vector instructions, and with them in every ratio of dtypes.
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit, with "+" where the tree differs from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def driver() -> str:
    """What nvidia-smi says of the first GPU: name, driver, highest clock, power limit; "unknown" without it."""
    try:
        said = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip().split("\n")[0] if said.returncode == 0 else "unknown"


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_results(folder: Path, device: str, cases: list[Timed]) -> Path:
    """Put the cases into the device's file; one that was not run keeps its last entry, with its own commit and date."""
    name = device_name(device)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    whole = json.loads(path.read_text()) if path.exists() else {}
    known = whole.get("cases", {})
    facts = {
        **({"driver": driver()} if device == "cuda" else {}),
        "commit": commit(),
        "measured": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version for package in VERSIONS if (version := installed(package))},
    }
    known |= {timed.case: {**timed.as_json(), **facts} for timed in cases}
    # What else is there, bench.gpu.collect has put there.
    text = json.dumps(whole | {"device": name, "kind": device, "cases": dict(sorted(known.items()))}, indent=1)
    write_whole(path, text + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def readable(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    timed = config.stash[TIMED]
    if not timed:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ours against other ways: medians of interleaved rounds, equal results checked first")
    line = "{:<46} {:>9}  {:<26} {:>9}  {:>8}  {:>8}  {}"
    write(line.format("case", "ours", "other way", "takes", "speed-up", "in CPU", "required"))
    # Those with a requirement last, where the eye ends up.
    for one in sorted(timed, key=lambda one: bool(one.required)):
        for way in list(one.seconds)[1:]:
            ratio, least = one.speedup(way), one.required.get(way)
            verdict = "" if least is None else f"{least:g}: {'reached' if ratio >= least else 'NOT REACHED'}"
            times = readable(one.median(one.ours)), readable(one.median(way))
            write(
                line.format(
                    one.case, times[0], way, times[1], f"{ratio:.2f}x", f"{one.cpu_speedup(way):.2f}x", verdict
                ).rstrip()
            )
    folder: Path = config.getoption("--results")  # type: ignore[assignment]
    for device in sorted({one.device for one in timed}):
        path = write_results(folder, device, [one for one in timed if one.device == device])
        write(f"written: {path}")
