"""The forward's kernels, interpreted on the CPU, against float64 on fresh random inputs.

What `torch.empty` and its kin return is filled with NaN (bytes with 0x5A) first, so that what a kernel leaves unwritten
shows.
"""

import os

import pytest
import torch

import lorapar_kernels as lk

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lorapar_kernels.triton_kernels import lora_forward
from lorapar_kernels.triton_kernels.lora_forward import expand, group_size, padded_rank, shrink

KINDS = {"fp32": (torch.float32, 2e-6), "bf16": (torch.bfloat16, 1e-2), "fp16": (torch.float16, 2e-3)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poison(made):
        return made.fill_(float("nan") if made.is_floating_point() else 0x5A)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    call = lora_forward.Launch.__call__

    def counted(self, grid, *arguments):
        names.append(self.kernel.__name__)
        return call(self, grid, *arguments)

    monkeypatch.setattr(lora_forward.Launch, "__call__", counted)
    return names


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def factors_of(shapes, dtype, wide):
    """Values that x's dtype holds, stored in fp32 where wide: rounding them is by design, and no part of the error."""
    return [torch.randn(*shape).to(dtype).to(torch.float32 if wide else dtype) for shape in shapes]


def unpacked(bits, columns):
    return (bits[:, :, None] >> torch.arange(8) & 1).view(bits.shape[0], columns).bool()


CASES = [
    # tokens, in, outs, ranks, p, is x cut into parts
    (1, 8, (5,), (1,), 0.0, False),
    (35, 60, (33,), (5,), 0.3, False),
    (37, 61, (20, 7), (13, 8), 0.3, False),
    (66, 72, (72, 40, 8), (8, 8, 4), 0.1, False),
    (15, 520, (130, 48), (13, 16), 0.05, True),
    (13, 456, (40, 129, 24), (32, 17, 1), 0.1, True),
    (21, 520, (96,), (64,), 0.0, True),
    (12, 512, (24, 40, 72), (64, 33, 16), 0.2, True),
    (10, 264, (200,), (200,), 0.1, True),
]


@pytest.mark.parametrize(
    ("case", "name"), [*((i, n) for i in range(9) for n in ("fp32", "bf16")), (3, "fp16"), (5, "fp16")]
)
def test_shrink_and_expand(case, name, launches):
    T, K, widths, ranks, p, cut = CASES[case]
    (dtype, bound), wide = KINDS[name], case % 2 == 0
    x = torch.randn(T, K).to(dtype)
    las = factors_of([(r, K) for r in ranks], dtype, wide)
    lbs = factors_of([(N, r) for N, r in zip(widths, ranks)], dtype, wide)
    seeds = [torch.randint(2**62, (1,)) if p else None for _ in ranks]
    keeps = [lk.dropout_mask(seed, (T, K), p) if p else torch.ones(T, K) for seed in seeds]
    keep_bits = p > 0 and K % 8 == 0
    parts, bits = shrink(x, las, p, seeds, keep_bits)

    R = padded_rank(las)
    size = x.element_size()
    assert launches == ["shrink_kernel"] * -(-len(las) // group_size(size, K, R, p))
    exact = []
    for part, a, keep in zip(parts, las, keeps):
        exact.append(x.double() * keep / (1.0 - p) @ a.double().t())
        assert part.shape[1:] == (T, R)
        # fp32 has smaller tiles, so fewer columns make enough steps for parts.
        assert cut <= (part.shape[0] > 1)
        assert part.dtype == (torch.float32 if part.shape[0] > 1 else dtype)
        assert error(part.double().sum(0)[:, : a.shape[0]], exact[-1]) < bound
        assert not part[:, :, a.shape[0] :].any()
    assert len(bits) == (len(las) if keep_bits else 0)
    for packed, keep in zip(bits, keeps):
        assert torch.equal(unpacked(packed, K), keep)

    launches.clear()
    scalings = [0.5 + i for i in range(len(las))]
    biases = [torch.randn(N).to(dtype) if (case + i) % 2 else None for i, N in enumerate(widths)]
    # An opaque base's output: its own strides, and left as it is.
    bases = [torch.randn(T, 2 * N).to(dtype)[:, ::2] if (case + i) % 3 == 0 else None for i, N in enumerate(widths)]
    before = [None if base is None else base.clone() for base in bases]
    ys, sums = expand(parts, lbs, scalings, biases, bases, dtype)
    assert launches == ["expand_kernel"]
    for i, (y, s, b) in enumerate(zip(ys, sums, lbs)):
        expected = scalings[i] * exact[i] @ b.double().t()
        for term in (biases[i], bases[i]):
            expected = expected if term is None else expected + term.double()
        assert y.dtype == s.dtype == dtype
        assert y.shape == (T, widths[i])
        assert error(y, expected) < bound
        # What the backward reads is what y was made of.
        torch.testing.assert_close(s, _in_order(parts[i]).to(dtype), **ROUNDED[dtype])
        base = before[i]
        assert base is None or torch.equal(bases[i], base)


# The interpreter cuts off what a half precision does not hold, where a GPU rounds.
ROUNDED = {kind: dict(rtol=2 * step, atol=0.0) for kind, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11))}
ROUNDED[torch.float32] = dict(rtol=0.0, atol=0.0)


def _in_order(part):
    total = part[0].clone()
    for other in part[1:]:
        total += other
    return total


def test_parts_are_added_in_fp32_and_rounded_then():
    """bf16 has 1 + 4 · 2⁻⁹ = 1 + 2⁻⁷, but not 1 + 2⁻⁹; the fifth part is one more than are loaded ahead."""
    parts = torch.zeros(5, 3, 16)
    parts[:, :, 0] = torch.tensor([1.0, *[2**-9] * 4])[:, None]
    (y,), (s,) = expand([parts], [torch.ones(9, 1)], [1.0], [None], [None], torch.bfloat16)
    assert (y == 1 + 2**-7).all()
    assert (s[:, 0] == 1 + 2**-7).all()
    assert not s[:, 1:].any()


def test_dropout_without_a_draw_and_with_nothing_kept():
    """Shares that round to the thresholds 0 and 65536 of 65536."""
    x, a, seed = torch.randn(9, 24), torch.randn(3, 24), torch.tensor([5])
    assert lk.dropout_mask(seed, (9, 24), 1e-6).all()
    (part,), bits = shrink(x, [a], 1e-6, [seed], True)
    assert bits == []
    torch.testing.assert_close(part[0, :, :3], x @ a.t() / (1 - 1e-6))
    assert not lk.dropout_mask(seed, (9, 24), 0.999999).any()
    (part,), (bits,) = shrink(x, [a], 0.999999, [seed], True)
    assert not part.any()
    assert not bits.any()


@pytest.mark.parametrize("p", [0.5 / 65536 + 1e-9, 0.05, 0.5, 1 - 1e-5])
def test_bits_are_the_dropout_mask(p):
    """Of seeds with all their bits, a tile that ends within a row, and more rows than a tile has."""
    for seed in (torch.tensor([-1]), torch.randint(-(2**62), 2**62, (1,))):
        x, a = torch.randn(19, 88), torch.randn(2, 88)
        _, (bits,) = shrink(x, [a], p, [seed], True)
        assert torch.equal(unpacked(bits, 88), lk.dropout_mask(seed, (19, 88), p))


def test_nan_stays_in_its_row_and_in_what_is_kept():
    x, a, b = torch.randn(42, 64), torch.randn(4, 64), torch.randn(16, 4)
    seed = torch.tensor([8])
    keep = lk.dropout_mask(seed, (42, 64), 0.5)
    dropped, kept = int((~keep[3]).nonzero()[0]), int(keep[40].nonzero()[0])
    x[3, dropped], x[40, kept] = float("nan"), float("inf")
    parts, _ = shrink(x, [a], 0.5, [seed])
    (y,), _ = expand(parts, [b], [1.0], [None], [None], torch.float32)
    assert not y[40].isfinite().any()
    assert y[[i for i in range(42) if i != 40]].isfinite().all()


def test_any_strides_and_as_often_the_same_bits():
    torch.manual_seed(4)
    x, seed = torch.randn(10, 400)[:, 3:291], torch.tensor([2])
    a, b, bias = torch.randn(288, 5).t(), torch.randn(5, 60).t()[::3], torch.randn(40)[::2]
    runs = []
    for _ in range(2):
        parts, _ = shrink(x, [a], 0.2, [seed])
        ys, sums = expand(parts, [b], [1.5], [bias], [None], torch.float32)
        runs.append([*parts, *ys, *sums])
    assert all(torch.equal(one, other) for one, other in zip(*runs))
    keep = lk.dropout_mask(seed, (10, 288), 0.2)
    exact = 1.5 * (x.double() * keep / 0.8 @ a.double().t()) @ b.double().t() + bias.double()
    assert error(runs[0][1], exact) < 2e-6
