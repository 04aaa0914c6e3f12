"""LORAPAR_BACKEND forces one backend or fails; it never falls back."""

import subprocess
import sys

import pytest

from lorapar_kernels.backend import always, choose


def no() -> str:
    return "it is broken"


def test_unset_takes_the_first_that_can_serve(monkeypatch):
    monkeypatch.delenv("LORAPAR_BACKEND", raising=False)
    assert choose("op", {"native": always, "reference": always}) == "native"
    assert choose("op", {"native": no, "reference": always}) == "reference"


def test_unset_does_not_ask_those_after_it(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "")

    def must_not_be_asked() -> str:
        raise AssertionError

    assert choose("op", {"reference": always, "triton": must_not_be_asked}) == "reference"


def test_forced_serves_or_raises(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    assert choose("op", {"native": always, "reference": always}) == "reference"
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    with pytest.raises(ValueError, match="LORAPAR_BACKEND=native cannot serve op: it is broken"):
        choose("op", {"native": no, "reference": always})
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    with pytest.raises(ValueError, match="cannot serve op, which has native and reference only"):
        choose("op", {"native": always, "reference": always})


def test_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of reference, native, triton, got 'cuda'"):
        choose("op", {"reference": always})


def test_import_takes_torch_alone_and_is_quick():
    code = (
        "import sys, time, torch\n"
        "before = time.perf_counter()\n"
        "import lorapar_kernels\n"
        "spent = time.perf_counter() - before\n"
        "there = [m for m in ('triton', 'peft', 'transformers', 'lorapar') if m in sys.modules]\n"
        "missing = [n for n in lorapar_kernels.__all__ if not callable(getattr(lorapar_kernels, n))]\n"
        "print(there, missing, spent)\n"
        "assert not there and not missing and spent < 0.3, (there, missing, spent)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
