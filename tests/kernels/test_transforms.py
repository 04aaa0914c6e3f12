"""torch.func, a trace and an export of the LoRA ops against torch's own operations; ops whole under dynamic compile."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import lorapar_kernels as lk

# Of the arguments' checks, which a trace leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

T, IN, OUT, R = 5, 7, 6, 2
SCALING = 1.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


WEIGHTS = [normal(OUT, IN, seed=seed) for seed in (1, 2)]
MASK_A, MASK_B = normal(R, IN, seed=3) > 0.0, normal(OUT, R, seed=4) > 0.0
FACTORS = normal(R, IN, seed=5), normal(OUT, R, seed=6)
X = normal(T, IN, seed=7)


def branch(x: Tensor, a: Tensor, b: Tensor, p: float, seed: Tensor | None) -> Tensor:
    kept = x if seed is None else x * lk.dropout_mask(seed, x.shape, p)
    return SCALING / (1.0 - p) * kept @ a.T @ b.T


def plain(x: Tensor, a: Tensor, b: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The specification of two layers of one x that share their factors, in torch's own operations and unmasked."""
    return torch.cat([x @ weight.T + branch(x, a, b, p, seed) for weight in WEIGHTS], -1)


def linear(x, a, b, p=0.0, seed=None, masks=(None, None)):
    return torch.cat([lk.lora_linear(x, w, a, b, SCALING, None, *masks, p, seed) for w in WEIGHTS], -1)


def grouped(x, a, b, p=0.0, seed=None, masks=(None, None)):
    pairs = [[one] * 2 for one in (a, b, SCALING, None, *masks, seed)]
    return torch.cat(lk.lora_linear_grouped(x, WEIGHTS, *pairs[:6], p, pairs[6]), -1)


def added(x, a, b, p=0.0, seed=None, masks=(None, None)):
    return torch.cat([lk.lora_add(x @ w.T, x, a, b, SCALING, *masks, p, seed) for w in WEIGHTS], -1)


every_op = pytest.mark.parametrize("op", [linear, grouped, added])
with_dropout = pytest.mark.parametrize(("p", "seed"), [(0.0, None), (0.25, torch.tensor([11]))])


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def loss_of(op, *rest, **masks):
    return lambda x, a, b: op(x, a, b, *rest, **masks).pow(2).sum()


@every_op
@with_dropout
def test_gradients_and_masks(op, p, seed):
    masks = MASK_A, MASK_B
    dx, da, db = grad(loss_of(op, p, seed, masks=masks), argnums=(0, 1, 2))(X, *FACTORS)
    expected = grad(loss_of(plain, p, seed), argnums=(0, 1, 2))(X, *FACTORS)
    close((dx, da, db), (expected[0], expected[1] * MASK_A, expected[2] * MASK_B))
    assert bool((da[~MASK_A] == 0.0).all())
    # A gradient of a gradient, within transforms; the masks act at each of them.
    twice = grad(lambda x: grad(loss_of(op, p, seed))(x, *FACTORS).pow(2).sum())(X)
    close(twice, grad(lambda x: grad(loss_of(plain, p, seed))(x, *FACTORS).pow(2).sum())(X))


@every_op
@with_dropout
def test_per_example_gradients(op, p, seed):
    rows = normal(3, T, IN, seed=8)
    got = vmap(grad(loss_of(op, p, seed), argnums=(1, 2)), in_dims=(0, None, None))(rows, *FACTORS)
    one_by_one = [grad(loss_of(plain, p, seed), argnums=(1, 2))(row, *FACTORS) for row in rows]
    close(got, tuple(torch.stack(column) for column in zip(*one_by_one)))
    together = grad(lambda a: vmap(lambda x: loss_of(op, p, seed)(x, a, FACTORS[1]))(rows).sum())(FACTORS[0])
    close(together, got[0].sum(0))


@every_op
@with_dropout
def test_an_ensemble_of_factors(op, p, seed):
    stacked = tuple(torch.stack([factor, 2.0 * factor, factor - 1.0], 1) for factor in FACTORS)
    got = vmap(op, in_dims=(None, 1, 1, None, None))(X, *stacked, p, seed)
    close(got, torch.stack([plain(X, *(factor.select(1, i) for factor in stacked), p, seed) for i in range(3)]))


@every_op
def test_a_seed_for_each_of_an_ensemble(op):
    seeds = torch.arange(6).view(2, 3, 1)
    got = vmap(vmap(lambda seed: op(X, *FACTORS, 0.25, seed)), in_dims=1)(seeds)
    close(got, torch.stack([torch.stack([op(X, *FACTORS, 0.25, s) for s in seeds[:, i]]) for i in range(3)]))
    assert not torch.equal(got[0, 0], got[0, 1])


@every_op
@with_dropout
def test_forward_mode_and_jacobians(op, p, seed):
    def at(of, *given):
        return lambda a: of(X, a, FACTORS[1], p, seed, *given)

    a, tangent = FACTORS[0], normal(R, IN, seed=9)
    close(jvp(at(op), (a,), (tangent,)), jvp(at(plain), (a,), (tangent,)))
    masked = jvp(at(op, (MASK_A, MASK_B)), (a,), (tangent,))[1]
    close(masked, jvp(at(plain), (a,), (tangent * MASK_A,))[1])
    expected = jacrev(at(plain))(a)
    close(jacrev(at(op))(a), expected)
    close(jacfwd(at(op))(a), expected)
    close(hessian(lambda a: at(op)(a).pow(2).sum())(a), hessian(lambda a: at(plain)(a).pow(2).sum())(a))


@every_op
def test_a_trace_runs_without_this_package(op, tmp_path):
    traced = torch.jit.trace(op, (X, *FACTORS))
    assert "^" not in str(traced.graph)  # a call of Python
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    longer = normal(9, IN, seed=10)
    close(torch.jit.load(str(tmp_path / "traced.pt"))(longer, *FACTORS), plain(longer, *FACTORS))
    with pytest.raises(RuntimeError, match=r"a LoRA layer with dropout cannot be traced; call model\.eval\(\) first"):
        torch.jit.trace(lambda x, seed: op(x, *FACTORS, 0.25, seed), (X, torch.tensor([3])))


def test_an_export_runs_without_this_package():
    class Layers(torch.nn.Module):
        def forward(self, x, a, b):
            return grouped(x, a, b)

    for strict in (False, True):
        program = torch.export.export(Layers(), (X, *FACTORS), strict=strict)
        assert not any("lorapar" in str(node.target) for node in program.graph.nodes)
        close(program.module()(X + 1.0, *FACTORS), plain(X + 1.0, *FACTORS))


SHAPES = ((5, 7), (3, 11), (64, 513), (2, 32))
WHOLE = {
    "pack_mask": lambda m: lk.pack_mask(m),
    "unpack_mask": lambda m: lk.unpack_mask(lk.pack_mask(m), m.shape),
    "index_mask": lambda m: lk.index_mask(m)[:2],
    "dropout_mask": lambda m: lk.dropout_mask(torch.tensor([3]), m.shape, 0.25),
    "tile_sums": lambda m: lk.tile_sums(m.float(), (2, 3)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_and_once_under_dynamic_compile(name):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(WHOLE[name], backend=count, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        mask = torch.rand(shape) < 0.4
        got, expected = compiled(mask), WHOLE[name](mask)
        for one, other in zip(*([made] if isinstance(made, Tensor) else made for made in (got, expected)), strict=True):
            assert torch.equal(one, other)
    assert len(graphs) == 1


def test_spare_bits_are_refused_when_the_compiled_program_runs():
    unpack = torch.compile(lambda words: lk.unpack_mask(words, (5, 7)), backend="aot_eager", fullgraph=True)
    assert bool(unpack(torch.tensor([-1, 7], dtype=torch.int32)).all())
    with pytest.raises(
        ValueError, match="the 29 spare bits of the last word must be 0 for 35 elements, got 0x00000008"
    ):
        unpack(torch.tensor([0, 8], dtype=torch.int32))
