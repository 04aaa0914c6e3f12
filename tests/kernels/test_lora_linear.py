"""The layer against autograd's own derivative in float64, on fresh shapes; masks, dropout, dtypes, bad arguments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lorapar_kernels as lk
from lorapar_kernels.lora_layer import LoraLayer
from lorapar_kernels.lora_linear import lora_layers

SHAPES = [((5,), 7, 3, 2), ((2, 3), 8, 16, 1), ((1, 63), 60, 33, 5), ((0,), 4, 4, 2), ((4, 2, 3), 31, 17, 40)]


def tensors(leading, n_in, n_out, r, dtype=torch.float64, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*leading, n_in), draw(n_out, n_in), draw(r, n_in), draw(n_out, r), draw(n_out), draw(*leading, n_out)


def random_mask(like, share=0.4):
    return torch.rand(like.shape) < share


@pytest.mark.parametrize(("leading", "n_in", "n_out", "r"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("opaque", [False, True])
def test_equals_autograd_in_float64(leading, n_in, n_out, r, p, opaque):
    x, w, a, b, bias, dy = tensors(leading, n_in, n_out, r)
    seed = torch.randint(2**40, (1,)) if p else None
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    dropped = leaves[0] if seed is None else leaves[0] * lk.dropout_mask(seed, x.shape, p) / (1.0 - p)
    expected = F.linear(leaves[0], w, bias) + 1.7 * dropped @ leaves[1].t() @ leaves[2].t()
    expected.backward(dy)
    mask_a, mask_b = random_mask(a), random_mask(b)
    ours = [t.clone().requires_grad_() for t in (x, a, b)]
    options = dict(mask_a=mask_a, mask_b=mask_b, dropout_p=p, seed=seed)
    if opaque:
        y = lk.lora_add(F.linear(ours[0], w, bias), *ours, 1.7, **options)
    else:
        y = lk.lora_linear(ours[0], w, ours[1], ours[2], 1.7, bias=bias, **options)
    y.backward(dy)
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(ours[0].grad, leaves[0].grad, **close)
    torch.testing.assert_close(ours[1].grad, leaves[1].grad * mask_a, **close)
    torch.testing.assert_close(ours[2].grad, leaves[2].grad * mask_b, **close)


def test_gradcheck():
    x, w, a, b, bias, _ = tensors((2, 3), 5, 4, 2)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: lk.lora_linear(x, w, a, b, 0.5, bias=bias), leaves)


def plain_layer(x, w, a, b, bias, mask_a, mask_b, p, seed):
    """The layer in torch's own operations, each factor's gradient masked."""
    a, b = (torch.where(mask, factor, factor.detach()) for factor, mask in ((a, mask_a), (b, mask_b)))
    dropped = x * lk.dropout_mask(seed, x.shape, p) / (1.0 - p)
    return F.linear(x, w, bias) + 0.7 * dropped @ a.t() @ b.t()


def calls_of_the_layer(w, bias, mask_a, mask_b, p, seed):
    """Each public way to compute it, and the op that torch.compile sees."""
    one = dict(mask_a=mask_a, mask_b=mask_b, dropout_p=p, seed=seed)
    return {
        "lora_linear": lambda x, a, b: lk.lora_linear(x, w, a, b, 0.7, bias, **one),
        "lora_add": lambda x, a, b: lk.lora_add(F.linear(x, w, bias), x, a, b, 0.7, **one),
        "lora_linear_grouped": lambda x, a, b: lk.lora_linear_grouped(
            x, [w], [a], [b], [0.7], [bias], [mask_a], [mask_b], p, [seed]
        )[0],
        "op": lambda x, a, b: torch.ops.lorapar.lora_linear(x, w, bias, None, a, b, mask_a, mask_b, seed, 0.7, p)[0],
    }


@pytest.mark.parametrize("call", ["lora_linear", "lora_add", "lora_linear_grouped", "op"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives_are_exact(call, p):
    x, w, a, b, bias, dy = tensors((2, 3), 5, 4, 2)
    seed = torch.tensor([7])
    mask_a, mask_b = random_mask(a), random_mask(b)
    leaves = [t.requires_grad_() for t in (x, a, b, dy)]

    def second(f):
        # dY that needs no gradient of its own (a loss that is a sum), and one that does.
        firsts = [torch.autograd.grad(f(x, a, b), (x, a, b), given, create_graph=True) for given in (dy.detach(), dy)]
        penalty = sum(g.square().sum() for first in firsts for g in first) + f(x, a, b).sum()
        return firsts[0], torch.autograd.grad(penalty, leaves)

    ours = second(calls_of_the_layer(w, bias, mask_a, mask_b, p, seed if p else None)[call])
    expected = second(lambda x, a, b: plain_layer(x, w, a, b, bias, mask_a, mask_b, p, seed))
    for one, other in zip((*ours[0], *ours[1]), (*expected[0], *expected[1])):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_a_tensor_given_twice():
    x, w, a, b, *_ = tensors((3,), 4, 4, 2)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def second(f):
        first = torch.autograd.grad(f().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    tied = second(lambda: sum(lk.lora_linear_grouped(x, [w, w], [a, a], [b, b], [1.0, 0.5])))
    expected = second(lambda: 2 * x @ w.t() + 1.5 * x @ a.t() @ b.t())
    for one, other in zip(tied, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", ["lora_linear", "lora_add", "lora_linear_grouped"])
def test_transforms_of_torch_func_are_exact(call):
    x, w, a, b, bias, dy = tensors((3,), 5, 4, 2)
    mask_a, mask_b, seed = random_mask(a), random_mask(b), torch.tensor([7])
    f = calls_of_the_layer(w, bias, mask_a, mask_b, 0.0, None)[call]

    def g(x, a, b):
        return plain_layer(x, w, a, b, bias, mask_a, mask_b, 0.0, seed)

    def loss(layer):
        return lambda *given: (layer(*given) * dy).sum().square()

    func = torch.func
    for ours, expected in (
        (func.grad(loss(f), argnums=(0, 1, 2))(x, a, b), func.grad(loss(g), argnums=(0, 1, 2))(x, a, b)),
        (func.hessian(loss(f), argnums=1)(x, a, b), func.hessian(loss(g), argnums=1)(x, a, b)),
        (func.jvp(f, (x, a, b), (x, a, b)), func.jvp(g, (x, a, b), (x, a, b))),
        (func.vmap(f, (0, None, None))(x, a, b), func.vmap(g, (0, None, None))(x, a, b)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_leaves_gradients_as_they_are(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    x, w, a, b, *_ = tensors((3,), 4, 5, 2)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def gradients(run):
        return torch.autograd.grad(run().square().sum(), leaves) if not use_reentrant else backward(run)

    def backward(run):
        for leaf in leaves:
            leaf.grad = None
        run().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(lambda: lk.lora_linear(x, w, a, b, 0.7))
    again = gradients(lambda: checkpoint(lk.lora_linear, x, w, a, b, 0.7, use_reentrant=use_reentrant))
    assert all(torch.equal(one, other) for one, other in zip(plain, again))


def test_masked_gradients_are_exactly_zero_even_where_the_gradient_is_nan():
    x, w, a, b, _, dy = tensors((3,), 4, 5, 2)
    a, b = a.requires_grad_(), b.requires_grad_()
    mask_a, mask_b = torch.zeros_like(a, dtype=torch.bool), random_mask(b)
    dy[0, 0] = float("nan")
    lk.lora_linear(x, w, a, b, 1.0, mask_a=mask_a, mask_b=mask_b).backward(dy)
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert torch.equal(b.grad[~mask_b], torch.zeros_like(b[~mask_b]))
    assert b.grad[0][mask_b[0]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_error_of_low_precision_is_that_of_its_rounding(dtype, wide):
    exact = tensors((4, 33), 64, 48, 8, torch.float64, seed=1)
    x, w, a, b, bias, dy = (t.to(dtype) for t in exact)
    if wide:
        a, b = a.float(), b.float()
    xd, wd, ad, bd, biasd, dyd = (t.double() for t in (x, w, a, b, bias, dy))
    for t in (x, a, b, xd, ad, bd):
        t.requires_grad_()
    y = lk.lora_linear(x, w, a, b, 0.5, bias=bias)
    expected = lk.lora_linear(xd, wd, ad, bd, 0.5, bias=biasd)
    y.backward(dy)
    expected.backward(dyd)
    # A few roundings of each product's size; fp32 within the 2e-6 that the kernels are held to.
    bound = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, exact_ in ((y, expected), (x.grad, xd.grad), (a.grad, ad.grad), (b.grad, bd.grad)):
        relative = (ours.double() - exact_).norm() / exact_.norm()
        assert relative < bound, relative
    assert y.dtype == dtype
    assert a.grad.dtype == a.dtype


def test_the_same_seed_gives_the_same_dropout_and_another_a_different_one():
    x, w, a, b, *_ = tensors((200,), 32, 8, 4)
    runs = [lk.lora_linear(x, w, a, b, 1.0, dropout_p=0.5, seed=torch.tensor([s])) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_autocast_computes_in_its_dtype_and_gives_fp32_gradients():
    x, w, a, b, *_ = tensors((6,), 16, 8, 2, torch.float32)
    a, b = a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.lora_linear(x.requires_grad_(), w, a, b, 1.0)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == b.grad.dtype == x.grad.dtype == torch.float32


class Codes:
    """A weight that is made where it is needed, in memory that all such weights share."""

    buffer = torch.empty(64 * 64, dtype=torch.float64)
    made = 0

    def __init__(self, weight):
        self.weight, self.shape, self.device = weight, weight.shape, weight.device

    def dense(self, dtype):
        Codes.made += 1
        out = self.buffer[: self.weight.numel()].view(self.shape)
        return out.copy_(self.weight).to(dtype)


@pytest.mark.parametrize("twice", [False, True])
def test_weights_made_where_they_are_needed(twice):
    """In one node with a plain weight and an opaque base; made once forward and once backward."""
    x, *_ = tensors((5,), 12, 4, 2)
    x.requires_grad_()
    each = [[t.requires_grad_(i > 0) for i, t in enumerate(tensors((5,), 12, n, 2)[1:4])] for n in (4, 6, 8, 7)]
    y = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    ws = [Codes(each[0][0]), Codes(each[1][0]), each[2][0], None]
    layers = [
        LoraLayer(w, b if w is ws[1] else None, None if w is not None else y, a, b_, 1.5)
        for w, (_, a, b_), b in zip(ws, each, (None, bias, None, None))
    ]
    leaves = [x, y, *(t for _, *factors in each for t in factors)]

    def gradients(outs):
        first = torch.autograd.grad([out.square().sum() for out in outs], leaves, create_graph=twice)
        if not twice:
            return first
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    Codes.made = 0
    ours = gradients(lora_layers(x, layers, 0.0))
    assert twice or Codes.made == 4
    bases = [F.linear(x, each[0][0]), F.linear(x, each[1][0], bias), F.linear(x, each[2][0]), y]
    expected = gradients([base + 1.5 * x @ a.t() @ b.t() for base, (_, a, b) in zip(bases, each)])
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_an_opaque_base_returned_is_not_changed():
    x, w, a, b, *_ = tensors((3, 5), 12, 4, 2)
    y = F.linear(x, w)
    before = y.clone()
    turned = y.transpose(0, 1)
    out = lk.lora_add(turned, x.transpose(0, 1), a, b, 2.0)
    assert torch.equal(y, before)
    torch.testing.assert_close(out, (before + 2.0 * x @ a.t() @ b.t()).transpose(0, 1))


def test_without_a_gradient_there_is_no_node():
    x, w, a, b, *_ = tensors((3,), 12, 4, 2)
    assert lk.lora_linear(x, w, a, b, 1.0).grad_fn is None
    a.requires_grad_()
    assert lk.lora_linear(x, w, a, b, 1.0).grad_fn is not None
    with torch.no_grad():
        assert lk.lora_linear(x, w, a, b, 1.0).grad_fn is None


def test_a_mask_that_knows_its_stripes_masks_the_same():
    x, w, a, b, _, dy = tensors((7,), 200, 130, 3)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    mask_a, mask_b = random_mask(a), random_mask(b)
    mask_a[:, 64:128] = False
    mask_b[128:] = False
    tiled = lk.TiledMask.of_a(mask_a), lk.TiledMask.of_b(mask_b)
    assert tiled[0].stripes.tolist() == [1, 0, 1, 1]
    assert tiled[1].stripes.tolist() == [1, 1, 0]
    assert lk.TiledMask.of_a(torch.ones(2, 65, dtype=torch.bool)).stripes is None
    found = [
        torch.autograd.grad(lk.lora_linear(x, w, a, b, 1.0, None, *masks), leaves, dy)
        for masks in ((mask_a, mask_b), tiled)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_non_contiguous_x():
    x, w, a, b, *_ = tensors((6, 5), 16, 8, 2)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(lk.lora_linear(turned, w, a, b, 1.0), lk.lora_linear(x, w, a, b, 1.0).transpose(0, 1))


def test_grouped_equals_one_by_one():
    x, *_ = tensors((5,), 12, 4, 2)
    layers = [tensors((5,), 12, n, 2)[1:4] for n in (4, 6, 8)]
    ys = lk.lora_linear_grouped(x, *zip(*layers), [1.0, 2.0, 3.0])
    for y, (w, a, b), s in zip(ys, layers, (1.0, 2.0, 3.0)):
        assert torch.equal(y, lk.lora_linear(x, w, a, b, s))
    with pytest.raises(ValueError, match="scalings must have 3 entries"):
        lk.lora_linear_grouped(x, *zip(*layers), [1.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(lora_a=torch.zeros(2, 5)), ValueError, r"lora_a must be \[r >= 1, 4\], got \[2, 5\]"),
        (dict(lora_a=torch.zeros(0, 4)), ValueError, "lora_a must be"),
        (dict(lora_b=torch.zeros(3, 3)), ValueError, r"lora_b must be \[3, 2\], got \[3, 3\]"),
        (dict(weight=torch.zeros(3, 5)), ValueError, r"weight must be \[out, 4\]"),
        (dict(weight=torch.zeros(3, 4, dtype=torch.float64)), TypeError, "weight must have x's dtype"),
        (dict(weight=torch.zeros(3, 4, requires_grad=True)), ValueError, "weight must not require"),
        (dict(mask_a=torch.ones(2, 3, dtype=torch.bool)), ValueError, "mask_a must have 2×4 elements, got 2×3"),
        (dict(mask_b=torch.ones(3, 2)), TypeError, "mask_b must be bool"),
        (dict(mask_b=[True]), TypeError, "mask_b must be a bool tensor or a TiledMask of one, got list"),
        (dict(mask_b=lk.TiledMask(None, None)), TypeError, "mask_b must be a bool tensor .* got NoneType"),
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
        (dict(lora_b=None), TypeError, "lora_b must be a tensor, got NoneType"),
        (dict(scaling="1"), TypeError, "scaling must be a float, got str"),
        (dict(scaling=torch.ones(2)), TypeError, "scaling must be a float, got Tensor"),
        (dict(dropout_p="0.1"), TypeError, "dropout_p must be a float, got str"),
        (dict(dropout_p=0.5, seed=3), TypeError, "seed must be a tensor, got int"),
        (dict(bias=torch.zeros(3, dtype=torch.bfloat16)), TypeError, "bias must have x's dtype torch.float32, got"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=0.5), ValueError, "seed must be"),
        (dict(lora_a=torch.zeros(2, 4, dtype=torch.bfloat16)), TypeError, "at least as wide"),
        (dict(lora_b=torch.zeros(3, 2, dtype=torch.complex64)), TypeError, "lora_b must be floating point"),
        (dict(x=torch.zeros(2, 4, dtype=torch.long)), TypeError, "x must be floating point"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias must be \[3\], got \[4\]"),
        (dict(bias=torch.zeros(3, requires_grad=True)), ValueError, "bias must not require a gradient"),
        (dict(dropout_p=0.5, seed=torch.zeros(2)), ValueError, "seed must be .*, got 2 of torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4), lora_a=torch.zeros(2, 4), lora_b=torch.zeros(3, 2),
                scaling=1.0)  # fmt: skip
    with pytest.raises(error, match=message):
        lk.lora_linear(**(good | change))


def striped(stripes=None, words=None, shape=(2, 4)):
    return lk.TiledMask(torch.ones(shape, dtype=torch.bool), stripes, words)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask_a=striped(torch.ones(2, dtype=torch.uint8))), ValueError,
         r"mask_a.stripes must be torch.uint8 \[1\], contiguous, on cpu, got torch.uint8 \[2\] on cpu"),
        (dict(mask_b=striped(torch.ones(1, dtype=torch.bool), shape=(3, 2))), ValueError, "stripes .* torch.bool"),
        (dict(mask_b=striped(torch.ones(1, dtype=torch.uint8, device="meta"), shape=(3, 2))), ValueError, "on meta"),
        (dict(mask_a=striped([1])), TypeError, "mask_a.stripes must be .*, got list"),
        (dict(mask_a=striped(None, torch.ones(3, dtype=torch.uint8))), ValueError, r"words must be .*\[3\]"),
        (dict(mask_a=striped(None, torch.ones(4, 2, dtype=torch.uint8).t())), ValueError, "mask_a.words .* strides"),
    ],
)  # fmt: skip
def test_a_mask_with_parts_of_another_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        lk.lora_linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 2), 1.0, **change)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (None, TypeError, "y must be a tensor, got NoneType"),
        (torch.zeros(3, dtype=torch.long), TypeError, "y must be floating point, got torch.int64"),
        (torch.zeros(()), ValueError, r"y must be \[, out\] as x is, got \[\]"),
        (torch.zeros(3, device="meta"), ValueError, "y must be on x's device cpu, got meta"),
    ],
)
def test_what_no_base_can_have_returned_is_refused(y, error, message):
    with pytest.raises(error, match=message):
        lk.lora_add(y, torch.zeros(4), torch.zeros(2, 4), torch.zeros(3, 2), 1.0)


def test_a_groups_arguments_as_tensors_and_which_one_does_not_fit():
    x, w, a, b, *_ = tensors((3,), 12, 4, 2)
    pairs = [torch.stack([t, t + 1.0]) for t in (w, a, b)]
    seeds, biases = torch.tensor([[1], [2]]), torch.randn(2, 4, dtype=torch.float64)
    ys = lk.lora_linear_grouped(x, *pairs, [1.0, 2.0], biases, dropout_p=0.5, seeds=seeds)
    for i, y in enumerate(ys):
        alone = lk.lora_linear(x, *(t[i] for t in pairs), i + 1.0, biases[i], dropout_p=0.5, seed=seeds[i])
        assert torch.equal(y, alone)
    narrow = lk.lora_linear(x, w, a, b, np.float32(0.5))
    assert torch.equal(narrow, lk.lora_linear(x, w, a, b, 0.5))
    with pytest.raises(TypeError, match=r"weights\[1\] must be a tensor, got NoneType"):
        lk.lora_linear_grouped(x, [w, None], [a, a], [b, b], [1.0, 1.0])
    with pytest.raises(TypeError, match=r"scalings\[0\] must be a float, got NoneType"):
        lk.lora_linear_grouped(x, [w], [a], [b], [None])


def test_a_seed_that_is_written_before_the_backward_is_told():
    """It would draw another mask there."""
    x, w, a, b, *_ = tensors((3,), 12, 4, 2)
    seed = torch.tensor([3])
    y = lk.lora_linear(x, w, a.requires_grad_(), b, 1.0, dropout_p=0.5, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["is_grads_batched", "create_graph", "vmap"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_several_gradients_at_once(way, p):
    x, w, a, b, *_ = tensors((5,), 12, 4, 2)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    options = dict(dropout_p=p, seed=torch.tensor([3]))
    for y in (lk.lora_linear(x, w, a, b, 2.0, **options), lk.lora_add(x @ w.t(), x, a, b, 2.0, **options)):
        dys = torch.randn(3, 5, 4, dtype=torch.float64)
        each = zip(*(torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys))
        if way == "vmap":
            found = torch.func.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(dys)  # noqa: B023
        else:
            found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, create_graph=way == "create_graph")
        for one, other in zip(found, each):
            torch.testing.assert_close(one.detach(), torch.stack(other), rtol=1e-12, atol=1e-12)


def test_integers_are_refused_under_autocast_too():
    x, w, a, b, *_ = tensors((3,), 12, 4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
            lk.lora_linear(x.long(), w, a, b, 1.0)
        with pytest.raises(TypeError, match="weight must have x's dtype torch.bfloat16, got torch.int64"):
            lk.lora_linear(x, w.long(), a, b, 1.0)


def layer(leading=(6,), n_in=16, n_out=8, r=3, dtype=torch.float32):
    x, w, a, b, bias, _ = tensors(leading, n_in, n_out, r, dtype)
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), bias


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("opaque", [False, True])
def test_opcheck(p, opaque):
    x, w, a, b, bias = layer()
    y = torch.randn(6, 8, requires_grad=True)
    seed = torch.tensor([3]) if p else None
    masks = torch.rand(a.shape) < 0.5, torch.rand(b.shape) < 0.5
    base = (None, None, y) if opaque else (w, bias, None)
    torch.library.opcheck(torch.ops.lorapar.lora_linear.default, (x, *base, a, b, *masks, seed, 1.5, p))
    dy, x, s, a, b = (t.detach() for t in (torch.randn(6, 8), x, torch.randn(3, 6).t(), a, b))
    base = (None, None, None) if opaque else (w, None, None)
    torch.library.opcheck(
        torch.ops.lorapar.lora_linear_backward.default,
        (dy, x, s, *base, a, b, *masks, seed, 1.5, p, [True, True, False]),
    )


def test_opcheck_of_dropout_mask():
    torch.library.opcheck(torch.ops.lorapar.dropout_mask.default, (torch.tensor([3]), [5, 7], 0.25))


@pytest.mark.slow
def test_compiles_as_one_graph_and_gives_the_same():
    x, w, a, b, bias = layer((3, 5), 24, 16, 4, torch.float64)
    seed, mask_a = torch.tensor([7]), torch.rand(4, 24) < 0.5
    seeds = [seed, torch.tensor([8])]

    def model(x, a, b):
        y = lk.lora_linear(x.tanh(), w, a, b, 0.5, bias, mask_a=mask_a, dropout_p=0.2, seed=seed)
        y = lk.lora_add(y * 2, x, a, b, 0.25)
        one, two = lk.lora_linear_grouped(x, [w, w], [a, a], [b, b], [1.0, 2.0], dropout_p=0.1, seeds=seeds)
        return (y + one * two).square().sum()

    leaves = x, a, b
    expected = torch.autograd.grad(model(*leaves), leaves)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(*leaves)
    torch.testing.assert_close(loss, model(*leaves))
    for ours, wanted in zip(torch.autograd.grad(loss, leaves), expected):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-8)


def test_saves_x_and_nothing_else_of_its_size_or_y_s():
    x, w, a, b, bias = layer((2, 50), 40, 60, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lk.lora_linear(x, w, a, b, 1.0, bias, dropout_p=0.1, seed=torch.tensor([1]))
    large = [t for t in kept if t.numel() >= 100 * 40]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_grouped_gradients_equal_the_sum_of_one_by_one():
    x, *_ = layer((5, 3), 12, 4, 2, torch.float64)
    each = [[t.double() for t in tensors((1,), 12, n, r)[1:4]] for n, r in ((4, 2), (6, 3), (8, 2), (4, 5))]
    for _, a, b in each:
        a.requires_grad_()
        b.requires_grad_()
    seeds = [torch.tensor([i]) for i in range(4)]
    ws, as_, bs = zip(*each)
    leaves = [x, *as_, *bs]
    grouped = lk.lora_linear_grouped(x, ws, as_, bs, [1.0, 2.0, 3.0, 4.0], dropout_p=0.3, seeds=seeds)
    apart = [lk.lora_linear(x, w, a, b, i + 1.0, dropout_p=0.3, seed=seeds[i]) for i, (w, a, b) in enumerate(each)]
    dys = [torch.randn_like(y) for y in apart]
    for ours, wanted in zip(torch.autograd.grad(grouped, leaves, dys), torch.autograd.grad(apart, leaves, dys)):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_an_output_that_is_not_used_counts_as_one_without_gradient():
    x, *_ = layer((5,), 12, 4, 2, torch.float64)
    each = [[t.double() for t in tensors((1,), 12, 4, 2)[1:4]] for _ in range(2)]
    ws, as_, bs = zip(*[(w, a.requires_grad_(), b.requires_grad_()) for w, a, b in each])
    one, _ = lk.lora_linear_grouped(x, ws, as_, bs, [1.0, 1.0])
    (dx,) = torch.autograd.grad(one.sum(), x)
    (expected,) = torch.autograd.grad(lk.lora_linear(x, ws[0], as_[0], bs[0], 1.0).sum(), x)
    torch.testing.assert_close(dx, expected)


def test_empty_batch():
    x, w, a, b, bias = layer((0, 4))
    y = lk.lora_linear(x, w, a, b, 1.0, bias)
    assert y.shape == (0, 4, 8)
    y.sum().backward()
    assert not a.grad.any()
    assert x.grad.shape == x.shape


def test_nan_and_inf_stay_in_their_rows():
    x, w, a, b, bias = layer((5,))
    with torch.no_grad():
        x[1, 0], x[3, 2] = float("nan"), float("inf")
        y = lk.lora_linear(x, w, a, b, 1.0, bias)
    assert not y[[1, 3]].isfinite().any()
    assert y[[0, 2, 4]].isfinite().all()


def test_forced_triton_without_the_interpreter_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    x, w, a, b, _ = layer()
    with pytest.raises(
        ValueError, match="cannot serve lora_linear: no Triton kernel runs on cpu tensors; set TRITON_INT"
    ):
        lk.lora_linear(x, w, a, b, 1.0)


def test_another_device_is_named():
    x, w, a, b, _ = layer()
    for name, arguments in {"lora_a": (x, w, a.to("meta"), b), "weight": (x, w.to("meta"), a, b)}.items():
        with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, got meta"):
            lk.lora_linear(*arguments, 1.0)
    given = {
        "mask_a": dict(mask_a=torch.ones(3, 16, dtype=torch.bool, device="meta")),
        "mask_b": dict(mask_b=torch.ones(8, 3, dtype=torch.bool, device="meta")),
        "bias": dict(bias=torch.zeros(8, device="meta")),
        "seed": dict(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int64, device="meta")),
    }
    for name, options in given.items():
        with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, got meta"):
            lk.lora_linear(x, w, a, b, 1.0, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("leading", "n_in", "n_out", "r"), [*SHAPES, ((8, 513), 1024, 768, 16), ((300,), 512, 256, 256)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("product", ["plain", "fused"])
def test_cuda_equals_float64(monkeypatch, leading, n_in, n_out, r, p, dtype, product):
    x, w, a, b, bias, dy = (t.cuda() for t in tensors(leading, n_in, n_out, r))
    # Factors that x's dtype holds: rounding them, which the layer does by design, is no part of the error.
    x, w, bias, dy, a, b = (t.to(dtype) for t in (x, w, bias, dy, a, b))
    a, b = a.float(), b.float()
    seed = torch.tensor([5], device="cuda") if p else None
    mask_a, mask_b = random_mask(a).cuda(), random_mask(b).cuda()
    results = []
    for cast, way in ((lambda t: t, product), (lambda t: t.double(), "")):
        monkeypatch.setenv("LORAPAR_PRODUCT", way)
        leaves = [cast(t).detach().requires_grad_() for t in (x, a, b)]
        y = lk.lora_linear(leaves[0], cast(w), leaves[1], leaves[2], 1.7, cast(bias), mask_a, mask_b, p, seed)
        y.backward(cast(dy))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, exact in zip(*results):
        assert (ours.double() - exact).norm() <= bound * exact.norm()
