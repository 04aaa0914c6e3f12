"""Each op of csrc under every backend against the reference: the CPU library, the CUDA library on the CPU, a device."""

import pytest
import torch

from lorapar_kernels import (
    PreparedAdamW,
    index_mask,
    masked_adamw,
    pack_mask,
    top_count,
    top_mass,
    unpack_mask,
)
from lorapar_kernels.bitmask import TILE, index_mask_reference, pack_mask_reference
from lorapar_kernels.masked_adamw import decode_moments
from lorapar_kernels.top_mass import top_mass_reference

THETAS = [0.1, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 511, 512, 513, 9 * 512 + 100])
def test_masks(every_backend, n):
    generator = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=generator) < 0.4
    words = pack_mask(mask.to(every_backend))
    assert torch.equal(words.cpu(), pack_mask_reference(mask))
    assert torch.equal(unpack_mask(words, mask.shape).cpu(), mask)
    index = index_mask(mask.to(every_backend))
    assert torch.equal(index.before.cpu(), index_mask_reference(pack_mask_reference(mask), n))
    assert (index.active, index.shape) == (int(mask.sum()), mask.shape)


def scores_of(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((8, 700), (3,), (0,), (400, 8), (40_000,))
    if kind == "tied":
        return [torch.randint(0, 4, shape, generator=generator).float() for shape in shapes]
    normal = [torch.randn(shape, generator=generator) for shape in shapes]
    # Over many orders of magnitude, denormals and -0.0 among them.
    return [torch.where(values.abs() < 0.01, -0.0, values.abs().pow(8 if kind == "wide" else 1)) for values in normal]


@pytest.mark.parametrize("kind", ["plain", "wide", "tied"])
def test_top_mass_of_several_shares(every_backend, kind):
    scores = scores_of(kind)
    kept = top_mass([score.to(every_backend) for score in scores], THETAS)
    for theta, masks in zip(THETAS, kept, strict=True):
        for mask, expected in zip(masks, top_mass_reference(scores, theta), strict=True):
            assert torch.equal(mask.cpu(), expected)
    one = top_mass(scores[0].to(every_backend), [0.9])
    assert torch.equal(one[0].cpu(), top_mass_reference([scores[0]], 0.9)[0])


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_top_count_among(every_backend, kind):
    scores = scores_of(kind)
    generator = torch.Generator().manual_seed(8)
    among = [torch.rand(score.shape, generator=generator) < 0.3 for score in scores]
    flat, inside = torch.cat([score.flatten() for score in scores]), torch.cat([mask.flatten() for mask in among])
    order = flat.abs().masked_fill(~inside, -1.0).sort(descending=True, stable=True).indices
    on_device = [[tensor.to(every_backend) for tensor in tensors] for tensors in (scores, among)]
    for count in (0, 1, 777, int(inside.sum())):
        expected = torch.zeros_like(inside).index_fill_(0, order[:count], True)
        kept = top_count(on_device[0], count, on_device[1])
        assert torch.equal(torch.cat([mask.flatten() for mask in kept]).cpu(), expected)
    with pytest.raises(ValueError, match=r"count must be in 0\.\."):
        top_count(on_device[0], int(inside.sum()) + 1, on_device[1])


def test_bad_scores_are_named(every_backend):
    scores = [torch.ones(3, device=every_backend), torch.tensor([1.0, -2.0], device=every_backend)]
    with pytest.raises(ValueError, match=r"finite and not negative, got -2.0 at element 1 of scores\[1\]"):
        top_mass(scores, 0.5)
    with pytest.raises(ValueError, match=r"got -2.0 at element 1 of scores\[1\]"):
        top_count(scores, 1)
    with pytest.raises(ValueError, match="one above zero, got 3 zeros"):
        top_mass([torch.zeros(3, device=every_backend)], 0.5)


SHAPES = ((8, 300), (70, 8), (5,), (0, 4), (1030,))
FORMS = {
    "plain": {},
    "maximize": {"maximize": True},
    "stochastic": {"stochastic": True},
    "compensated": {},
    "codes": {},
    "codes, stochastic": {"stochastic": True},
}


def run_steps(
    device: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    form: str,
    steps: int,
    number=int,
    rate: float | None = None,
):
    """Parameters and states after some steps, on the CPU; `number` makes what a step's number is given as."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in SHAPES]
    masks = [(torch.rand(shape, generator=generator) < 0.4).to(device) for shape in SHAPES]
    counts = [int(mask.sum()) for mask in masks]
    dtypes = (torch.int8, torch.uint8) if "codes" in form else (torch.float32, torch.float32)
    moments = [[torch.zeros(count, dtype=one, device=device) for count in counts] for one in dtypes]
    optional: dict = {}
    if "codes" in form:
        optional["scales"] = [torch.zeros(2, -(-param.numel() // TILE), device=device) for param in params]
    if form == "compensated":
        optional["compensations"] = [torch.zeros(count, dtype=dtype, device=device) for count in counts]
    scale = torch.tensor(0.37, device=device)
    for step in range(1, steps + 1):
        grads = [torch.randn(shape, generator=generator).to(grad_dtype).to(device) for shape in SHAPES]
        lr = torch.tensor(rate, device=device) if rate is not None else 1e-2
        done = masked_adamw(params, grads, masks, *moments, number(step), lr=lr, betas=(0.9, 0.99), weight_decay=0.1,
                            seed=11, grad_scale=scale, skip_nonfinite=True, **FORMS[form], **optional)  # fmt: skip
        assert bool(done)
    return [tensor.cpu() for column in (params, *moments, *optional.values()) for tensor in column]


def forms_of(dtype: torch.dtype) -> list[str]:
    forms = ["plain", "maximize", "codes"]
    forms += ["compensated"] if dtype != torch.float32 else []
    return forms + (["stochastic", "codes, stochastic"] if dtype == torch.bfloat16 else [])


CASES = [(dtype, form) for dtype in (torch.float32, torch.bfloat16, torch.float16) for form in forms_of(dtype)]


@pytest.mark.parametrize(("dtype", "form"), CASES)
def test_masked_adamw_is_the_reference_to_the_bit(every_backend, monkeypatch, dtype, form):
    for grad_dtype in {dtype, torch.float32}:
        got = run_steps(every_backend, dtype, grad_dtype, form, 3)
        with monkeypatch.context() as reference:
            reference.setenv("LORAPAR_BACKEND", "reference")
            expected = run_steps("cpu", dtype, grad_dtype, form, 3)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "plain"), (torch.bfloat16, "codes, stochastic")])
@pytest.mark.parametrize("step_dtype", [torch.int64, torch.float32])
def test_a_step_and_a_rate_in_memory_give_the_same_bits(every_backend, dtype, form, step_dtype):
    expected = run_steps(every_backend, dtype, dtype, form, 3)

    def in_memory(step: int) -> torch.Tensor:
        return torch.tensor([step], dtype=step_dtype, device=every_backend)

    for one, other in zip(run_steps(every_backend, dtype, dtype, form, 3, in_memory), expected, strict=True):
        assert torch.equal(one, other)
    # 2⁻⁷ is one number in fp32 and in double.
    rates = [run_steps(every_backend, dtype, dtype, form, 3, in_memory, rate) for rate in (2.0**-7, 2.0**-9)]
    assert not torch.equal(rates[0][0], rates[1][0])
    assert not torch.equal(rates[0][0], expected[0])


def constants(device: str, step, beta1: float, beta2: float) -> tuple[float, float]:
    """The step's rate and root factor at a rate of 1, from elements whose moments do not change."""
    found = []
    for betas in ((beta1, 0.0), (0.0, beta2)):
        param, ones = torch.zeros(1, device=device), torch.ones(1, device=device)
        mask, moments = torch.ones(1, dtype=torch.bool, device=device), [torch.ones(1, device=device) for _ in range(2)]
        masked_adamw([param], [ones], [mask], [moments[0]], [moments[1]], step, lr=1.0, betas=betas, eps=0.0,
                     weight_decay=0.0)  # fmt: skip
        assert float(moments[0]) == 1.0
        found.append(-float(param) * float(moments[1]) ** 0.5)
    return found[0], 1.0 / found[1]


@pytest.mark.parametrize("step_dtype", [torch.int64, torch.float32])
def test_bias_corrections_from_memory_against_float64(every_backend, step_dtype):
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.95), (0.99999, 0.999999)):
        for step in (1, 2, 3, 7, 100, 1023, 12_345, 1_000_000, 1 << 24):
            number = torch.tensor(step, dtype=step_dtype, device=every_backend)
            rate, root = constants(every_backend, number, beta1, beta2)
            expected = 1.0 / (1.0 - beta1**step), 1.0 / (1.0 - beta2**step) ** 0.5
            # The rate is rounded once; the root factor is seen through four more roundings.
            assert abs(rate / expected[0] - 1.0) <= 2.0**-24
            assert abs(root / expected[1] - 1.0) <= 5 * 2.0**-24


def test_a_step_in_memory_that_is_skipped_says_so_in_memory(every_backend):
    param, state = torch.ones(40, device=every_backend), [torch.zeros(40, device=every_backend) for _ in range(2)]
    mask = torch.ones(40, dtype=torch.bool, device=every_backend)
    prepared = PreparedAdamW([param], [mask], [state[0]], [state[1]])
    taken = torch.zeros((), dtype=torch.int64, device=every_backend)
    for value in (1.0, float("inf"), 2.0, float("nan")):
        grads = [torch.full((40,), value, device=every_backend)]
        done = prepared.step(grads, taken + 1, lr=0.1, skip_nonfinite=True)
        assert isinstance(done, torch.Tensor)
        taken += done
    assert int(taken) == 2
    assert bool(param.isfinite().all())


def test_a_gradient_that_is_not_finite_skips_the_step_where_asked(every_backend):
    for value in (float("inf"), float("nan")):
        for inside in (True, False):
            param, grad = torch.ones(2, 600, device=every_backend), torch.ones(2, 600, device=every_backend)
            mask = torch.arange(1200, device=every_backend).view(2, 600) % 3 == 0
            grad[1, 300 if inside else 301] = value  # element 900 or 901
            state = [torch.zeros(400, device=every_backend) for _ in range(2)]
            step = masked_adamw([param], [grad], [mask], [state[0]], [state[1]], 1, lr=0.1, skip_nonfinite=True)
            assert step is not inside
            assert bool((param[~mask] == 1.0).all())
            assert bool((state[0] == 0.0).all()) is inside
            assert bool((param == 1.0).all()) is inside


def test_a_scale_that_makes_the_gradient_infinite_skips_too(every_backend):
    param, state = torch.ones(40, device=every_backend), [torch.zeros(40, device=every_backend) for _ in range(2)]
    mask, scale = torch.ones(40, dtype=torch.bool, device=every_backend), torch.tensor(1e30, device=every_backend)
    grads = [torch.full((40,), 1e30, device=every_backend)]
    assert not masked_adamw([param], grads, [mask], [state[0]], [state[1]], 1, lr=0.1, grad_scale=scale,
                            skip_nonfinite=True)  # fmt: skip
    assert bool((param == 1.0).all())


def test_stochastic_rounding_is_unbiased(every_backend):
    # A step of 1e-3 is a quarter of bf16's spacing above 1, which rounding to nearest would lose every time.
    n = 100_000 if every_backend == "cuda" else 20_000
    param = torch.ones(n, dtype=torch.bfloat16, device=every_backend)
    mask, moments = torch.ones(n, dtype=torch.bool), [torch.zeros(n, device=every_backend) for _ in range(2)]
    grads = [torch.full((n,), -1.0, device=every_backend)]
    masked_adamw([param], grads, [mask.to(every_backend)], [moments[0]], [moments[1]], 1, lr=1e-3, weight_decay=0.0,
                 stochastic=True, seed=5)  # fmt: skip
    # 4 standard deviations of the mean of n draws of spacing 2⁻⁷ and chance 0.128.
    assert abs(float(param.float().mean()) - 1.001) < 4 * 2**-7 * (0.128 * 0.872 / n) ** 0.5
    assert set(param.float().unique().tolist()) == {1.0, 1.0078125}


def test_compensation_keeps_what_rounding_leaves_out(every_backend):
    param, wide = torch.ones(600, dtype=torch.bfloat16, device=every_backend), torch.ones(600, device=every_backend)
    mask = torch.ones(600, dtype=torch.bool, device=every_backend)
    states = [[torch.zeros(600, device=every_backend) for _ in range(2)] for _ in range(2)]
    compensation = torch.zeros(600, dtype=torch.bfloat16, device=every_backend)
    grads = [torch.full((600,), -1.0, device=every_backend)]
    settings = {"lr": 1e-4, "weight_decay": 0.0}
    for step in range(1, 101):
        masked_adamw([param], grads, [mask], *[[t] for t in states[0]], step, compensations=[compensation], **settings)
        masked_adamw([wide], grads, [mask], *[[t] for t in states[1]], step, **settings)
    # 100 steps of 1e-4, of which bf16 alone shows none; each is off by half a spacing of the compensation at most.
    torch.testing.assert_close(param.float() + compensation.float(), wide, rtol=0, atol=100 * 2**-18)
    assert float(wide[0]) > 1.009


def test_codes_are_close_and_never_zero_beneath_a_step(every_backend):
    generator = torch.Generator().manual_seed(4)
    n = 2048
    param, mask = torch.zeros(n, device=every_backend), torch.ones(n, dtype=torch.bool, device=every_backend)
    exact = param.clone()
    codes = [torch.zeros(n, dtype=dtype, device=every_backend) for dtype in (torch.int8, torch.uint8)]
    states = [torch.zeros(n, device=every_backend) for _ in range(2)]
    scales = [torch.zeros(2, n // TILE, device=every_backend)]
    sizes = torch.logspace(-6, 0, n).to(every_backend)
    for step in range(1, 41):
        grads = [torch.randn(n, generator=generator).to(every_backend) * sizes]
        old = param.clone()
        masked_adamw([param], grads, [mask], [codes[0]], [codes[1]], step, lr=1e-3, weight_decay=0.0, scales=scales)
        masked_adamw([exact], grads, [mask], [states[0]], [states[1]], step, lr=1e-3, weight_decay=0.0)
        # Adam's step is bounded by about lr; a second moment lost to rounding would be seen here at once.
        assert float((param - old).abs().max()) < 5e-3
    m, v = decode_moments(codes[0], codes[1], scales[0], torch.arange(n, device=every_backend) // TILE)
    assert bool((v > 0.0).all())
    # Of the last tile, where the spread is a factor of 30 and all is resolved.
    torch.testing.assert_close(v[-TILE:].sqrt(), states[1][-TILE:].sqrt(), rtol=0.2, atol=0)
    assert float((m - states[0])[-TILE:].norm() / states[0][-TILE:].norm()) < 0.1
    moved, expected = param[-TILE:], exact[-TILE:]
    assert float((moved - expected).norm() / expected.norm()) < 0.1


OPCHECKS = {
    "pack_mask": lambda: (torch.ops.lorapar.pack_mask, (torch.ones(40, dtype=torch.bool),)),
    "unpack_mask": lambda: (torch.ops.lorapar.unpack_mask, (torch.tensor([3, 1], dtype=torch.int32), [5, 8])),
    "index_mask": lambda: (torch.ops.lorapar.index_mask, (torch.tensor([3, 1], dtype=torch.int32), 40)),
    "top_mass": lambda: (torch.ops.lorapar.top_mass, ([torch.rand(5, 3), torch.rand(7)], [0.5, 0.9])),
    "top_count": lambda: (torch.ops.lorapar.top_count, ([torch.rand(5, 3), torch.rand(7)], 4, [])),
    "tile_sums": lambda: (torch.ops.lorapar.tile_sums, (torch.rand(5, 3), 2, 2)),
    "masked_adamw": lambda: (
        torch.ops.lorapar.masked_adamw,
        ([torch.ones(3)], [torch.ones(3)], [torch.tensor([5], dtype=torch.int32)], [torch.tensor([0, 2])],
         [torch.zeros(2)], [torch.zeros(2)], [], [], None, None, None, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, False, False, 0,
         False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", OPCHECKS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_opcheck(op, backend, native_file, monkeypatch):
    from lorapar_kernels import native

    native.load.cache_clear()
    monkeypatch.setattr(native, "path", lambda kind: native_file)
    monkeypatch.setenv("LORAPAR_BACKEND", backend)
    function, arguments = OPCHECKS[op]()
    assert set(torch.library.opcheck(function.default, arguments).values()) == {"SUCCESS"}
    native.load.cache_clear()
