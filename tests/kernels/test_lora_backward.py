"""The backward's launches, recorded without a GPU: what makes a kernel of its own, and what does not."""

import pytest
import torch

pytest.importorskip("triton")
from lorapar_kernels.triton_kernels.launch import meta, recording
from lorapar_kernels.triton_kernels.lora_backward import (
    REPRESENTATIVE,
    _launch_all,
    input_gradients,
    output_gradients,
)

# One, odd, even, a multiple of 16, as they come: batches of text are ragged.
RAGGED = (1, 2, 15, 16, 17, 100, 512, 513, 8191, 8192, 20000)


@pytest.mark.parametrize("case", range(len(REPRESENTATIVE)))
def test_a_batch_s_number_of_tokens_makes_no_kernel_of_its_own(case):
    with recording() as ahead:
        _launch_all(*REPRESENTATIVE[case])
    with recording() as of_any:
        for tokens in RAGGED:
            _launch_all(*REPRESENTATIVE[case], tokens=tokens)
    assert of_any == ahead


def test_nor_do_the_share_dropped_and_a_scaling_that_is_an_integer():
    bf16 = torch.bfloat16
    x, a, b = meta(513, 4096, dtype=bf16), meta(8, 4096, dtype=bf16), meta(4096, 8, dtype=bf16)
    s, seed, sets = meta(513, 16, dtype=bf16), meta(1, dtype=torch.int64), []
    for p, scaling in ((0.05, 0.5), (0.25, 1), (1 / 65536, 16)):
        with recording() as variants:
            (ds,), _ = output_gradients([x], [b], [s], [scaling], p, [None], [True])
            input_gradients(x, [a], [ds], p, [seed], [], [None], [True], True)
        sets.append(variants)
    assert sets[0] == sets[1] == sets[2]


def test_one_launch_object_for_each_kernel_that_is_compiled(monkeypatch):
    """What a Launch takes for granted: whatever it specialises on is the same in each of its calls."""
    from lorapar_kernels.triton_kernels.launch import Launch

    variants = {}
    inner = Launch.__call__

    def note(self, grid, *arguments):
        with recording() as recorded:
            inner(self, grid, *arguments)
        variants.setdefault(self, []).extend(v for v in recorded if v not in variants.get(self, []))

    monkeypatch.setattr(Launch, "__call__", note)
    for case in REPRESENTATIVE:
        for tokens in (1, 100, 512):
            _launch_all(*case, tokens=tokens)
    assert variants
    assert all(len(of_one) == 1 for of_one in variants.values())
