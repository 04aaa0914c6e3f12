"""The layer on the Triton kernels, interpreted on the CPU, against autograd in float64 on fresh random inputs.

Every output of `torch.empty` is filled with NaN first, so that what a kernel leaves unwritten shows.
"""

import importlib
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lorapar_kernels as lk

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lorapar_kernels import lora_product as product
from lorapar_kernels.triton_kernels import lora_backward as backward_triton
from lorapar_kernels.triton_kernels import lora_forward as forward_triton
from lorapar_kernels.triton_kernels import lora_product as product_triton

# The package's name of it is the function's.
linear = importlib.import_module("lorapar_kernels.lora_linear")

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
    of_forward, of_backward, of_product = (
        ("run_shrink", "run_expand"), ("run_output", "run_input"), ("output", "input_gradient")
    )  # fmt: skip
    for module, names in (
        (forward_triton, of_forward), (backward_triton, of_backward), (product_triton, of_product)
    ):  # fmt: skip
        for name in names:
            inner = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, inner=inner, name=name: (called.append(name), inner(*a))[1])
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(4, 16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    lk.lora_linear(x, w, a, b, 1.0).sum().backward()
    expected = {
        "plain": ["run_shrink", "run_expand", "run_output", "run_input"],
        "fused": ["run_shrink", "output", "run_output", "run_input", "input_gradient"],
    }[os.environ["LORAPAR_PRODUCT"]]
    assert called == expected
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    monkeypatch.delenv("LORAPAR_PRODUCT")
    lk.lora_linear(x, w, a, b, 1.0).sum().backward()
    assert called == expected


def test_bits_kept_and_drawn_again_give_the_same(monkeypatch):
    """A group, in 16 bits: what the backward reads is what it would draw."""
    kept = []
    backward = product.backward

    def hearing(dys, x, columns, bits, *rest):
        kept.append(len(bits))
        return backward(dys, x, columns, bits, *rest)

    monkeypatch.setattr(product, "backward", hearing)
    x = torch.randn(37, 72).bfloat16().requires_grad_()
    layers = layers_of(72, (40, 8), (8, 4), torch.bfloat16, True)
    leaves = [x, *(t.requires_grad_() for _, _, a, b in layers for t in (a, b))]
    found = []
    for keep in (False, True):
        monkeypatch.setattr(linear, "keeps_bits", lambda x, layers, p, keep=keep: keep)
        ys = lk.lora_linear_grouped(
            x, [w for w, *_ in layers], [a for *_, a, _ in layers], [b for *_, b in layers], [1.0, 2.0],
            dropout_p=0.3, seeds=[torch.tensor([3]), torch.tensor([4])],
        )  # fmt: skip
        found.append(torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys]))
    assert kept == [0, 2]
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_few_tokens_without_a_gradient_are_torchs_own_products(monkeypatch):
    """Where the factors have x's dtype; a layer alone, of at most 16 tokens."""
    called = []
    shrink = forward_triton.run_shrink
    monkeypatch.setattr(forward_triton, "run_shrink", lambda *a: (called.append(1), shrink(*a))[1])
    for tokens, dtype, expected in ((16, torch.float32, 0), (17, torch.float32, 1), (1, torch.bfloat16, 1)):
        called.clear()
        x, w = torch.randn(tokens, 32).to(dtype), torch.randn(24, 32).to(dtype)
        a, b = torch.randn(4, 32), torch.randn(24, 4)
        y = lk.lora_linear(x, w, a, b, 2.0)
        assert len(called) == expected
        exact = x.double() @ w.double().t() + 2.0 * x.double() @ a.double().t() @ b.double().t()
        assert error(y, exact) < (2e-6 if dtype == torch.float32 else 2e-2)


def grouped(ranks, used, tokens=40, n_in=48, scalings=None):
    """Some outputs' gradients of a group, beside those in float64: pairs of x's and of each used layer's factors."""
    x = torch.randn(tokens, n_in).requires_grad_()
    layers = [(torch.randn(24, n_in), *(t.requires_grad_() for t in (torch.randn(r, n_in), torch.randn(24, r))))
              for r in ranks]  # fmt: skip
    scalings = scalings or [1.5] * len(ranks)
    ys = lk.lora_linear_grouped(x, *zip(*layers), scalings)
    leaves = [x, *(factor for i in used for factor in layers[i][1:])]
    dys = [torch.randn(tokens, 24) for _ in used]
    found = torch.autograd.grad([ys[i] for i in used], leaves, dys)
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outs = []
    for place, i in enumerate(used):
        a, b = copies[1 + 2 * place : 3 + 2 * place]
        outs.append(copies[0] @ layers[i][0].double().t() + scalings[i] * copies[0] @ a.t() @ b.t())
    return zip(found, torch.autograd.grad(outs, copies, [dy.double() for dy in dys]))


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_whose_siblings_go_unused_has_its_groups_width(order):
    """The same layer alone and in a wider group, one after the other: each S is as wide as its own group's widest."""
    cases = [((4, 4), (0,)), ((4, 64), (0,)), ((4, 200), (0,))]
    for ranks, used in cases[::order]:
        for mine, exact in grouped(ranks, used):
            assert error(mine, exact) < 2e-6


def test_a_scaling_that_is_an_integer():
    """As a number that each launch takes anew, like any other; NumPy's too."""
    for scalings in ([0.5, 2.0], [1, 3], [np.float32(1.0), 1]):
        for mine, exact in grouped((4, 8), (0, 1), scalings=scalings):
            assert error(mine, exact) < 2e-6


def test_layers_whose_launches_take_x_in_other_numbers_of_parts(monkeypatch):
    """Two layers of one launch find rows enough, and the third, in a launch with larger tiles, does not."""
    monkeypatch.setattr(forward_triton, "PROGRAMS", 3)
    forward_triton._plan_shrink.cache_clear()
    monkeypatch.setattr(product, "_plans", {})
    x = torch.randn(96, 1024).bfloat16()
    layers = layers_of(1024, (8, 8, 8), (64, 64, 64), torch.bfloat16, False)
    assert len({part.shape[0] for part in forward_triton.shrink(x, [a for *_, a, _ in layers], 0.0, [None] * 3)[0]}) > 1
    ys = lk.lora_linear_grouped(
        x, [w for w, *_ in layers], [a for *_, a, _ in layers], [b for *_, b in layers], [1.0] * 3
    )
    forward_triton._plan_shrink.cache_clear()
    for y, (w, _, a, b) in zip(ys, layers):
        assert error(y, x.double() @ w.double().t() + x.double() @ a.double().t() @ b.double().t()) < 2e-2


def test_the_precision_is_that_of_the_call(monkeypatch):
    """A backward under a switch that its forward was not under; and another one afterwards."""
    told = []
    launch = backward_triton._output_launch
    monkeypatch.setattr(backward_triton, "_output_launch", lambda *a: (told.append(a[3]), launch(*a))[1])
    backward_triton._plan_output.cache_clear()
    monkeypatch.setattr(product, "_plans", {})
    x, w = torch.randn(20, 24, requires_grad=True), torch.randn(16, 24)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for way in ("tf32", "ieee"):
            y = lk.lora_linear(x, w, a, b, 1.0)
            torch.backends.cuda.matmul.fp32_precision = way
            y.sum().backward()
            torch.backends.cuda.matmul.fp32_precision = before
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert told == ["tf32", "ieee"]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_several_gradients_at_once(p):
    """They are no kernel's, having no memory of their own, beside a padded S and kept bits."""
    x = torch.randn(9, 40).bfloat16().requires_grad_()
    layers = [[t.bfloat16() for t in (torch.randn(12, 40), torch.randn(4, 40), torch.randn(12, 4))] for _ in range(2)]
    leaves = [x, *(factor.requires_grad_() for _, *factors in layers for factor in factors)]
    seeds = [torch.tensor([3]), torch.tensor([4])]
    ys = lk.lora_linear_grouped(x, *zip(*layers), [1.0, 2.0], dropout_p=p, seeds=seeds)
    y = lk.lora_add(ys[0], x, *layers[1][1:], 1.0, dropout_p=p, seed=seeds[0])
    dys = torch.randn(3, 9, 12).bfloat16()
    expected = [
        torch.stack(each)
        for each in zip(*(torch.autograd.grad(y + ys[1], leaves, dy, retain_graph=True) for dy in dys))
    ]
    at_once = torch.autograd.grad(y + ys[1], leaves, dys, is_grads_batched=True, retain_graph=True)
    for one, other in zip(at_once, expected):
        assert error(one, other.double()) < 2e-2


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
