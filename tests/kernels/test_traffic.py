"""What a group of LoRA layers launches beyond the frozen ones, and what of x, y and their gradients that touches.

Counted from the launches' own arguments, on tensors without memory: no GPU. A kernel's programs cover a matrix once
where its grid of tiles is as large as the matrix and no larger; then the bytes it touches are the matrix's.
"""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from lorapar_kernels.triton_kernels.launch import Launch, cdiv, meta
from lorapar_kernels.triton_kernels.lora_backward import input_gradients, output_gradients
from lorapar_kernels.triton_kernels.lora_forward import expand, padded_rank, shrink

BF16, P = torch.bfloat16, 0.05
# tokens, columns of x, of each y, rank; parts of dS and dB that are written, and read again, of dY's size
GROUPS = {
    "q, k, v": (8192, 4096, (4096, 4096, 4096), 16, 0.15),
    "q, k, v at r = 8, few tokens": (512, 4096, (4096, 4096, 4096), 8, 0.38),
    "q, k, v at r = 32": (8192, 4096, (4096, 4096, 4096), 32, 0.29),
    "q, k, v with fewer heads": (8192, 4096, (4096, 1024, 1024), 16, 0.17),
    "gate, up": (8192, 4096, (11008, 11008), 16, 0.14),
    "o": (8192, 4096, (4096,), 16, 0.19),
    "down": (2048, 18944, (3584,), 16, 0.38),
}


@pytest.fixture
def launched(monkeypatch):
    """Each launch: the kernel's name, its grid, and all that it was given, by name."""
    calls = []

    def note(self, grid, *arguments):
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        given = dict(zip(names, arguments, strict=True)) | self.constants
        calls.append((self.kernel.__name__, grid, given))

    monkeypatch.setattr(Launch, "__call__", note)
    return calls


def once(programs, tile, size):
    return programs == cdiv(size, tile)


def touched(calls, wide):
    """Bytes of the tensors in `wide` (x, y, dY, dX), of parts, and of what else there is, over the launches."""
    found = Counter()
    for name, grid, given in calls:
        if name in ("output_kernel", "input_kernel"):
            assert once(grid[1], given["t_split"], given["T"])
        if name == "input_kernel":
            assert once(grid[0], given["BK"], given["K"])
        if name == "output_kernel":
            assert once(grid[0], given["BN"], max(given[f"N{i}"] or 0 for i in range(3)))
        if name == "shrink_kernel":
            assert once(grid[0], given["BT"], given["T"])
            assert once(grid[1], given["k_split"], given["K"])
        for tensor in given.values():
            if isinstance(tensor, torch.Tensor):
                is_wide = any(tensor is one for one in wide)
                kind = "wide" if is_wide else "parts" if tensor.dim() == 3 else "bits" if is_bits(tensor) else "small"
                found[kind] += tensor.nbytes
    return found


def is_bits(tensor):
    return tensor.dtype == torch.int32 or (tensor.dtype == torch.uint8 and tensor.dim() == 2)


def group_of(name):
    T, K, widths, rank, _ = GROUPS[name]
    x = meta(T, K, dtype=BF16)
    factors, lora_bs = [meta(rank, K) for _ in widths], [meta(n, rank) for n in widths]
    return x, factors, lora_bs, [meta(1, dtype=torch.int64) for _ in widths], [2.0] * len(widths)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_s_forward(launched, name):
    x, factors, lora_bs, seeds, scalings = group_of(name)
    n = len(factors)
    parts, _ = shrink(x, factors, P, seeds, True)
    ys, _ = expand(parts, lora_bs, scalings, [None] * n, [None] * n, BF16)
    assert [kernel for kernel, *_ in launched] == ["shrink_kernel", "expand_kernel"]
    found = touched(launched, [x, *ys])
    assert found["wide"] == x.nbytes + sum(y.nbytes for y in ys)
    assert found["bits"] == n * x.nbytes / 16


@pytest.mark.parametrize("as_bits", [True, False])
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_s_backward(launched, name, as_bits):
    x, factors, lora_bs, seeds, scalings = group_of(name)
    n = len(factors)
    dys = [meta(x.shape[0], b.shape[0], dtype=BF16) for b in lora_bs]
    ss = [meta(x.shape[0], padded_rank(factors), dtype=BF16) for _ in factors]
    bits = [meta(x.shape[0], x.shape[1] // 8, dtype=torch.uint8) for _ in factors] if as_bits else []
    needs, no_masks = [True] * n, [None] * n
    dss, _ = output_gradients(dys, lora_bs, ss, scalings, P, no_masks, needs)
    dx, _ = input_gradients(x, factors, dss, P, seeds, bits, no_masks, needs, True)
    assert [kernel for kernel, *_ in launched] == ["output_kernel", "reduce_kernel", "input_kernel", "reduce_kernel"]
    found = touched(launched, [x, dx, *dys])
    Y = sum(dy.nbytes for dy in dys)
    assert found["wide"] == 2 * x.nbytes + Y
    assert found["bits"] == as_bits * n * x.nbytes / 16
    assert touched(launched[:1], dys)["parts"] <= GROUPS[name][-1] * Y
    # Of dA, which fewer tokens make in as many parts, so that as many programs are at work.
    assert touched(launched[2:3], [x, dx])["parts"] <= (0.04 if x.shape[0] == 8192 else 0.25) * n * x.nbytes
