"""LORAPAR_BACKEND forces one backend or fails; it never falls back."""

import subprocess
import sys

import pytest
import torch

import lorapar_kernels as lk
from lorapar_kernels import dropout, native
from lorapar_kernels.backend import choose, listening, no_obstacle, old_gpu
from lorapar_kernels.importance import _backend as scoring_backend
from lorapar_kernels.lora_linear import passes_for, reference_passes


def no() -> str:
    return "it is broken"


def test_unset_takes_the_first_that_can_serve(monkeypatch):
    monkeypatch.delenv("LORAPAR_BACKEND", raising=False)
    assert choose("op", {"native": no_obstacle, "reference": no_obstacle}) == "native"
    assert choose("op", {"native": no, "reference": no_obstacle}) == "reference"


def test_unset_does_not_ask_those_after_it(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "")

    def must_not_be_asked() -> str:
        raise AssertionError

    assert choose("op", {"reference": no_obstacle, "triton": must_not_be_asked}) == "reference"


def test_forced_serves_or_raises(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    assert choose("op", {"native": no_obstacle, "reference": no_obstacle}) == "reference"
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    with pytest.raises(ValueError, match="LORAPAR_BACKEND=native cannot serve op: it is broken"):
        choose("op", {"native": no, "reference": no_obstacle})
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    with pytest.raises(ValueError, match="cannot serve op, which has native and reference only"):
        choose("op", {"native": no_obstacle, "reference": no_obstacle})


def test_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of reference, native, triton, got 'cuda'"):
        choose("op", {"reference": no_obstacle})


def test_listening_gathers_the_choices_of_its_block_alone(monkeypatch):
    monkeypatch.delenv("LORAPAR_BACKEND", raising=False)
    obstacles = {"triton": no, "native": no_obstacle, "reference": no_obstacle}
    choose("before", obstacles)
    with listening() as choices:
        choose("op", obstacles)
        with listening() as inner:
            choose("another", {"reference": no_obstacle})
    choose("after", obstacles)
    assert choices == [("op", "native", {"triton": "it is broken", "reference": None})]
    assert inner == [("another", "reference", {})]


def test_listening_hears_the_ops_choose():
    mask = torch.ones(3, 8, dtype=torch.bool)
    with listening() as choices:
        lk.pack_mask(mask)
        lk.lora_linear(torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), 1.0)
    assert [choice.op for choice in choices] == ["pack_mask", "lora_linear"]


@pytest.fixture
def gpu_of(monkeypatch):
    """Have the CUDA device be of a compute capability."""

    def patched(capability):
        old_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    yield patched
    old_gpu.cache_clear()


def test_a_gpu_that_is_too_old_is_told_and_the_reference_serves(gpu_of, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "load", lambda kind: (object(), None))
    device = torch.device("cuda", 0)
    # A tensor without memory that says it is on the GPU.
    x = torch.zeros(3, 8, device="meta").as_subclass(type("X", (torch.Tensor,), {"device": device}))
    gpu_of((7, 5))
    said = "the kernels need compute capability 8.0 or newer, this GPU has 7.5"
    assert dropout.triton_obstacle(device) == said
    assert native.obstacle(device) == said
    assert native.obstacle(torch.device("cpu")) is None
    assert passes_for("lora_linear", x, [x]) == reference_passes()
    assert scoring_backend(x, "lora_linear_scored") == "reference"
    assert dropout._backend("dropout_mask", device) == "reference"
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"LORAPAR_BACKEND=triton cannot serve lora_linear: {said}"):
        passes_for("lora_linear", x, [x])
    with pytest.raises(ValueError, match=f"LORAPAR_BACKEND=triton cannot serve lora_linear_scored: {said}"):
        scoring_backend(x, "lora_linear_scored")
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    with pytest.raises(ValueError, match=f"LORAPAR_BACKEND=native cannot serve dropout_mask: {said}"):
        dropout._backend("dropout_mask", device)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_of_today_is_not_too_old(gpu_of, capability):
    gpu_of(capability)
    assert old_gpu(torch.device("cuda", 0)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_no_gpu_is_that_is_the_reason():
    old_gpu.cache_clear()
    assert old_gpu(torch.device("cuda")) == "there is no CUDA device"
    old_gpu.cache_clear()


def test_the_device_is_asked_once(gpu_of, monkeypatch):
    gpu_of((9, 0))
    assert old_gpu(torch.device("cuda", 0)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    assert old_gpu(torch.device("cuda", 0)) is None


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
