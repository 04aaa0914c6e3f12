"""The C interface under random and hostile arguments (native_fuzz.cpp), with sanitizers where the compiler has them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .native_build import ROOT


def fuzz(folder: Path, sources: list[Path], flags: list[str], rounds: int) -> str:
    """Build the driver with a library's sources, run it, give what it says."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the path")
    program = folder / "native_fuzz"
    command = ["g++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *flags,
               "-x", "c++", str(ROOT / "tests" / "kernels" / "native_fuzz.cpp"), *map(str, sources)]  # fmt: skip
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, timeout=600)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "20", str(rounds)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_library_under_the_sanitizers(tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp", "-DQUEUES=true"]
    assert "100 rounds" in fuzz(tmp_path, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), flags, 100)


@pytest.mark.slow
def test_cuda_library_on_the_cpu(tmp_path):
    # The address sanitizer does not follow fibers.
    flags = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas", "-Wno-dangling-pointer",
             "-DQUEUES=false",
             "-I", str(ROOT / "tests" / "kernels" / "cuda_on_cpu")]  # fmt: skip
    assert "4 rounds" in fuzz(tmp_path, sorted((ROOT / "csrc" / "cuda").glob("*.cu")), flags, 4)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on the path")
def test_make_sanitize_runs_the_same(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the path")
    command = ["make", "sanitize", "SANITIZE_ROUNDS=3", f"SANITIZED={tmp_path / 'fuzz'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "3 rounds of C++17" in done.stdout
