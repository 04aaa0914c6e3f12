"""The layer on the Triton kernels, interpreted on the CPU, against autograd in float64 on fresh random inputs.

Every output of `torch.empty` is filled with NaN first, so that what a kernel leaves unwritten shows.
"""

import os

import pytest
import torch
import torch.nn.functional as F

import lorapar_kernels as lk

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lorapar_kernels.triton_kernels import lora_passes as lora_passes_triton
from lorapar_kernels.triton_kernels import lora_product as lora_product_triton

DTYPES = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 3e-3}
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True, params=["plain", "fused"])
def poisoned(monkeypatch, request):
    """Every test with torch's product and the expand added to it, and with the product that carries its expand."""
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    monkeypatch.setenv("LORAPAR_PRODUCT", request.param)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(made):
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def layers_of(n_in, n_outs, ranks, dtype, wide):
    # Values that x's dtype holds: rounding the factors, which the layer does by design, is no part of the error.
    factor = torch.float32 if wide else dtype
    each = []
    for n_out, r in zip(n_outs, ranks):
        shapes = (n_out, n_in), (n_out,), (r, n_in), (n_out, r)
        w, bias, a, b = (torch.randn(*shape).to(dtype) for shape in shapes)
        each.append((w, bias, a.to(factor), b.to(factor)))
    return each


def exact_of(x, layers, scalings, masks, keeps, p, dys):
    """Outputs, dX, each dA and dB in float64 by autograd."""
    x = x.double().requires_grad_()
    ys, factors = [], []
    for (w, bias, a, b), s, keep in zip(layers, scalings, keeps):
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        dropped = x * keep / (1.0 - p)
        ys.append(F.linear(x, w.double(), bias.double()) + s * (dropped @ a.t()) @ b.t())
        factors.append((a, b))
    torch.autograd.backward(ys, [dy.double() for dy in dys])
    return ys, x.grad, [(a.grad * ma, b.grad * mb) for (a, b), (ma, mb) in zip(factors, masks)]


CASES = [
    # leading, in, outs, ranks, p
    ((1,), 8, (5,), (3,), 0.0),
    ((21,), 8, (5,), (1,), 0.0),
    ((63,), 60, (33,), (5,), 0.3),
    ((2, 35), 64, (130,), (16,), 0.05),
    ((70,), 61, (20,), (17,), 0.3),
    ((33,), 72, (40, 8, 8), (8, 8, 4), 0.1),
    ((130,), 64, (48, 96), (33, 64), 0.0),
    ((67,), 64, (24, 8, 8), (17, 32, 4), 0.1),
    ((35,), 61, (24,), (32,), 0.1),
    ((20,), 64, (24,), (256,), 0.1),
]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_outputs_and_gradients(case, name):
    leading, n_in, n_outs, ranks, p = CASES[case]
    dtype, n = KINDS[name], len(n_outs)
    x = torch.randn(*leading, n_in).to(dtype)
    layers = layers_of(n_in, n_outs, ranks, dtype, wide=case % 2 == 0)
    scalings = [0.5 + i for i in range(n)]
    seeds = [torch.randint(2**62, (1,)) if p else None for _ in range(n)]
    masks = [(torch.rand(a.shape) < 0.4, torch.rand(b.shape) < 0.4) for _, _, a, b in layers]
    keeps = [lk.dropout_mask(seed, x.shape, p) if p else torch.ones(x.shape) for seed in seeds]
    dys = [torch.randn(*leading, n_out).to(dtype) for n_out in n_outs]
    ys, dx, factors = exact_of(x, layers, scalings, masks, keeps, p, dys)

    x = x.requires_grad_()
    leaves = [(a.requires_grad_(), b.requires_grad_()) for _, _, a, b in layers]
    ours = lk.lora_linear_grouped(
        x, [w for w, *_ in layers], [a for a, _ in leaves], [b for _, b in leaves], scalings,
        [bias for _, bias, *_ in layers], [mask for mask, _ in masks], [mask for _, mask in masks], p, seeds,
    )  # fmt: skip
    torch.autograd.backward(ours, dys)
    bound = DTYPES[name]
    for mine, exact in zip(ours, ys):
        assert error(mine, exact.detach()) < bound
    assert error(x.grad, dx) < bound
    for (a, b), (da, db), (ma, mb) in zip(leaves, factors, masks):
        assert error(a.grad, da) < bound
        assert error(b.grad, db) < bound
        assert a.grad.dtype == a.dtype
        assert not a.grad[~ma].any()
        assert not b.grad[~mb].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opaque_base_equals_the_reference(monkeypatch, p):
    def run():
        torch.manual_seed(3)
        x, y = torch.randn(37, 40, requires_grad=True), torch.randn(37, 24, requires_grad=True)
        a, b = torch.randn(6, 40, requires_grad=True), torch.randn(24, 6, requires_grad=True)
        out = lk.lora_add(y, x, a, b, 1.5, dropout_p=p, seed=torch.tensor([9]))
        out.backward(torch.randn(37, 24))
        return out.detach(), x.grad, y.grad, a.grad, b.grad

    ours = run()
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    monkeypatch.delenv("LORAPAR_PRODUCT")
    for mine, expected in zip(ours, run()):
        assert error(mine, expected.double()) < 2e-6


def test_a_tile_without_an_active_bit_is_skipped():
    """Nothing of it is written: its partial sums are still NaN, and only the mask keeps them out of the gradient."""
    x, ds = torch.randn(64, 192), torch.randn(64, 16)
    a = torch.randn(16, 192)
    mask = torch.zeros(16, 192, dtype=torch.bool)
    mask[:, 128:] = torch.rand(16, 64) < 0.5
    partial = []
    reduce = lora_passes_triton._reduce
    lora_passes_triton._reduce = lambda part, *rest: (partial.append(part), reduce(part, *rest))[1]
    try:
        (da,) = lora_passes_triton.input_gradients(x, None, [a], [ds], 0.0, [None], [mask], [True])
        dy, b, s = torch.randn(64, 192), torch.randn(192, 16), torch.randn(64, 16)
        _, db = lora_passes_triton.output_gradients(dy, b, s, 1.0, 0.0, mask.t().contiguous(), True)
    finally:
        lora_passes_triton._reduce = reduce
    part_a, part_b = partial[0], partial[-1]
    assert not part_a[:, :, :128].any()
    assert part_b[:, :128].isnan().all()
    assert part_b[:, 128:].isfinite().all()
    torch.testing.assert_close(da, ds.t() @ x * mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(db, dy.t() @ s * mask.t(), rtol=1e-4, atol=1e-4)


def test_no_gradient_of_a_factor_that_needs_none():
    x = torch.randn(20, 24, requires_grad=True)
    w, a, b = torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4, requires_grad=True)
    lk.lora_linear(x, w, a, b, 1.0).sum().backward()
    assert a.grad is None
    torch.testing.assert_close(x.grad, (w + b.detach() @ a).sum(0).expand(20, 24), rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_right_share_and_its_scale():
    """Of x = 1 and A = B = 1, y − xW is the number of kept elements over 1 − p."""
    n_in, tokens, p = 512, 64, 0.25
    x, w = torch.ones(tokens, n_in), torch.zeros(1, n_in)
    y = lk.lora_linear(x, w, torch.ones(1, n_in), torch.ones(1, 1), 1.0, dropout_p=p, seed=torch.tensor([5]))
    kept = lk.dropout_mask(torch.tensor([5]), x.shape, p).sum(1, keepdim=True)
    torch.testing.assert_close(y, kept / (1 - p))
    # 32,768 draws: five standard deviations of the mean are 0.012.
    assert abs(float(kept.sum()) / x.numel() - (1 - p)) < 0.012


def test_nan_stays_in_its_row():
    x = torch.randn(70, 64)
    x[3, 5], x[40, 0] = float("nan"), float("inf")
    w, a, b = torch.randn(16, 64), torch.randn(4, 64), torch.randn(16, 4)
    y = lk.lora_linear(x, w, a, b, 1.0)
    assert not y[[3, 40]].isfinite().any()
    assert y[[i for i in range(70) if i not in (3, 40)]].isfinite().all()


def test_twice_the_same_bits():
    x, w = torch.randn(100, 64, requires_grad=True), torch.randn(64, 64)
    a, b = torch.randn(8, 64, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    runs = []
    for _ in range(2):
        x.grad = a.grad = b.grad = None
        y = lk.lora_linear(x, w, a, b, 1.0, dropout_p=0.1, seed=torch.tensor([1]))
        y.square().sum().backward()
        runs.append([y.detach(), x.grad, a.grad, b.grad])
    assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_what_ran_was_the_kernels(monkeypatch):
    called = []
    passes, of_product = ("shrink", "output_gradients", "input_gradients"), ("output", "input_gradient")
    for module, names in ((lora_passes_triton, passes), (lora_product_triton, of_product)):
        for name in names:
            inner = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, inner=inner, name=name: (called.append(name), inner(*a))[1])
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(4, 16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    lk.lora_linear(x, w, a, b, 1.0).sum().backward()
    products = {"plain": [], "fused": ["output", "input_gradient"]}[os.environ["LORAPAR_PRODUCT"]]
    assert [name for name in called if name in passes] == list(passes)
    assert [name for name in called if name in of_product] == products
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    monkeypatch.delenv("LORAPAR_PRODUCT")
    lk.lora_linear(x, w, a, b, 1.0).sum().backward()
    assert len(called) == 3 + len(products)


def test_what_the_kernels_do_not_take_is_refused():
    x, w, a, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
    with pytest.raises(ValueError, match="cannot serve lora_linear: the kernels add in fp32, and x is float64"):
        lk.lora_linear(*(t.double() for t in (x, w, a, b)), 1.0)
    with pytest.raises(ValueError, match="at most rank 256, got 257"):
        lk.lora_linear(x, w, torch.randn(257, 8), torch.randn(4, 257), 1.0)


def test_any_strides_of_x_the_factors_and_the_masks(monkeypatch):
    def run():
        torch.manual_seed(4)
        x = torch.randn(24, 37).t()[:, ::2].requires_grad_()
        w, dy = torch.randn(10, 12), torch.randn(1, 10).expand(37, 10)
        a, b = torch.randn(12, 5).t().requires_grad_(), torch.randn(5, 10).t().requires_grad_()
        masks = dict(mask_a=(torch.rand(12, 5) < 0.5).t(), mask_b=(torch.rand(5, 10) < 0.5).t())
        y = lk.lora_linear(x, w, a, b, 1.5, dropout_p=0.2, seed=torch.tensor([2]), **masks)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)

    ours = run()
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    monkeypatch.delenv("LORAPAR_PRODUCT")
    for mine, expected in zip(ours, run()):
        assert error(mine, expected.double()) < 2e-6
