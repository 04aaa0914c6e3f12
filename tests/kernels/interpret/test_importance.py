"""The scoring kernels against one example at a time in float64, interpreted on the CPU.

A pytest process of its own (`TRITON_INTERPRET=1 pytest tests/kernels/interpret`): the variable is read when @triton.jit
runs.
"""

import itertools
import os

import pytest
import torch

import lorapar_kernels as lk

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# One token; one example; ends inside a tile of 32 tokens and on its edge; more examples than ranges of them.
LENGTHS = [[1], [33], [1, 32, 31, 64], [5, 1, 1, 70, 2], [3] * 19]


@pytest.fixture(autouse=True)
def triton_and_unwritten_outputs(monkeypatch):
    """Forced to the kernels, and what they do not write of their output shows as NaN."""
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))


def case(lengths, n_in, n_out, r, dtype, factor_dtype):
    tokens, offsets = sum(lengths), [0, *itertools.accumulate(lengths)]
    shapes = (tokens, n_in), (tokens, n_out), (n_out, n_in)
    x, dy, w = (torch.randn(*shape).to(dtype) for shape in shapes)
    a, b = (torch.randn(*shape).to(factor_dtype) for shape in ((r, n_in), (n_out, r)))
    return x, dy, w, a, b, torch.tensor(offsets)


def expected_sums(x, dy, w, a, b, scaling, offsets):
    """One example at a time, autograd in float64, of factors rounded to x's dtype as the layer rounds them.

    Unrounded ones are no measure of a kernel: where few tokens cancel in S, one in a hundred draws is then off by more
    than 1e-2. φ itself is not rounded.
    """
    phis, dtype = (a.double(), b.double()), x.dtype
    x, dy, w = x.double(), dy.double(), w.double()
    a, b = a.to(dtype).double().requires_grad_(), b.to(dtype).double().requires_grad_()
    sums = lk.ScoreSums.zeros_like(a, b)
    for start, end in itertools.pairwise(offsets.tolist()):
        y = x[start:end] @ w.t() + scaling * x[start:end] @ a.t() @ b.t()
        for i, (g, phi) in enumerate(zip(torch.autograd.grad(y, (a, b), dy[start:end]), phis)):
            sums[2 * i].add_((g * phi).detach())
            sums[2 * i + 1].add_((g * phi).detach() ** 2)
    return sums


def scored(x, dy, w, a, b, scaling, offsets, sums=None):
    sums = lk.ScoreSums.zeros_like(a, b) if sums is None else sums
    x = x.clone().requires_grad_()
    lk.lora_linear_scored(x, w, a, b, scaling, offsets, sums).backward(dy)
    return sums, x.grad


def differences(sums, expected):
    return {
        name: float((got.double() - want).norm() / want.norm())
        for name, got, want in zip(lk.ScoreSums._fields, sums, expected)
    }


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "bound"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float16, torch.float32, 1e-2),
    ],
)
def test_each_sum_equals_one_example_at_a_time(lengths, dtype, factor_dtype, bound):
    # Rows, columns and ranks that end inside their tiles.
    for n_in, n_out, r in ((70, 37, 3), (64, 129, 16), (19, 65, 33)):
        made = case(lengths, n_in, n_out, r, dtype, factor_dtype)
        sums, dx = scored(*made[:5], 1.5, made[5])
        for name, difference in differences(sums, expected_sums(*made[:5], 1.5, made[5])).items():
            # A square has twice the relative error of what is squared.
            assert difference < (2 * bound if name.endswith("sq") and dtype != torch.float32 else bound), (
                name,
                (n_in, n_out, r),
                difference,
            )
        assert dx.isfinite().all()
        assert all(rest.isfinite().all() for rest in sums.rests)


def test_the_opaque_base_gets_the_same_sums():
    x, dy, w, a, b, offsets = case([4, 40], 20, 24, 4, torch.float32, torch.float32)
    sums = lk.ScoreSums.zeros_like(a, b)
    y = (x @ w.t()).requires_grad_()
    lk.lora_add_scored(y, x, a, b, 1.5, offsets, sums).backward(dy)
    assert all(torch.equal(one, two) for one, two in zip(sums, scored(x, dy, w, a, b, 1.5, offsets)[0]))
    assert torch.equal(y.grad, dy)


def test_equal_calls_give_equal_bits_and_strided_inputs_the_same():
    x, dy, w, a, b, offsets = case([9, 1, 50], 40, 48, 8, torch.float32, torch.float32)
    one, two = (scored(x, dy, w, a, b, 1.0, offsets)[0] for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one, two))
    wider, a_t, b_t = torch.randn(60, 80), a.t().contiguous().t(), b.t().contiguous().t()
    wider[:, ::2] = x
    three, _ = scored(wider[:, ::2], dy, w, a_t, b_t, 1.0, offsets)
    assert max(differences(three, [total.double() for total in one]).values()) < 1e-6


def test_the_order_of_examples_and_the_cut_into_batches_do_not_matter():
    x, dy, w, a, b, offsets = case([9, 1, 50, 33], 40, 48, 8, torch.float32, torch.float32)
    whole, _ = scored(x, dy, w, a, b, 1.0, offsets)
    spans = list(itertools.pairwise(offsets.tolist()))
    one_by_one = lk.ScoreSums.zeros_like(a, b)
    for start, end in reversed(spans):
        scored(x[start:end], dy[start:end], w, a, b, 1.0, torch.tensor([0, end - start]), one_by_one)
    assert max(differences(one_by_one, [total.double() for total in whole]).values()) < 1e-6


def test_many_batches_lose_nothing():
    """4,000 additions of the same example: plain fp32 sums drift to 1e-5, the pairs stay at the last bit."""
    from lorapar_kernels.triton_kernels.importance import _add_partial_sums_kernel

    value, n = torch.rand(1, 2, 5), 4000
    totals = [torch.zeros(5) for _ in range(4)]
    plain = torch.zeros(5)
    launch = _add_partial_sums_kernel[(1,)]
    ranges = value.expand(500, 2, 5).contiguous()
    for _ in range(n // 500):
        launch(ranges, *totals, 500, 5, BLOCK=16)
    for _ in range(n):
        plain += value[0, 0]
    exact = value[0].double() * n
    assert ((plain.double() - exact[0]).abs() / exact[0]).max() > 1e-6
    for i in (0, 1):
        pair = totals[2 * i].double() + totals[2 * i + 1].double()
        assert ((pair - exact[i]).abs() / exact[i]).max() < 1e-12
        torch.testing.assert_close(totals[2 * i].double(), exact[i], rtol=1e-7, atol=0)


@pytest.mark.parametrize(("n_examples", "rank", "width"), [(8, 8, 4096), (8, 8, 1024), (1, 8, 4096), (2, 64, 2048),
                                                           (512, 8, 256), (3000, 8, 64), (1, 8, 11008)])  # fmt: skip
def test_programs_fill_a_gpu_whatever_the_shape(n_examples, rank, width):
    from lorapar_kernels.triton_kernels.importance import BLOCK_N, NARROW_N, PROGRAMS_PER_SM, grid

    processors = 132  # of an H100
    block_n, across, down, ranges = grid(n_examples, rank, width, processors)
    programs = across * down * ranges
    assert across * block_n >= width
    assert programs >= processors
    assert ranges <= n_examples
    # And no more partial sums than that takes, so that many examples are not written one by one.
    assert ranges == 1 or (ranges - 1) * across * down < PROGRAMS_PER_SM * processors
    assert block_n == (NARROW_N if n_examples * down * -(-width // BLOCK_N) < processors else BLOCK_N)


def test_what_ran_was_the_kernel(monkeypatch):
    from lorapar_kernels.triton_kernels import importance as importance_triton

    assert importance_triton.INTERPRETED
    called = []
    kernel = importance_triton.add_example_products
    monkeypatch.setattr(importance_triton, "add_example_products", lambda *a: (called.append(1), kernel(*a))[1])
    made = case([3], 8, 8, 2, torch.float32, torch.float32)
    scored(*made[:5], 1.0, made[5])
    assert called == [1, 1]
    monkeypatch.setenv("LORAPAR_BACKEND", "")
    scored(*made[:5], 1.0, made[5])
    assert called == [1, 1]


def test_float64_is_refused_where_the_kernel_is_forced():
    made = case([3], 8, 8, 2, torch.float64, torch.float64)
    with pytest.raises(ValueError, match="cannot serve lora_linear_scored: the kernels add in fp32"):
        scored(*made[:5], 1.0, made[5])
