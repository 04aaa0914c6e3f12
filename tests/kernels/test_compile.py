"""python -m lorapar_kernels.compile: every kernel, every architecture, no GPU, and a bad one is told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorapar_kernels
from lorapar_kernels.compile import MODULES, Row, ptxas_figures, table

triton = pytest.importorskip("triton")
PACKAGE = Path(lorapar_kernels.__file__).parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorapar_kernels.compile", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_kernel_compiles_for_every_architecture():
    done = command("--arch", "80", "90", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["kernel", "variant", "arch", "registers", "spilled", "shared"]
    for arch in ("sm_80", "sm_90", "sm_100"):
        rows = [line.split() for line in lines if f" {arch} " in line]
        for kernel in ("_dropout_mask_kernel", "_example_products_kernel", "_add_partial_sums_kernel"):
            assert any(row[0] == kernel for row in rows), (kernel, arch)
        for row in rows:
            registers, spilled, shared = map(int, row[-3:])
            assert 0 < registers <= 255
            assert spilled == 0
            assert shared >= 0
    assert re.fullmatch(r"\d+ compiled, no spills", lines[-1])


def test_no_file_with_a_kernel_is_left_out():
    with_kernels = {file.stem for file in PACKAGE.glob("*.py") if re.search(r"^@triton\.jit", file.read_text(), re.M)}
    assert with_kernels == set(MODULES)


def test_a_kernel_that_does_not_compile_is_told():
    from lorapar_kernels.ahead_of_time import Variant
    from lorapar_kernels.compile import compile_variant
    from lorapar_kernels.dropout_triton import AHEAD_OF_TIME

    good = AHEAD_OF_TIME[0]
    bad = Variant(good.kernel, "BLOCK:255", good.signature, {"BLOCK": 255})
    row = compile_variant(bad, 90)
    assert row.failure is not None
    assert "power of 2" in row.failure
    assert "power of 2" in table([row])


def test_a_spill_makes_the_exit_status_1(monkeypatch, capsys):
    import importlib

    compile_module = importlib.import_module("lorapar_kernels.compile")
    spilling = Row("k", "v", 90, registers=255, spilled=8)
    monkeypatch.setattr(compile_module, "compile_variant", lambda variant, arch: spilling)
    assert compile_module.main(["--arch", "90"]) == 1
    assert "failed or spill" in capsys.readouterr().out


def test_ptxas_figures():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size\n"
    )
    assert ptxas_figures(log) == (168, 32)
    with pytest.raises(ValueError, match="no figures"):
        ptxas_figures("")


def test_unusable_arguments_exit_2():
    assert command("--arch", "9.0").returncode == 2
    assert command("--arch", "9").returncode == 2
