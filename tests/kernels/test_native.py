"""csrc: built by setup.py, loaded by native.py, equal to the reference; its error codes and refusals."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorapar_kernels import native
from lorapar_kernels.bitmask import index_mask, pack_mask, pack_mask_reference, unpack_mask

from .native_build import ROOT, build

OK, NULL_POINTER, SIZE, ALIGNMENT = 0, 1, 2, 3


@pytest.fixture(scope="module")
def library_file(native_file) -> Path:
    return native_file


@pytest.fixture
def library(library_file) -> ctypes.CDLL:
    return native.open_library(library_file)


@pytest.fixture
def installed(library_file, monkeypatch):
    """The package finds the library just built, and LORAPAR_BACKEND forces it."""
    native.load.cache_clear()
    monkeypatch.setattr(native, "path", lambda kind: library_file.with_name(f"liblorapar_{kind}.so"))
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    yield
    native.load.cache_clear()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 1023, 4608, 10_000_019])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_the_reference(installed, n, share):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    words = pack_mask(mask)
    assert torch.equal(words, pack_mask_reference(mask))
    assert torch.equal(unpack_mask(words, mask.shape), mask)
    assert index_mask(mask).active == int(mask.sum())


def test_takes_any_nonzero_byte_and_writes_only_its_own(library):
    for n in (1, 31, 32, 33, 70):
        source = torch.tensor([2, 0, 255, 128], dtype=torch.uint8).repeat(18)[:n].contiguous()
        words = torch.full(((n + 31) // 32 + 1,), 0x5A5A5A5A, dtype=torch.int32)
        assert library.lorapar_pack_mask(source.data_ptr(), n, words.data_ptr(), 1) == OK
        assert torch.equal(words[:-1], pack_mask_reference(source != 0))
        assert int(words[-1]) == 0x5A5A5A5A
        back = torch.full((n + 1,), 77, dtype=torch.uint8)
        assert library.lorapar_unpack_mask(words.data_ptr(), n, back.data_ptr(), 1) == OK
        assert torch.equal(back[:-1], (source != 0).to(torch.uint8))
        assert int(back[-1]) == 77


def test_the_index_does_not_look_at_spare_bits(library):
    words = torch.full((18,), -1, dtype=torch.int32)
    for n, expected in (
        (33, [0, 33]),
        (1, [0, 1]),
        (512, [0, 512]),
        (0, [0]),
        (545, [0, 512, 545]),
        (576, [0, 512, 576]),
    ):
        before = torch.full((3,), -5, dtype=torch.int64)
        assert library.lorapar_index_mask(words.data_ptr(), n, before.data_ptr(), 1) == OK
        assert before.tolist() == [*expected, -5, -5][:3]


def test_error_codes(library):
    word, byte = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.uint8)
    before = torch.zeros(2, dtype=torch.int64)
    assert library.lorapar_pack_mask(None, 1, word.data_ptr(), 1) == NULL_POINTER
    assert library.lorapar_pack_mask(byte.data_ptr(), 1, None, 1) == NULL_POINTER
    assert library.lorapar_pack_mask(None, 0, None, 1) == OK
    assert library.lorapar_pack_mask(byte.data_ptr(), -1, word.data_ptr(), 1) == SIZE
    assert library.lorapar_unpack_mask(None, 1, byte.data_ptr(), 1) == NULL_POINTER
    assert library.lorapar_unpack_mask(word.data_ptr(), -(2**62), byte.data_ptr(), 1) == SIZE
    assert library.lorapar_index_mask(word.data_ptr(), 1, None, 1) == NULL_POINTER
    assert library.lorapar_index_mask(None, 1, before.data_ptr(), 1) == NULL_POINTER
    assert library.lorapar_error_string(OK) == b"no error"
    assert library.lorapar_error_string(NULL_POINTER) == b"a null pointer where memory was expected"
    assert library.lorapar_error_string(SIZE) == b"a number of elements below 0 or above 2^48"
    assert library.lorapar_error_string(-12345) == b"an unknown status"


def test_misaligned_pointers_and_sizes_beyond_the_limit(library):
    words, before = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    byte = torch.zeros(64, dtype=torch.uint8)
    assert library.lorapar_pack_mask(byte.data_ptr(), 5, words.data_ptr() + 2, 1) == ALIGNMENT
    assert library.lorapar_unpack_mask(words.data_ptr() + 1, 5, byte.data_ptr(), 1) == ALIGNMENT
    assert library.lorapar_index_mask(words.data_ptr(), 5, before.data_ptr() + 4, 1) == ALIGNMENT
    for n in (2**48 + 1, 2**62, 2**63 - 1):
        assert library.lorapar_pack_mask(byte.data_ptr(), n, words.data_ptr(), 1) == SIZE
    assert library.lorapar_error_string(ALIGNMENT) == b"a pointer that is not aligned to its type"


# So many that several threads start.
LARGE = 64_000_003


def test_threads_are_as_many_as_asked_for_and_change_nothing(library):
    mask = (torch.rand(LARGE, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.uint8)
    made = []
    for threads in (0, 1, 2, 3, 7, -5, 10**6):
        words = torch.full(((LARGE + 31) // 32,), 0x5A5A5A5A, dtype=torch.int32)
        assert library.lorapar_pack_mask(mask.data_ptr(), LARGE, words.data_ptr(), threads) == OK
        made.append(words)
    assert all(torch.equal(words, made[0]) for words in made)


FORKS = """
import os, sys, torch
from pathlib import Path
from lorapar_kernels import native
library = native.open_library(Path(sys.argv[1]))
mask, words = torch.ones(64_000_000, dtype=torch.uint8), torch.zeros(2_000_000, dtype=torch.int32)
def pack(threads):
    assert library.lorapar_pack_mask(mask.data_ptr(), mask.numel(), words.data_ptr(), threads) == 0
    assert bool((words == -1).all())
pack(4)
threads = len(os.listdir("/proc/self/task"))
child = os.fork()
torch.set_num_threads(1) if child == 0 else None
pack(4)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("threads", threads)
"""


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/task").exists(), reason="needs fork and /proc")
@pytest.mark.parametrize("allowed", ["1", "4"])
def test_a_forked_child_does_not_wait_for_threads_it_has_not(library_file, allowed):
    environment = {**os.environ, "OMP_NUM_THREADS": allowed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKS, str(library_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_errors_become_exceptions(installed):
    with pytest.raises(RuntimeError, match="native pack_mask failed with status 2: a number of elements below 0"):
        native.call("pack_mask", torch.device("cpu"), 0, -1, 0)


def test_status_of_a_library_that_is_there(installed, library_file):
    status = native.status()
    assert status["cpu"]["loaded"] is True
    assert status["cpu"]["path"] == str(library_file)
    assert str(status["cpu"]["build"]).startswith("C++17")
    assert status["cpu"]["reason"] is None
    assert status["cuda"]["loaded"] is False
    assert "is not there" in str(status["cuda"]["reason"])
    assert set(status["compilers"]) == {"c++", "nvcc"}


def test_forced_without_a_library_raises_and_unforced_takes_the_reference(tmp_path, monkeypatch):
    native.load.cache_clear()
    monkeypatch.setattr(native, "path", lambda kind: tmp_path / "none.so")
    mask = torch.tensor([True, False, True])
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    with pytest.raises(ValueError, match=r"LORAPAR_BACKEND=native cannot serve pack_mask: .* is not there"):
        pack_mask(mask)
    monkeypatch.setenv("LORAPAR_BACKEND", "")
    assert pack_mask(mask).tolist() == [5]
    native.load.cache_clear()


def test_a_library_that_does_not_load_warns(tmp_path, monkeypatch):
    native.load.cache_clear()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "path", lambda kind: broken)
    with pytest.warns(RuntimeWarning, match="the native cpu library cannot be used"):
        library, reason = native.load("cpu")
    assert library is None
    assert reason
    native.load.cache_clear()


def test_a_library_of_another_version_is_refused(library_file, monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(OSError, match="has ABI version 7, expected 99: build it again"):
        native.open_library(library_file)
    monkeypatch.setitem(native.SIGNATURES, "lorapar_of_tomorrow", ([], ctypes.c_int))
    with pytest.raises(OSError, match="has no function lorapar_of_tomorrow"):
        native.open_library(library_file)


def test_header_and_signatures_name_the_same_functions():
    header = (ROOT / "csrc" / "lorapar.h").read_text()
    for name in native.SIGNATURES:
        assert f" {name}(" in header or f"*{name}(" in header
    assert header.count("LORAPAR_API ") - 2 == len(native.SIGNATURES)  # two of them are the definitions
    assert f"#define LORAPAR_ABI_VERSION {native.ABI_VERSION}\n" in header


def test_header_is_plain_c(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is on the path")
    source = tmp_path / "use.c"
    source.write_text('#include "lorapar.h"\nint f(void) { return lorapar_abi_version(); }\n')
    flags = [
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "-fsyntax-only",
        "-I",
        str(ROOT / "csrc"),
    ]
    subprocess.run([compiler, *flags, str(source)], check=True)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_failing_compiler_warns_and_the_build_goes_on(tmp_path):
    pytest.importorskip("setuptools")
    failing = script(tmp_path / "broken-c++", "echo this compiler is broken >&2; exit 3")
    done = build(tmp_path / "out", CXX=failing)
    assert "liblorapar_cpu is left out, the PyTorch reference serves" in done.stderr
    assert "this compiler is broken" in done.stderr
    assert not list((tmp_path / "out").rglob("*.so*"))
    done = build(tmp_path / "out", CXX=str(tmp_path / "no-such-compiler"))
    assert "is left out" in done.stderr


def test_no_compiler_at_all_is_no_failure(tmp_path):
    pytest.importorskip("setuptools")
    environment = {"PATH": str(tmp_path), "CXX": ""}
    done = build(tmp_path / "out", **environment)
    assert "no C++ compiler was found" in done.stderr
    assert "nvcc was not found" in done.stderr
    assert not list((tmp_path / "out").rglob("*.so*"))


def test_nvcc_is_found_where_cuda_is_though_off_the_path(tmp_path):
    pytest.importorskip("setuptools")
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvcc", 'echo compute_90; echo "asked: $*" >&2; [ "$1" = --list-gpu-arch ]')
    known = {"CUDA_HOME": str(tmp_path), "LORAPAR_CUDA_ARCHS": "90"}
    done = build(tmp_path / "out", NVCC=None, PATH="/usr/bin:/bin", CXX="", **known)
    assert "asked:" in done.stderr
    assert "arch=compute_90,code=sm_90 " in done.stderr
    assert "sm_80" not in done.stderr


@pytest.mark.slow
def test_cuda_source_compiles_for_every_architecture(tmp_path):
    pytest.importorskip("setuptools")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    done = build(tmp_path, NVCC=nvcc)
    file = tmp_path / "lorapar_kernels" / "liblorapar_cuda.so"
    assert file.exists(), done.stderr
    # What ptxas -v says of each kernel for each architecture.
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    # step_kernel is compiled twice, zero_kernel for three element sizes.
    kernels = sources.count("__global__") + 1 + 2
    assert len(spills) == 3 * kernels
    assert set(spills) == {("0", "0")}
    library = native.open_library(file)
    assert b"sm_80 sm_90" in library.lorapar_build()
    # What needs no device is answered as the CPU's library does; what needs one says so where there is none.
    assert library.lorapar_pack_mask(None, 1, None, 1) == NULL_POINTER
    assert library.lorapar_pack_mask(None, -1, None, 1) == SIZE
    assert library.lorapar_error_string(SIZE) == b"a number of elements below 0 or above 2^48"
    if not torch.cuda.is_available():
        word = torch.zeros(1, dtype=torch.int32)
        status = library.lorapar_pack_mask(word.data_ptr(), 1, word.data_ptr(), 1)
        assert status > 1000
        assert library.lorapar_error_string(status) not in (b"", b"an unknown status")
