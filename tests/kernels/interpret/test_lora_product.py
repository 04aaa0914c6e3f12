"""The product that carries its expand, interpreted on the CPU, against float64: every class of tiles, many tiles,
edges, the mask's bits, additions. test_lora_linear.py beside this has the layers that are made of it.
"""

import contextlib
import os

import pytest
import torch

import lorapar_kernels as lk

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lorapar_kernels import lora_product
from lorapar_kernels.triton_kernels import lora_forward as lora_forward_triton
from lorapar_kernels.triton_kernels import lora_product as lora_product_triton
from lorapar_kernels.triton_kernels.launch import COMMON_ROOM
from lorapar_kernels.triton_kernels.lora_product import WIDE_ROOM, input_gradient

# The interpreter cuts fp32 to bf16 where a GPU rounds: up to a whole unit of 2^-7.
KINDS = {"fp32": (torch.float32, 2e-6), "bf16": (torch.bfloat16, 8e-3), "fp16": (torch.float16, 1e-3)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty filled with NaN, or bits at random: an element that is not written, or is read first, shows."""
    empty = torch.empty

    def poison(made):
        if made.dtype == torch.uint8:
            return made.random_(256)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))


@pytest.fixture
def tiles(monkeypatch):
    """The (BM, BN, DESCRIBED) of every launch."""
    seen = []
    launch = lora_product_triton.launch

    def overheard(kernel, grid, *arguments, **constants):
        seen.append((constants["BM"], constants["BN"], constants["DESCRIBED"]))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(lora_product_triton, "launch", overheard)
    return seen


def output(x, weight, bias, s, b, scaling):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    lora_product_triton.output(x, weight, bias, s, b, scaling, y)
    return y


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


# tokens, in, out, rank, shared memory, what tiles that takes for bf16 and fp16
CASES = [
    (1, 16, 16, 1, WIDE_ROOM, (128, 128, True)),
    (150, 144, 272, 16, WIDE_ROOM, (128, 128, True)),
    (150, 144, 272, 33, COMMON_ROOM, (128, 128, False)),
    # Rows of 16 bytes, but no multiples of 16 elements.
    (150, 136, 264, 16, WIDE_ROOM, (64, 64, False)),
    (1, 8, 5, 1, WIDE_ROOM, (64, 64, False)),
    (70, 61, 67, 5, WIDE_ROOM, (64, 64, False)),
    # Rows of tiles beyond one band, the last band shorter.
    (64 * 9 + 3, 19, 130, 3, WIDE_ROOM, (64, 64, False)),
    (130, 80, 48, 256, WIDE_ROOM, (128, 128, True)),
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_both_directions_against_float64(monkeypatch, tiles, case, name):
    tokens, n_in, n_out, r, room, expected = CASES[case]
    dtype, bound = KINDS[name]
    monkeypatch.setattr(lora_product_triton, "_room", lambda device: room)
    x, w, bias, s, ds = (torch.randn(*shape).to(dtype) for shape in (
        (tokens, n_in), (n_out, n_in), (n_out,), (tokens, max(16, r)), (tokens, max(16, r))))  # fmt: skip
    # S's columns beyond the rank are padding, and must not matter whatever they hold.
    s[:, r:] = float("nan")
    ds[:, r:] = float("inf")
    # fp32 factors of values that x's dtype holds.
    a, b = (torch.randn(*shape).to(dtype).float() for shape in ((r, n_in), (n_out, r)))
    dy = torch.randn(tokens, n_out).to(dtype)

    y = output(x, w, bias, s, b, 1.5)
    exact = x.double() @ w.double().t() + bias.double() + 1.5 * s[:, :r].double() @ b.double().t()
    assert error(y, exact) < bound
    assert y.dtype == dtype

    seed, p = torch.randint(2**62, (1,)), 0.3
    exact = dy.double() @ w.double() + lk.dropout_mask(seed, x.shape, p) * (ds[:, :r].double() @ a.double())
    dx = input_gradient(None, dy, w, ds, a, seed, p)
    assert error(dx, exact) < bound
    again = input_gradient(dx.clone(), dy, w, ds, a, None, 0.0)
    exact = dx.double() + dy.double() @ w.double() + ds[:, :r].double() @ a.double()
    assert error(again, exact) < bound
    if name != "fp32":
        assert tiles[0] == expected


def test_wide_tiles(monkeypatch, tiles):
    """128 × 256, which a matrix of at least a tile for each multiprocessor takes."""
    monkeypatch.setattr(lora_product_triton, "PROGRAMS", 2)
    x, w, s, b = (torch.randn(*shape).bfloat16() for shape in ((200, 80), (272, 80), (200, 16), (272, 4)))
    exact = x.double() @ w.double().t() + 0.5 * s[:, :4].double() @ b.double().t()
    assert error(output(x, w, None, s, b, 0.5), exact) < KINDS["bf16"][1]
    dy, ds, a = torch.randn(200, 80).bfloat16(), torch.randn(200, 16).bfloat16(), torch.randn(4, 272).bfloat16()
    w, seed = torch.randn(80, 272).bfloat16(), torch.tensor([-7])
    kept = lk.dropout_mask(seed, (200, 272), 0.1)
    exact = dy.double() @ w.double() + kept * (ds[:, :4].double() @ a.double())
    assert error(input_gradient(None, dy, w, ds, a, seed, 0.1), exact) < KINDS["bf16"][1]
    assert set(tiles) == {(128, 256, True)}


def test_bits_read_and_bits_drawn_give_the_same():
    x, p, seed, a = torch.randn(70, 136).bfloat16(), 0.3, torch.tensor([11]), torch.randn(3, 136)
    _, (bits,) = lora_forward_triton.shrink(x, [a], p, [seed], True)
    dy, w, ds = torch.randn(70, 24).bfloat16(), torch.randn(24, 136).bfloat16(), torch.randn(70, 16).bfloat16()
    read, drawn = input_gradient(None, dy, w, ds, a, seed, p, bits), input_gradient(None, dy, w, ds, a, seed, p)
    assert torch.equal(read, drawn)


@pytest.mark.parametrize(("tokens", "n_in"), [(300, 264), (70, 61)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masks_bits_are_those_of_dropout_mask(tokens, n_in, dtype):
    """Of a zero product and ones at rank r, dX is the mask."""
    dy, w = torch.zeros(tokens, 8, dtype=dtype), torch.ones(8, n_in, dtype=dtype)
    ds, a = torch.zeros(tokens, 16, dtype=dtype), torch.ones(1, n_in)
    ds[:, 0] = 1.0
    seed = torch.tensor([2**61 + 12345])
    dx = input_gradient(None, dy, w, ds, a, seed, 0.37)
    assert torch.equal(dx.bool(), lk.dropout_mask(seed, (tokens, n_in), 0.37))
    assert set(dx.unique().tolist()) == {0.0, 1.0}


def test_any_strides(tiles):
    """Weights and factors that lie the other way round, rows apart, repeated rows, bases off 16 bytes."""
    x = torch.randn(40, 32).bfloat16()
    lying = torch.randn(32, 48).bfloat16()
    s, b = torch.randn(40, 16).bfloat16(), torch.randn(4, 48).bfloat16()
    expected = (x.double() @ lying.double() + s[:, :4].double() @ b.double()).bfloat16()
    for x_, w in [
        (x, lying.t()),
        (torch.cat([x, x], 1)[:, :32], torch.cat([lying, lying])[:32].t()),
        (torch.cat([x[:, :1], x], 1)[:, 1:], lying.t().contiguous()),
        (x, torch.cat([lying, lying]).t()[:, :64].reshape(48, 2, 32)[:, 0]),
        (x, lying.t().repeat_interleave(2, 1)[:, ::2]),
    ]:
        torch.testing.assert_close(output(x_, w, None, s, b.t(), 1.0), expected, rtol=2e-2, atol=2e-2)
    assert {described for *_, described in tiles} == {True, False}
    row = torch.randn(1, 32).bfloat16().expand(40, 32)
    torch.testing.assert_close(
        output(row, lying.t(), None, s, b.t(), 1.0),
        (row.double() @ lying.double() + s[:, :4].double() @ b.double()).bfloat16(),
        rtol=2e-2,
        atol=2e-2,
    )


def test_a_choice_by_the_clock_gives_the_chosen_ways_bits(monkeypatch):
    """As on a CUDA device, with the clock told what to find."""
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    x, w = torch.randn(20, 24, requires_grad=True), torch.randn(16, 24)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(16, 4, requires_grad=True)

    def run():
        y = lk.lora_linear(x, w, a, b, 1.0, dropout_p=0.2, seed=torch.tensor([3]))
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, a, b))]

    by_way = {}
    for way in ("plain", "fused"):
        monkeypatch.setenv("LORAPAR_PRODUCT", way)
        by_way[way] = run()
    monkeypatch.delenv("LORAPAR_PRODUCT")
    monkeypatch.setattr(lora_product, "_may_time", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for faster, slower in (("fused", "plain"), ("plain", "fused")):
        monkeypatch.setattr(lora_product, "_chosen", {})

        def seconds(ways, faster=faster, slower=slower):
            for call in ways.values():
                call()
            return {faster: 1.0, slower: 2.0}

        monkeypatch.setattr(lora_product, "seconds", seconds)
        for _ in range(2):
            assert all(torch.equal(mine, expected) for mine, expected in zip(run(), by_way[faster]))
        assert set(lora_product._chosen.values()) == {faster}
        monkeypatch.setattr(lora_product, "seconds", None)
        run()
