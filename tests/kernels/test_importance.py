"""Σ Gφ and Σ (Gφ)² each against one example at a time in float64; batching, packing, order, and bad offsets."""

import pytest
import torch

import lorapar_kernels as lk


def layer(n_in=7, n_out=5, r=3, dtype=torch.float64):
    return tuple(torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((n_out, n_in), (r, n_in), (n_out, r)))


def naive(examples, w, a, b, scaling):
    """One forward and backward an example, autograd's gradients, as the released script does."""
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    sums = lk.ScoreSums.zeros_like(a, b)
    for x, dy in examples:
        y = x.double() @ w.double().t() + scaling * x.double() @ a.t() @ b.t()
        grads = torch.autograd.grad(y, (a, b), dy.double())
        for i, (grad, factor) in enumerate(zip(grads, (a, b))):
            gphi = (grad * factor).detach()
            sums[2 * i].add_(gphi)
            sums[2 * i + 1].add_(gphi * gphi)
    return sums


def ours(examples, w, a, b, scaling):
    x = torch.cat([x for x, _ in examples]).requires_grad_()
    dy = torch.cat([dy for _, dy in examples])
    offsets = torch.tensor([0, *[len(x) for x, _ in examples]]).cumsum(0)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    sums = lk.ScoreSums.zeros_like(a, b)
    lk.lora_linear_scored(x, w, a, b, scaling, offsets, sums).backward(dy)
    assert a.grad is None
    assert b.grad is None
    return sums, x.grad


def draw_examples(lengths, n_in=7, n_out=5, dtype=torch.float64):
    return [(torch.randn(n, n_in).to(dtype), torch.randn(n, n_out).to(dtype)) for n in lengths]


@pytest.mark.parametrize("lengths", [[4], [1], [1, 5, 2, 9], [16, 17, 1, 63]])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_each_sum_equals_one_example_at_a_time(lengths, dtype, bound):
    n_in, n_out = (64, 48) if dtype == torch.bfloat16 else (7, 5)
    w, a, b = layer(n_in, n_out, 8, dtype)
    examples = draw_examples(lengths, n_in, n_out, dtype)
    expected = naive(examples, w, a, b, 1.5)
    sums, _ = ours(examples, w, a, b, 1.5)
    for name, got, want in zip(lk.ScoreSums._fields, sums, expected):
        relative = (got.double() - want).norm() / want.norm()
        # Of a lone token in bf16 the one rounding of dS is that of a whole row, and its square has it twice.
        lone = dtype == torch.bfloat16 and len(lengths) == 1 and name.endswith("sq")
        assert relative < (2 * bound if lone else bound), (name, relative)


def test_input_gradient_is_the_layer_s_own():
    w, a, b = layer()
    examples = draw_examples([3, 4])
    _, dx = ours(examples, w, a, b, 1.5)
    expected = torch.cat([dy @ w + 1.5 * dy @ b @ a for _, dy in examples])
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_is_added_and_moves_no_sum():
    w, a, b = layer()
    ((x, dy),) = draw_examples([4])
    bias, offsets = torch.randn(5, dtype=torch.float64), torch.tensor([0, 4])
    sums, without = lk.ScoreSums.zeros_like(a, b), lk.ScoreSums.zeros_like(a, b)
    y = lk.lora_linear_scored(x.requires_grad_(), w, a, b, 1.5, offsets, sums, bias=bias)
    plain = lk.lora_linear_scored(x, w, a, b, 1.5, offsets, without)
    torch.testing.assert_close(y, plain + bias)
    y.backward(dy)
    plain.backward(dy)
    assert all(torch.equal(one, other) for one, other in zip(sums, without))


def test_order_of_examples_does_not_matter():
    w, a, b = layer()
    examples = draw_examples([3, 9, 1, 30])
    one, _ = ours(examples, w, a, b, 1.5)
    other, _ = ours(examples[::-1], w, a, b, 1.5)
    for got, want in zip(one, other):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


def test_squares_are_per_example_not_of_the_batch():
    """Two examples of opposite gradient: the mean gradient is zero, the Fisher term is not."""
    w, a, b = layer()
    ((x, dy),) = draw_examples([4])
    sums, _ = ours([(x, dy), (x, -dy)], w, a, b, 1.0)
    single, _ = ours([(x, dy)], w, a, b, 1.0)
    torch.testing.assert_close(sums.a_gphi, torch.zeros_like(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(sums.a_gphi_sq, 2 * single.a_gphi_sq)


def test_importance_is_the_paper_s_formula():
    g, f, n = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 4.0]), 2
    torch.testing.assert_close(lk.importance(g, f, n), torch.tensor([abs(1.5 - 0.5), abs(-0.5 - 1.0)]))
    with pytest.raises(ValueError, match="n_examples must be at least 1, got 0"):
        lk.importance(g, f, 0)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3], "run from 0 to the 4 tokens of x, got 0 to 3"),
        ([0, 5], "run from 0 to the 4 tokens of x, got 0 to 5"),
        ([1, 4], "got 1 to 4"),
        ([0, 2, 2, 4], "offsets must rise, got 2 then 2 at example 1"),
        ([0, 3, 2, 4], "offsets must rise, got 3 then 2"),
        ([0], "at least 2 entries"),
    ],
)
def test_bad_offsets_are_refused(offsets, message):
    w, a, b = layer()
    sums = lk.ScoreSums.zeros_like(a, b)
    with pytest.raises(ValueError, match=message):
        lk.lora_linear_scored(torch.randn(4, 7, dtype=torch.float64), w, a, b, 1.0, torch.tensor(offsets), sums)


def test_sums_of_another_shape_are_refused():
    w, a, b = layer()
    sums = lk.ScoreSums.zeros_like(a[:1], b)
    with pytest.raises(ValueError, match=r"sums.a_gphi must be \[3, 7\], got \[1, 7\]"):
        lk.lora_linear_scored(torch.randn(4, 7, dtype=torch.float64), w, a, b, 1.0, torch.tensor([0, 4]), sums)


def test_an_opaque_base_gets_the_same_sums_and_its_gradient_passed_through():
    w, a, b = layer()
    examples = draw_examples([3, 4])
    expected, dx = ours(examples, w, a, b, 1.5)
    x, dy = (torch.cat(parts) for parts in zip(*examples))
    x.requires_grad_()
    y = (x.detach() @ w.t()).requires_grad_()
    sums = lk.ScoreSums.zeros_like(a, b)
    out = lk.lora_add_scored(y, x, a, b, 1.5, torch.tensor([0, 3, 7]), sums)
    torch.testing.assert_close(out, x @ w.t() + 1.5 * x @ a.t() @ b.t())
    out.backward(dy)
    assert all(torch.equal(got, want) for got, want in zip(sums, expected))
    assert torch.equal(y.grad, dy)
    torch.testing.assert_close(x.grad + dy @ w, dx)
    with pytest.raises(ValueError, match=r"y must be \[7, out\] as x is, got \[6, 5\]"):
        lk.lora_add_scored(y[:6], x, a, b, 1.5, torch.tensor([0, 3, 7]), sums)


def test_offsets_checked_once_serve_every_layer():
    w, a, b = layer()
    examples = lk.Examples.of(torch.tensor([0, 3, 7], dtype=torch.int32))
    assert (examples.starts, examples.offsets.dtype) == ([0, 3, 7], torch.int64)
    expected, _ = ours(made := draw_examples([3, 4]), w, a, b, 1.5)
    x, dy = (torch.cat(parts) for parts in zip(*made))
    sums = lk.ScoreSums.zeros_like(a, b)
    lk.lora_linear_scored(x.requires_grad_(), w, a, b, 1.5, examples, sums).backward(dy)
    assert all(torch.equal(got, want) for got, want in zip(sums, expected))
    with pytest.raises(ValueError, match="run from 0 to the 6 tokens of x, got 0 to 7"):
        lk.lora_linear_scored(x[:6], w, a, b, 1.5, examples, sums)


def test_a_hundred_thousand_examples_lose_nothing():
    """One example added 100,000 times in 1,000 calls: plain fp32 sums drift by 1e-4, the pairs by 1e-7 and less."""
    # Its own draw: an element of a few low bits drifts less than the bound.
    torch.manual_seed(1)
    w, a, b = layer(n_in=2, n_out=2, r=1, dtype=torch.float32)
    ((x, dy),) = draw_examples([1], 2, 2, torch.float32)
    single, _ = ours([(x, dy)], w, a, b, 1.0)
    exact = [total.double() + rest for total, rest in zip(single, single.rests)]
    sums, plain = lk.ScoreSums.zeros_like(a, b), torch.zeros_like(single.a_gphi_sq)
    many_x, many_dy, offsets = x.repeat(100, 1).requires_grad_(), dy.repeat(100, 1), torch.arange(101)
    for _ in range(1000):
        lk.lora_linear_scored(many_x, w, a, b, 1.0, offsets, sums).backward(many_dy)
        for _ in range(100):
            plain += single.a_gphi_sq
    drift = ((plain.double() - 1e5 * exact[1]) / (1e5 * exact[1])).abs().max()
    assert drift > 1e-5
    for total, rest, one in zip(sums, sums.rests, exact):
        # The total alone to fp32's last bit, and with its rest far beyond.
        torch.testing.assert_close(total.double(), 1e5 * one, rtol=2**-23, atol=0)
        torch.testing.assert_close(total.double() + rest, 1e5 * one, rtol=1e-10, atol=0)


def test_the_squares_of_fp16_do_not_overflow():
    """|Gφ| over 256 has a square beyond fp16; over 65,504 the product itself is."""
    w, a, b = layer(dtype=torch.float16)
    examples = [(torch.full((50, 7), 30.0).half(), torch.full((50, 5), 40.0).half())]
    sums, _ = ours(examples, w, a, b, 1.0)
    expected = naive(examples, w, a, b, 1.0)
    assert max(total.abs().max() for total in expected) > 65504
    for name, got, want in zip(lk.ScoreSums._fields, sums, expected):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() / want.norm() < 2e-2, name


def test_sums_keep_their_four_names_and_places():
    _, a, b = layer()
    sums = lk.ScoreSums.zeros_like(a, b)
    assert lk.ScoreSums._fields == ("a_gphi", "a_gphi_sq", "b_gphi", "b_gphi_sq")
    assert [total.shape for total in sums] == [a.shape, a.shape, b.shape, b.shape]
    assert [rest.shape for rest in sums.rests] == [total.shape for total in sums]
    # All that scoring keeps beyond a batch: 16 bytes an element.
    sums = lk.ScoreSums.zeros_like(a.float(), b.float())
    assert sum(t.numel() * t.element_size() for t in (*sums, *sums.rests)) == 16 * (a.numel() + b.numel())


def test_a_forced_kernel_never_falls_back(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    w, a, b = layer()
    with pytest.raises(ValueError, match="LORAPAR_BACKEND=triton cannot serve lora_linear_scored: .*float64"):
        ours(draw_examples([2]), w, a, b, 1.0)


@pytest.mark.parametrize("opaque", [False, True])
def test_a_second_derivative_is_refused_and_adds_nothing(opaque):
    x, w, a, b = (torch.randn(*shape) for shape in ((4, 5), (3, 5), (2, 5), (3, 2)))
    x.requires_grad_()
    sums, offsets = lk.ScoreSums.zeros_like(a, b), torch.tensor([0, 4])
    if opaque:
        y = lk.lora_add_scored(x @ w.t(), x, a, b, 1.0, offsets, sums)
    else:
        y = lk.lora_linear_scored(x, w, a, b, 1.0, offsets, sums)
    with pytest.raises(RuntimeError, match="a scoring pass has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not any(bool(total.any()) for total in sums)


def test_each_fault_of_a_sum_has_a_message_of_its_own():
    x, w, a, b = (torch.randn(*shape) for shape in ((4, 5), (3, 5), (2, 5), (3, 2)))
    sums = lk.ScoreSums(torch.zeros(5, 2).t(), torch.zeros(2, 5), torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"sums.a_gphi must be contiguous, got strides \(1, 2\)"):
        lk.lora_linear_scored(x, w, a, b, 1.0, torch.tensor([0, 4]), sums)
    sums = lk.ScoreSums(*(torch.zeros(like.shape, device="meta") for like in (a, a, b, b)))
    with pytest.raises(ValueError, match=r"sums.a_gphi must be on x's device cpu, got meta"):
        lk.lora_linear_scored(x, w, a, b, 1.0, torch.tensor([0, 4]), sums)
