"""The Triton kernel gives the reference's bits, interpreted on the CPU.

A pytest process of its own (`TRITON_INTERPRET=1 pytest tests/kernels/interpret`): the variable is read when
@triton.jit runs.
"""

import os

import pytest
import torch

from lorapar_kernels import dropout_mask
from lorapar_kernels.dropout import dropout_mask_reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 61), (2047,), (2049,), (5, 3, 577), ()])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, -(2**63)])
def test_same_bits_as_the_reference(monkeypatch, shape, seed):
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    for p in (0.0, 0.05, 0.5, 0.99999):
        mask = dropout_mask(torch.tensor([seed]), shape, p)
        assert mask.shape == shape
        assert torch.equal(mask, dropout_mask_reference(torch.tensor([seed]), shape, p))


def test_what_ran_was_the_kernel(monkeypatch):
    from lorapar_kernels.triton_kernels import dropout as dropout_triton

    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    assert dropout_triton.INTERPRETED
    called = []
    kernel = dropout_triton.dropout_mask
    monkeypatch.setattr(dropout_triton, "dropout_mask", lambda *a: (called.append(1), kernel(*a))[1])
    dropout_mask(torch.tensor([1]), (9,), 0.5)
    monkeypatch.setenv("LORAPAR_BACKEND", "")
    dropout_mask(torch.tensor([1]), (9,), 0.5)
    assert called == [1]


def test_ahead_of_time_compilation_says_why_it_cannot(capsys):
    from lorapar_kernels.compile import main

    assert main(["--arch", "90"]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err
