"""top_mass and top_count against a stable sort: random, tied, hostile, several tensors, and the speed."""

import math
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorapar_kernels import top_count, top_mass
from lorapar_kernels.top_mass import top_mass_reference


@pytest.fixture(autouse=True, params=["reference", ""])
def backend(request, monkeypatch):
    """Each test under the reference, and under whatever is installed."""
    monkeypatch.setenv("LORAPAR_BACKEND", request.param)


THETAS = (1e-9, 0.1, 0.3, 0.5, 0.9, 0.999999, 1.0)


def naive(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """A stable descending sort and a float64 running sum: paper.md section 1.3 as one would write it."""
    values, order = scores.reshape(-1).sort(descending=True, stable=True)
    sums = values.double().cumsum(0)
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[order[: int((sums < theta * sums[-1]).sum()) + 1]] = True
    return kept.view(scores.shape)


def by_fsum(scores: list[float], theta: float) -> list[bool]:
    """The definition in plain Python, with correctly rounded sums."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    total = math.fsum(scores)
    kept = [False] * len(scores)
    for length, i in enumerate(order, 1):
        kept[i] = True
        reached = math.fsum(scores[j] for j in order[:length]) >= theta * total
        if scores[order[length % len(order)]] == 0.0 or (reached and theta < 1.0):
            break
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9, 0.99])
def test_equals_naive_sort(dtype, theta):
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 31, 1000, 200_003):
        scores = torch.randn(n, generator=generator, dtype=dtype).square() * 1e-6
        assert torch.equal(top_mass(scores, theta), naive(scores, theta))


@given(
    scores=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 0.1, 0.25, 0.5, 1.0, 3.0, 1e38]), min_size=1, max_size=12
    ),
    theta=st.sampled_from(THETAS),
    double=st.booleans(),
)
@settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equals_definition_on_hostile_values(scores, theta, double):
    tensor = torch.tensor(scores, dtype=torch.float64 if double else torch.float32)
    if not tensor.any():
        return
    assert top_mass(tensor, theta).tolist() == by_fsum(tensor.double().tolist(), theta)


@given(data=st.data(), theta=st.floats(1e-6, 1.0))
@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equals_reference_over_lists(data, theta):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    numbers = st.floats(0, 2.0**100, width=width)
    lists = data.draw(st.lists(st.lists(numbers, max_size=8), min_size=1, max_size=4))
    scores = [torch.tensor(values, dtype=dtype) for values in lists]
    if not any(bool(score.any()) for score in scores):
        return
    for kept, expected in zip(top_mass(scores, theta), top_mass_reference(scores, theta), strict=True):
        assert torch.equal(kept, expected)


def test_round_numbers_come_out_as_on_paper():
    for dtype in (torch.float32, torch.float64):
        assert top_mass(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=dtype), 0.9).tolist() == [
            False,
            True,
            True,
            True,
        ]
        assert int(top_mass(torch.ones(10, dtype=dtype), 0.9).sum()) == 9
        assert int(top_mass(torch.full((10,), 0.1, dtype=dtype), 0.3).sum()) == 3


def test_theta_one_keeps_all_above_zero_and_zeros_never():
    scores = torch.tensor([1.0, 0.0, 1e-45, -0.0, 1e-30])
    assert top_mass(scores, 1.0).tolist() == [True, False, True, False, True]


def test_ties_go_to_the_lower_index_then_the_earlier_tensor():
    assert top_mass(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    first, second = top_mass([torch.ones(2), torch.ones(2, 2)], 0.5)
    assert first.tolist() == [True, True]
    assert second.tolist() == [[True, False], [False, False]]


def test_tensors_count_together_and_keep_their_shapes():
    generator = torch.Generator().manual_seed(2)
    scores = [torch.rand(shape, generator=generator) for shape in ((8, 33), (0,), (), (5, 2, 7))]
    kept = top_mass(scores, 0.7)
    flat = naive(torch.cat([score.reshape(-1) for score in scores]), 0.7)
    assert [tuple(mask.shape) for mask in kept] == [tuple(score.shape) for score in scores]
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in kept]), flat)
    # Not each tensor for itself: an unimportant one can be left out whole.
    assert not top_mass([torch.ones(4), torch.full((4,), 1e-6)], 0.9)[1].any()


def test_strides_and_gradients_do_not_matter():
    scores = torch.rand(17, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(top_mass(scores.t(), 0.6), top_mass(scores.t().contiguous(), 0.6))
    assert torch.equal(top_mass(scores.clone().requires_grad_(), 0.6), top_mass(scores, 0.6))


def test_many_equal_scores_are_summed_exactly():
    # 0.1 as float32 a million times: a float32 running sum is off by 1 %.
    scores = torch.full((1_000_000,), 0.1)
    assert int(top_mass(scores, 0.25).sum()) == 250_000


@pytest.mark.parametrize(
    ("scores", "theta", "message"),
    [
        (torch.ones(3), 0.0, r"theta must be in \(0, 1\], got 0.0"),
        (torch.ones(3), 1.5, "got 1.5"),
        (torch.ones(3), math.nan, "got nan"),
        (torch.tensor([1.0, -2.0]), 0.5, r"finite and not negative, got -2.0 at element 1 of scores\[0\]"),
        ([torch.ones(2), torch.tensor([[1.0, math.nan]])], 0.5, r"got nan at element 1 of scores\[1\]"),
        (torch.tensor([math.inf, math.inf]), 0.5, r"got inf at element 0 of scores\[0\] \(and 1 more\)"),
        (torch.zeros(2, 2), 0.5, "one above zero, got 4 zeros"),
        (torch.ones(3, dtype=torch.int64), 0.5, r"torch.float32 or torch.float64, got torch.int64"),
        (torch.ones(3, dtype=torch.bfloat16), 0.5, "got torch.bfloat16"),
        ([torch.ones(1), torch.ones(1, dtype=torch.float64)], 0.5, r"got torch.float64 in scores\[1\]"),
        ([], 0.5, "an empty list"),
        (torch.ones(0), 0.5, "got 0"),
        (torch.full((2,), 1.7e308, dtype=torch.float64), 0.5, "sum to a finite float64"),
    ],
)
def test_refusals(scores, theta, message):
    with pytest.raises(ValueError, match=message):
        top_mass(scores, theta)


def naive_count(scores: torch.Tensor, count: int, among: torch.Tensor) -> torch.Tensor:
    order = scores.reshape(-1).masked_fill(~among.reshape(-1), -1.0).sort(descending=True, stable=True).indices
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[order[:count]] = True
    return kept.view(scores.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_count_equals_naive_sort(dtype):
    generator = torch.Generator().manual_seed(4)
    for levels in (3, 1000):
        scores = torch.randint(0, levels, (40, 31), generator=generator).to(dtype) / 7
        among = torch.rand(40, 31, generator=generator) < 0.5
        for count in (0, 1, 17, 300, int(among.sum())):
            assert torch.equal(top_count(scores, count, among), naive_count(scores, count, among))
            whole = torch.ones_like(among)
            assert torch.equal(top_count(scores, count), naive_count(scores, count, whole))


def test_top_count_over_a_list():
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([[5.0, 2.0]])]
    among = [torch.tensor([True, False]), torch.tensor([[True, True]])]
    assert [mask.tolist() for mask in top_count(scores, 2, among)] == [[False, False], [[True, True]]]
    assert [mask.tolist() for mask in top_count(scores, 1)] == [[False, True], [[False, False]]]


def test_top_count_refusals():
    with pytest.raises(ValueError, match=r"count must be in 0\.\.1, the number of candidates, got 2"):
        top_count(torch.ones(2), 2, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"among\[0\] must be torch.bool \[2\], got torch.bool \[3\]"):
        top_count(torch.ones(2), 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="among must hold 1 masks"):
        top_count([torch.ones(2)], 1, [])
    with pytest.raises(ValueError, match="among must be a tensor where"):
        top_count(torch.ones(2), 1, [torch.ones(2, dtype=torch.bool)])


@pytest.mark.slow
def test_faster_than_a_sort():
    # SmolLM2-135M's 2.17 M elements. The best of several: other processes may share the cores.
    scores = torch.randn(2_170_000, generator=torch.Generator().manual_seed(5)).square()

    def best(function) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    selection, sort = best(lambda: top_mass(scores, 0.9)), best(lambda: naive(scores, 0.9))
    print(f"top_mass {selection * 1e3:.1f} ms, sort {sort * 1e3:.1f} ms")
    assert selection < sort
