"""The backward's kernels, interpreted on the CPU, against float64 on fresh random inputs.

Every output of `torch.empty` is filled with NaN first, so that what a kernel leaves unwritten shows.
"""

import itertools
import os

import pytest
import torch

import lorapar_kernels as lk
from lorapar_kernels.tiles import STRIPE, TiledMask

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interpreter tests run under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lorapar_kernels.triton_kernels import lora_backward
from lorapar_kernels.triton_kernels.launch import BF16, FP16, FP32
from lorapar_kernels.triton_kernels.lora_backward import input_gradients, output_gradients, reduce
from lorapar_kernels.triton_kernels.lora_forward import padded_rank

BOUNDS = {FP32: 2e-6, BF16: 2e-2, FP16: 3e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(made):
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def close(ours, exact):
    exact = exact.double()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)) < BOUNDS[ours.dtype]


def same(ours, others):
    return all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


def padded(matrix, R):
    return torch.nn.functional.pad(matrix, (0, R - matrix.shape[1])).contiguous()


def packed(keep):
    """The mask [T, K] as `keep_and_store_tile` writes it."""
    lanes = keep.view(*keep.shape[:-1], -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return lanes.sum(-1).to(torch.uint8)


def masks_of(kind, shapes, of):
    """No masks; masks with an active element in each stripe; or without one in the first stripe and some others."""
    if kind == "none":
        return [None] * len(shapes)
    masks = []
    for i, shape in enumerate(shapes):
        mask = torch.rand(shape) < 0.4
        columns_of_a = of == TiledMask.of_a
        if kind == "full":
            mask[0, :] = mask[:, 0] = True
        else:
            active = torch.arange(shape[columns_of_a]) // STRIPE % (2 + i) == 1
            mask &= active if columns_of_a else active[:, None]
        masks.append(of(mask))
    assert all((mask.stripes is None) == (kind == "full") for mask in masks)
    return masks


def masked(exact, mask):
    return exact if mask is None else exact * mask.mask


# dtype, the factors', tokens, columns of each dY, ranks
OUTPUTS = [
    (BF16, BF16, 1, (5,), (3,)),
    (BF16, FP32, 70, (336, 16, 64), (5, 16, 1)),
    (FP16, FP32, 67, (130, 20), (17, 8)),
    (FP16, FP16, 40, (24,), (130,)),
    (FP32, FP32, 35, (72, 20), (3, 17)),
    (FP32, FP32, 18, (24,), (130,)),
]


@pytest.mark.parametrize("kind", ["none", "full", "empty stripes"])
@pytest.mark.parametrize("case", range(len(OUTPUTS)))
def test_gradients_of_the_output(case, kind):
    dtype, factor, T, widths, ranks = OUTPUTS[case]
    dys = [torch.randn(T, n).to(dtype) for n in widths]
    bs = [torch.randn(n, r).to(dtype).to(factor) for n, r in zip(widths, ranks)]
    R = padded_rank([b.t() for b in bs])
    ss = [torch.randn(T, r).to(dtype) for r in ranks]
    scalings, p = [0.5 + i for i in range(len(ranks))], 0.2
    masks = masks_of(kind, [b.shape for b in bs], TiledMask.of_b)
    for needs in {(True,) * len(ranks), (False, True, False)[: len(ranks)]}:
        dss, dbs = output_gradients(dys, bs, [padded(s, R) for s in ss], scalings, p, masks, needs)
        for dy, b, s, scaling, mask, need, ds, db in zip(dys, bs, ss, scalings, masks, needs, dss, dbs):
            exact = dy.double() @ b.double() * scaling / (1.0 - p)
            assert ds.dtype == dtype
            assert close(ds, padded(exact, R))
            assert not ds[:, b.shape[1] :].any()
            assert (db is not None) == need
            if db is not None:
                assert db.dtype == b.dtype
                assert close(db, masked(scaling * dy.double().t() @ s.double(), mask))
                assert mask is None or not db[~mask.mask].any()


# dtype, the factors', tokens, columns of x, ranks, p, whether the dropout mask comes as bits
INPUTS = [
    (BF16, BF16, 1, 8, (3,), 0.0, False),
    (BF16, FP32, 70, 208, (5, 16, 1), 0.1, True),
    (FP16, FP32, 67, 144, (8, 2, 4), 0.3, False),
    (BF16, BF16, 21, 61, (17, 20), 0.2, False),
    (BF16, FP32, 40, 144, (33, 64), 0.0, False),
    (FP16, FP16, 33, 136, (130,), 0.1, True),
    (FP32, FP32, 20, 72, (3, 17), 0.1, False),
    (FP32, FP32, 18, 40, (130,), 0.1, True),
]


@pytest.mark.parametrize("kind", ["none", "full", "empty stripes"])
@pytest.mark.parametrize("case", range(len(INPUTS)))
def test_gradients_of_the_input(case, kind):
    dtype, factor, T, K, ranks, p, as_bits = INPUTS[case]
    x = torch.randn(T, K).to(dtype)
    factors = [torch.randn(r, K).to(dtype).to(factor) for r in ranks]
    R = padded_rank(factors)
    dss = [torch.randn(T, r).to(dtype) for r in ranks]
    seeds = [torch.randint(2**62, (1,)) if p else None for _ in ranks]
    keeps = [
        torch.ones(x.shape, dtype=torch.bool) if seed is None else lk.dropout_mask(seed, x.shape, p) for seed in seeds
    ]
    bits = [packed(keep) for keep in keeps] if as_bits else []
    masks = masks_of(kind, [a.shape for a in factors], TiledMask.of_a)
    exact_dx = sum(keep * (ds.double() @ a.double()) for keep, ds, a in zip(keeps, dss, factors))
    for needs, needs_x in (((True,) * len(ranks), True), ((True, False, True)[: len(ranks)], False)):
        dx, das = input_gradients(x, factors, [padded(ds, R) for ds in dss], p, seeds, bits, masks, needs, needs_x)
        assert (dx is not None) == needs_x
        if dx is not None:
            assert dx.dtype == dtype
            assert close(dx, exact_dx)
        for a, ds, keep, mask, need, da in zip(factors, dss, keeps, masks, needs, das):
            assert (da is not None) == need
            if da is not None:
                assert da.dtype == a.dtype
                assert close(da, masked(ds.double().t() @ (keep * x.double()), mask))
                assert mask is None or not da[~mask.mask].any()


def test_bits_and_seeds_give_the_same_gradients():
    x, factors = torch.randn(70, 80).to(BF16), [torch.randn(4, 80), torch.randn(9, 80)]
    dss, seeds = [torch.randn(70, 16).to(BF16) for _ in factors], [torch.randint(2**62, (1,)) for _ in factors]
    bits = [packed(lk.dropout_mask(seed, x.shape, 0.3)) for seed in seeds]
    none, both = [None, None], [True, True]
    dx, das = input_gradients(x, factors, dss, 0.3, seeds, [], none, both, True)
    dx_of_bits, das_of_bits = input_gradients(x, factors, dss, 0.3, seeds, bits, none, both, True)
    assert same([dx, *das], [dx_of_bits, *das_of_bits])


def test_twice_the_same_bits():
    x, a, b, seed = torch.randn(99, 48), torch.randn(4, 48), torch.randn(48, 4), torch.tensor([3])

    def run():
        (ds,), (db,) = output_gradients([x], [b], [padded(x[:, :4], 16)], [2.0], 0.1, [None], [True])
        dx, (da,) = input_gradients(x, [a], [ds], 0.1, [seed], [], [None], [True], True)
        return ds, db, dx, da

    assert same(run(), run())


def test_what_has_no_active_element_is_neither_written_nor_read(monkeypatch):
    """Its parts are still NaN, and x may be NaN where nothing of A is active."""
    seen = []
    inner = lora_backward._add_up
    monkeypatch.setattr(
        lora_backward, "_add_up", lambda plans, parts, *rest: (seen.append(parts), inner(plans, parts, *rest))
    )
    mask = torch.zeros(16, 192, dtype=torch.bool)
    mask[:, 128:] = torch.rand(16, 64) < 0.5
    x, a, ds = torch.randn(64, 192), torch.randn(16, 192), torch.randn(64, 16)
    x[:, :128] = float("nan")
    dx, (da,) = input_gradients(x, [a], [ds], 0.0, [None], [], [TiledMask.of_a(mask)], [True], True)
    assert da is not None
    assert close(dx, ds.double() @ a.double())
    assert not da[~mask].any()
    assert close(da[:, 128:], (ds.double().t() @ x[:, 128:].double()) * mask[:, 128:])
    (part,) = seen.pop()
    assert part[..., :128].isnan().all()
    assert part[..., 128:].isfinite().all()

    dy, s = torch.randn(64, 192), torch.randn(64, 16)
    _, (db,) = output_gradients([dy], [a.t()], [s], [1.0], 0.0, [TiledMask.of_b(mask.t().contiguous())], [True])
    assert close(db, (dy.double().t() @ s.double()) * mask.t())
    _, part = seen.pop()
    assert part[:, :128].isnan().all()
    assert part[:, 128:].isfinite().all()


def test_reductions_of_any_kind_in_one_launch(monkeypatch):
    """Nine outputs, two launches: parts of more rows or columns than the output, in other dtypes, and many of them."""
    shapes = [((1, 3, 16), (3, 16)), ((7, 16, 61), (5, 61)), ((9, 40, 32), (40, 17)), ((75, 33, 16), (33, 16)),
              ((2, 48, 16), (47, 3)), ((8, 1, 16), (1, 1)), ((3, 600, 16), (600, 16)), ((0, 5, 16), (5, 16)),
              ((16, 16, 40), (16, 40))]  # fmt: skip
    parts = [torch.randn(part) for part, _ in shapes]
    parts[-1] = parts[-1].to(torch.bfloat16)
    outs = [torch.empty(out, dtype=(torch.float32, torch.bfloat16)[i % 2]) for i, (_, out) in enumerate(shapes)]
    masks = [(torch.rand(out) < 0.5).to(torch.uint8) if i % 3 == 0 else None for i, (_, out) in enumerate(shapes)]
    scales = [1.0 - 0.5 * i for i in range(len(shapes))]
    launched = []
    launch = lora_backward._reduce_launch
    monkeypatch.setattr(lora_backward, "_reduce_launch", lambda *key: (launched.append(key), launch(*key))[1])
    exact = []
    for part, out, mask, scale in zip(parts, outs, masks, scales):
        rows, columns = out.shape
        exact.append(scale * part[:, :rows, :columns].double().sum(0) * (1 if mask is None else mask))
        if mask is not None:
            # A row that the output has not, and what the mask leaves out, are not read.
            part[:, :rows, :columns][:, mask == 0] = float("nan")
            part[:, rows:] = float("nan")
    reduce(parts, outs, masks, scales)
    assert [len(key) for key in launched] == [8, 1]
    assert all(close(out, sums) for out, sums in zip(outs, exact))


def test_any_strides_of_x_and_the_factors():
    T, K, N = 37, 40, 24
    x, dy = torch.randn(T, 2 * K)[:, :K], torch.randn(1, N).expand(T, N)
    a, b = torch.randn(K, 5).t(), torch.randn(5, N).t()
    mask_a, mask_b = TiledMask.of_a((torch.rand(K, 5) < 0.5).t()), TiledMask.of_b((torch.rand(5, N) < 0.5).t())
    s = torch.randn(T, 16)
    (ds,), (db,) = output_gradients([dy], [b], [s], [1.5], 0.0, [mask_b], [True])
    dx, (da,) = input_gradients(x, [a], [ds], 0.0, [None], [], [mask_a], [True], True)
    assert close(ds[:, :5], 1.5 * dy.double() @ b.double())
    assert close(db, masked(1.5 * dy.double().t() @ s[:, :5].double(), mask_b))
    assert close(dx, ds[:, :5].double() @ a.double())
    assert close(da, masked(ds[:, :5].double().t() @ x.double(), mask_a))


def test_a_stripe_is_what_a_tiled_mask_says_it_is():
    assert lora_backward.STRIPE.value == STRIPE


def test_every_combination_of_wanted_gradients():
    x, dss = torch.randn(5, 72).to(BF16), [torch.randn(5, 16).to(BF16) for _ in range(2)]
    factors, masks = [torch.randn(16, 72) for _ in range(2)], masks_of("empty stripes", [(16, 72)] * 2, TiledMask.of_a)
    exact = [masked(ds.double().t() @ x.double(), mask) for ds, mask in zip(dss, masks)]
    # One of the two with stripes, both, none.
    for given in itertools.product(*[(None, mask) for mask in masks]):
        for needs in itertools.product((False, True), repeat=2):
            for needs_x in (False, True):
                dx, das = input_gradients(x, factors, dss, 0.0, [None] * 2, [], given, needs, needs_x)
                assert (dx is not None) == needs_x
                for i, da in enumerate(das):
                    assert (da is not None) == needs[i]
                    if da is not None:
                        whole = dss[i].double().t() @ x.double()
                        assert close(da, exact[i] if given[i] is not None else whole)
