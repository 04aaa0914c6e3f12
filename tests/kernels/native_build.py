"""csrc's libraries built afresh by setup.py into a temporary folder, for the tests that need one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run setup.py build_ext into `folder`, with these environment variables beside the present ones; None: unset."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        folder,
        "--build-temp",
        folder / "temp",
    ]
    # NVCC="" leaves the CUDA library out unless the test asks for it.
    asked = {**os.environ, "NVCC": "", **environment}
    variables = {name: value for name, value in asked.items() if value is not None}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def built_cpu_library(folder: Path) -> Path:
    """The CPU library, or the test is skipped with the reason."""
    pytest.importorskip("setuptools")
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler is on the path")
    build(folder)
    return folder / "lorapar_kernels" / "liblorapar_cpu.so"
