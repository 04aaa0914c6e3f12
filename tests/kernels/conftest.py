"""The backends that a test of an op runs under, one after another."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lorapar_kernels import native

from .native_build import ROOT, built_cpu_library


@pytest.fixture(scope="session")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc's CPU library, built afresh."""
    return built_cpu_library(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def emulated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc's CUDA library, built for the host: its pointers are host memory (cuda_on_cpu/cuda_runtime.h)."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the path")
    file = tmp_path_factory.mktemp("emulated") / "liblorapar_cuda_on_cpu.so"
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
             "-Werror", "-Wno-unknown-pragmas", "-Wno-dangling-pointer",
             "-I", str(ROOT / "tests" / "kernels" / "cuda_on_cpu")]  # fmt: skip
    subprocess.run(["g++", *flags, "-x", "c++", *sources, "-o", str(file)], check=True, timeout=600)
    return file


@pytest.fixture(params=["cpu", "cuda on cpu"])
def either_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Each library by its C interface, on host memory."""
    name = "native_file" if request.param == "cpu" else "emulated_file"
    return native.open_library(request.getfixturevalue(name))


@pytest.fixture(params=["reference", "native", "native cuda on cpu", "native cuda"])
def every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Forces the reference, the CPU library, the CUDA library on the CPU, then on a device; gives where tensors go."""
    if request.param == "native cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        reason = native.obstacle(torch.device("cuda"))
        if reason is not None:
            pytest.skip(reason)
    monkeypatch.setenv("LORAPAR_BACKEND", request.param.split()[0])
    if request.param in ("native", "native cuda on cpu"):
        file = request.getfixturevalue("native_file" if request.param == "native" else "emulated_file")
        native.load.cache_clear()
        monkeypatch.setattr(native, "path", lambda kind: file)
    yield "cuda" if request.param == "native cuda" else "cpu"
    native.load.cache_clear()
