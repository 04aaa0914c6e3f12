"""Layers that are handed the same tensor one after the other are computed by one op, and as each alone in any case."""

import copy
import gc
import io
import logging
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorapar
import lorapar_kernels as lk
from lorapar.adapter.layers import masked_layers
from lorapar_kernels import siblings
from tests.tiny import tiny_model

NAMES = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """Attention and an MLP as far as the calls of their layers go; `memory` is what k and v are of."""

    def __init__(self, width=8):
        super().__init__()
        for name, shape in zip(NAMES, [(8, 8), (8, 4), (8, 4), (4, 8), (8, 12), (8, 12), (12, 8)]):
            setattr(self, name, nn.Linear(*shape, bias=name in "qk"))

    def forward(self, x, memory=None):
        source = x if memory is None else memory
        q, k, v = self.q(x), self.k(source), self.v(source)
        x = x + self.o(torch.tanh(k) * v + q[..., :4])
        return x + self.down(F.silu(self.gate(x)) * F.dropout(self.up(x), 0.1, self.training))


class Net(nn.Module):
    def __init__(self, reentrant=None, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.reentrant = nn.ModuleList(Block() for _ in range(blocks)), reentrant

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs) if self.reentrant is None else self.checkpointed(block, x, kwargs)
        return x

    def checkpointed(self, block, x, kwargs):
        return checkpoint(lambda x: block(x, **kwargs), x, use_reentrant=self.reentrant)


def attached(model=None, dtype=torch.float64, names=NAMES, **keys):
    keys = dict(r=3, lora_alpha=6, target_modules=names) | keys
    model = lorapar.attach(Net() if model is None else model, LoraConfig(**keys), start="paper")
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def input_of(seed=1, shape=(2, 5, 8), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def layer(model, name, block=0):
    return masked_layers(model)[f"base_model.model.blocks.{block}.{name}"]


@pytest.fixture
def sizes(monkeypatch):
    """How many layers each op has computed."""
    seen, inner = [], siblings.lora_layers
    monkeypatch.setattr(siblings, "lora_layers", lambda x, of, p: (seen.append(len(of)), inner(x, of, p))[1])
    siblings._say.cache_clear()
    return seen


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "lorapar_kernels")
    return lambda: [record for record in caplog.records if record.name == "lorapar_kernels"]


def steps(model, *calls, seed=3):
    """For each call (a function of the model): the output, x's gradient and the factors' gradients."""
    torch.manual_seed(seed)
    found = []
    for call in calls:
        model.zero_grad()
        x = input_of()
        y = call(model, x)
        if y.requires_grad:
            y.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((y.detach(), x.grad, grads))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_and_alone_give_the_same_bits_on_a_cpu(dtype, sizes, monkeypatch):
    """Gradients too, so that a resumed run, whose first step is alone, repeats the bits of one that went through."""
    model = tiny_model().to(dtype)
    model = lorapar.attach(model, LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"), start="paper")
    ids = torch.arange(12).view(2, 6) % 16
    found = []
    for sharing in (True, True, False):
        monkeypatch.setattr(siblings, "SHARING", sharing)
        sizes.clear()
        torch.manual_seed(5)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert (max(sizes) > 1) is (len(found) == 2)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def assert_as_alone(model, *calls, monkeypatch, expected=None):
    """`steps` as with every layer computed alone: outputs to the bit."""
    plain = copy.deepcopy(expected or model)
    found = steps(model, *calls)
    with monkeypatch.context() as patch:
        patch.setattr(siblings, "SHARING", False)
        wanted = steps(plain, *calls)
    for (y, dx, grads), (y_, dx_, grads_) in zip(found, wanted):
        assert torch.equal(y, y_)
        torch.testing.assert_close(dx, dx_, rtol=1e-10, atol=1e-12)
        assert grads.keys() == grads_.keys()
        for name, gradient in grads_.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-10, atol=1e-12)


def run(model, x):
    return model(x)


ALONE, TOGETHER = [1] * 14, [3, 1, 2, 1] * 2


def test_q_k_v_and_gate_up_are_one_op_each_from_the_second_forward_on(sizes, monkeypatch):
    model = attached(lora_dropout=0.3)
    assert_as_alone(model, run, run, run, monkeypatch=monkeypatch)
    assert sizes == ALONE + 2 * TOGETHER + 3 * ALONE


def test_a_training_loop_that_keeps_its_loss_shares_from_the_second_step_on(sizes):
    model = attached()
    for _ in range(3):
        loss = model(input_of()).sum()
        loss.backward()
    assert sizes == ALONE + 2 * TOGETHER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_the_same_to_the_bit_in_any_dtype(dtype):
    model, x = attached(dtype=dtype), input_of(dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    first = model.eval()(x)
    with torch.no_grad():
        assert torch.equal(model(x), first)


def test_masks_and_live_ranks_hold(sizes, monkeypatch):
    def masked():
        model = attached(r=6)
        for one in masked_layers(model).values():
            a, b, _ = one.factors("default")
            one.trainable_rank = 3
            with torch.no_grad():
                a[3:], b[:, 3:] = a[:3], -b[:, :3]
            rows = torch.tensor([True, False, True, False, False, False])
            one.activate(rows[:, None].expand(a.shape), rows.expand(b.shape))
            assert one.live_ranks.tolist() == [0, 2, 3, 5]
        return model

    assert_as_alone(masked(), run, run, monkeypatch=monkeypatch)
    assert sizes[14:22] == TOGETHER


def test_k_and_v_of_another_tensor_are_right_and_the_group_is_given_up(sizes, lines, monkeypatch):
    memory = input_of(2)

    def cross(model, x):
        return model(x, memory=memory)

    model = attached(blocks := Net(blocks=1))
    assert blocks is model.base_model.model
    assert_as_alone(model, run, run, cross, run, run, monkeypatch=monkeypatch)
    one = [3, 1, 1, 1, 2, 1]  # q's call made all, k and v were others
    assert sizes[:35] == [1] * 7 + [3, 1, 2, 1] + one + 2 * [1, 1, 1, 1, 2, 1] + [1] * 6
    assert len(lines()) == 1
    assert "8→8, 8→4, 8→4 compute one by one" in lines()[0].getMessage()


def orders(*order):
    def call(model, x):
        block = model.base_model.model.blocks[0]
        return sum(getattr(block, name)(x).square().sum() for name in order)

    return call


@pytest.mark.parametrize("order", ["kqv", "vkq", "qvk", "qk", "q", "kv", "qqkv", "qkvqkv", "qkkv", "qkvv", "qkqv"])
def test_another_order_than_learned_gives_right_results(order, monkeypatch):
    learn = orders(*"qkv")
    assert_as_alone(attached(), learn, learn, orders(*order), learn, orders(*order), learn, monkeypatch=monkeypatch)


def test_an_output_that_nobody_took_changes_no_gradient(monkeypatch):
    model = attached()
    assert_as_alone(model, orders(*"qkv"), orders(*"qkv"), orders(*"qv"), monkeypatch=monkeypatch)
    assert layer(model, "k").lora_A["default"].weight.grad is None


def test_an_x_that_is_changed_in_place_between_is_another_x(sizes, monkeypatch):
    def changed(model, x):
        block = model.base_model.model.blocks[0]
        with torch.no_grad():
            x = x.detach().clone()
            q = block.q(x)
            k = block.k(x.mul_(2.0))
            return torch.cat((q, k, block.v(x)), -1)

    learn = orders(*"qkv")
    found, wanted = (steps(model, *([learn] * n), changed) for model, n in ((attached(), 2), (attached(), 0)))
    assert torch.equal(found[-1][0], wanted[-1][0])


@pytest.mark.parametrize("kind", ["pre-hook", "backward hook", "forward on the instance", "hook"])
def test_what_comes_between_a_sibling_s_call_and_its_forward_is_kept(kind, monkeypatch):
    def hooked(model, x):
        k = layer(model, "k")
        if kind == "pre-hook":
            k.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
        elif kind == "backward hook":
            k.register_full_backward_hook(lambda module, grads, outs: tuple(g * 2.0 for g in grads))
        elif kind == "hook":
            k.register_forward_hook(lambda module, args, y: y * 2.0)
        else:
            inner = k.forward
            k.forward = lambda x: inner(x) * 3.0
        return model(x)

    assert_as_alone(attached(), run, run, hooked, run, monkeypatch=monkeypatch)


def test_a_sibling_that_is_not_one_op_now_leaves_the_group_as_it_is(sizes, lines, monkeypatch):
    def hooked(model, x):
        handle = layer(model, "k").base_layer.register_forward_hook(lambda module, args, y: y * 2.0)
        y = model(x)
        handle.remove()
        return y

    assert_as_alone(attached(Net(blocks=1)), run, run, hooked, run, monkeypatch=monkeypatch)
    # lora_add of k is no op of this count.
    assert sizes[:25] == [1] * 7 + [3, 1, 2, 1] + [1, 1, 1, 2, 1] + [3, 1, 2, 1] + [1] * 5
    assert not lines()


def with_adapters(model, x):
    model.add_adapter("other", LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    model.to(torch.float64)
    y = model(x)
    model.set_adapter("other")
    y = y + model(x)
    model.base_model.set_adapter(["default", "other"])
    y = y + model(x)
    model.set_adapter("default")
    model.delete_adapter("other")
    return y + model(x)


def disabled(model, x):
    with model.disable_adapter():
        y = model(x)
    return y + model(x)


def merged(model, x):
    model.merge_adapter()
    y = model(x)
    model.unmerge_adapter()
    return y + model(x)


def evaluated(model, x):
    y = model.eval()(x)
    with torch.no_grad():
        y = y + model(x)
    return y + model.train()(x)


def inferred(model, x):
    with torch.inference_mode():
        y = model(x.detach())
    return model(x) + y.clone()


def twice(model, x):
    return model(x) + model(x * 0.5)


@pytest.mark.parametrize("call", [with_adapters, disabled, merged, evaluated, inferred, twice])
def test_the_state_of_the_adapters_is_that_of_each_call(call, lines, monkeypatch):
    model = attached(lora_dropout=0.2)
    assert_as_alone(model, run, run, call, run, call, monkeypatch=monkeypatch)
    assert not lines()


def toggled(change, back):
    def call(model, x):
        block = model.base_model.model.blocks[0]
        q = block.q(x)
        change(block)
        k = block.k(x)
        back(block)
        return torch.cat((q, k, block.v(x)), -1)

    return call


@pytest.mark.parametrize(
    "call",
    [
        toggled(lambda block: block.k.enable_adapters(False), lambda block: block.k.enable_adapters(True)),
        toggled(lambda block: block.k.merge(), lambda block: block.k.unmerge()),
        toggled(lambda block: block.k.eval(), lambda block: block.k.train()),
        toggled(lambda block: torch.set_grad_enabled(False), lambda block: torch.set_grad_enabled(True)),
    ],
    ids=["disabled", "merged", "eval", "no grad"],
)
def test_a_state_that_changes_between_siblings(call, monkeypatch):
    learn = orders(*"qkv")
    assert_as_alone(attached(), learn, learn, call, monkeypatch=monkeypatch)


def test_autocast_is_that_of_each_call(sizes, monkeypatch):
    def autocast(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).double()

    def between(model, x):
        block = model.base_model.model.blocks[0]
        q = block.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = block.k(x)
        return torch.cat((q, k.to(q.dtype), block.v(x)), -1)

    model, x = attached(dtype=torch.float32).eval(), input_of(dtype=torch.float32)
    plain = copy.deepcopy(model)
    for call in (run, run, autocast, run, between, run):
        with monkeypatch.context() as patch:
            patch.setattr(siblings, "SHARING", False)
            expected = call(plain, x)
        assert torch.equal(call(model, x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_recompute_repeats_its_forward(reentrant, dropout, monkeypatch):
    """Whatever changes between the two: groups that are learned, shared and given up, several forwards at a time."""
    memory = input_of(2)

    def accumulated(model, x):
        one, other = model(x), model(x * 0.5)
        other.square().sum().backward()
        return one

    def misfit(model, x):
        one, other = model(x), model(x, memory=memory)
        another = model(x * 0.5)
        other.square().sum().backward()
        another.square().sum().backward()
        return one

    calls = accumulated, accumulated, run, misfit, run, accumulated, run
    model = attached(Net(reentrant), lora_dropout=dropout)
    plain = attached(lora_dropout=dropout)
    # With dropout a call that does not match has drawn its siblings' seeds, so what follows has other ones than alone.
    wanted = calls if dropout == 0.0 else calls[:3]
    assert_as_alone(model, *wanted, monkeypatch=monkeypatch, expected=plain)
    if dropout and not reentrant:
        one, other = steps(attached(Net(reentrant), lora_dropout=dropout), *calls), steps(plain, *calls)
        for (y, dx, _), (y_, dx_, _) in zip(one, other):
            assert torch.equal(y, y_)
            torch.testing.assert_close(dx, dx_, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_of_checkpointing_between_siblings(reentrant, monkeypatch):
    def inside(model, x):
        block = model.base_model.model.blocks[0]
        q = checkpoint(block.q, x, use_reentrant=reentrant)
        kv = checkpoint(lambda x: torch.cat((block.k(x), block.v(x)), -1), x, use_reentrant=reentrant)
        return torch.cat((q, kv), -1)

    learn = orders(*"qkv")
    assert_as_alone(attached(), learn, learn, inside, learn, monkeypatch=monkeypatch)
    model = attached(lora_dropout=0.3)
    for y, dx, _ in steps(model, learn, learn, inside, inside)[2:]:
        # Linear in x beside the bias, whatever was dropped.
        slope = y - inside(model, torch.zeros_like(dx))
        torch.testing.assert_close((dx * input_of()).sum(), (2.0 * y * slope).sum())
    assert_as_alone(attached(), inside, inside, learn, inside, monkeypatch=monkeypatch)


def test_layers_that_are_called_twice_in_a_forward(sizes, monkeypatch):
    class Twice(Net):
        def forward(self, x):
            return super().forward(super().forward(x) * 0.5)

    assert_as_alone(attached(Twice()), run, run, monkeypatch=monkeypatch)
    assert sizes[28:44] == TOGETHER * 2


def test_each_expert_has_a_pair_of_its_own(sizes, monkeypatch):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"gate": nn.Linear(8, 6), "up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})
                for _ in range(3)
            )

        def forward(self, x):
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = x[i :: len(self.experts) - 1]
                made = expert["down"](F.silu(expert["gate"](rows)) * expert["up"](rows))
                y = y.index_add(0, torch.arange(len(x))[i :: len(self.experts) - 1], made)
            return y

    def call(model, x):
        return model(x.view(-1, 8))

    assert_as_alone(attached(Experts(), names=["gate", "up", "down"]), call, call, monkeypatch=monkeypatch)
    assert sizes[9:15] == [2, 1] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_between_siblings(error, monkeypatch):
    model = attached()
    steps(model, run, run)
    handle = layer(model, "q").register_forward_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
    x = input_of()
    with pytest.raises(error, match="stop"):
        model(x)
    handle.remove()
    there = weakref.ref(x)
    del x
    assert_as_alone(model, run, run, monkeypatch=monkeypatch)
    gc.collect()
    assert there() is None


def test_nothing_stays_alive_longer_than_the_last_sibling_s_call(monkeypatch):
    made, inner = [], siblings.lora_layers

    def recorded(*arguments):
        outs = inner(*arguments)
        made.append([weakref.ref(out) for out in outs])
        return outs

    model = attached()
    learn = orders(*"qkv")
    steps(model, learn, learn)
    monkeypatch.setattr(siblings, "lora_layers", recorded)
    block = model.base_model.model.blocks[0]
    x = input_of()
    y = block.q(x)
    assert [out() is not None for out in made[0]] == [True, True, True]
    block.k(x)
    block.v(x)
    assert [out() is not None for out in made[0]] == [True, False, False]
    del y
    assert made[0][0]() is None
    # What nobody takes goes with any other layer's call, or with the model.
    block.q(x)
    block.o(input_of(shape=(2, 4)))
    assert all(out() is None for out in made[1])
    steps(model, learn)
    del made[:]
    other = attached()
    steps(other, learn, learn)
    other.base_model.model.blocks[0].q(x)
    assert made[-1][1]() is not None
    del other
    gc.collect()
    assert made[-1][1]() is None


def test_copies_learn_their_own_siblings(sizes, monkeypatch, tmp_path):
    model = attached()
    steps(model, run, run)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for one in copies:
        del sizes[:]
        assert_as_alone(one, run, run, monkeypatch=monkeypatch)
        assert sizes[:22] == ALONE + TOGETHER
    del sizes[:]
    steps(model, run)
    assert sizes == TOGETHER


def test_a_sibling_that_is_peft_s_own_again_is_left_alone(sizes):
    model = get_peft_model(Net(blocks=1), LoraConfig(r=3, target_modules=NAMES, init_lora_weights=False))
    x = input_of(dtype=torch.float32)
    expected = model.eval()(x)
    lk.accelerate(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    block = model.base_model.model.blocks[0]
    lk.restore(block.k)
    assert not hasattr(block.k, "_siblings")
    del sizes[:]
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert sizes == [1, 1, 1, 2, 1] * 2
    lk.accelerate(model)
    lk.restore(model)
    torch.testing.assert_close(model(x), expected)


def test_another_dtype_and_device_of_the_model(sizes):
    model = attached().eval()
    steps(model, run, run)
    x = input_of()
    expected = model(x)
    del sizes[:]
    torch.testing.assert_close(model.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
    assert model.to("meta")(x.float().to("meta")).is_meta
    assert sizes == TOGETHER * 2


def test_replicas_in_threads_compute_as_the_model(sizes):
    """As DataParallel makes them: shallow copies, each in a thread of its own, thrown away after the forward."""

    def replica(module):
        made = module._replicate_for_data_parallel()
        made._modules = {name: None if child is None else replica(child) for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(made, name, None if parameter is None else parameter.detach())
        return made

    model = attached().eval()
    steps(model, run, run)
    inputs, found = [input_of(seed) for seed in range(3)], {}
    expected = [model(x) for x in inputs]
    for _ in range(2):
        replicas = [replica(model.base_model.model) for _ in inputs]

        def work(i, replicas=replicas):
            found[i] = replicas[i](inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all(torch.equal(found[i], y) for i, y in enumerate(expected))
    del sizes[:]
    steps(model, run)
    assert sizes == TOGETHER


def test_two_threads_with_one_model():
    model = attached().eval()
    steps(model, run, run)
    inputs = [input_of(seed) for seed in range(4)]
    expected, wrong = [model(x) for x in inputs], []

    def work(i):
        wrong.extend(not torch.equal(model(inputs[i]), expected[i]) for _ in range(25))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(wrong) == 100
    assert not any(wrong)
    assert layer(model, "q")._siblings.mode == siblings.SHARED
    assert not layer(model, "q")._siblings.pending


def test_what_reads_the_calls_as_code_sees_each_layer_alone(sizes):
    model = attached(Net(blocks=1)).eval()
    steps(model, run, run)
    x = input_of()
    expected = model(x)
    del sizes[:]
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
    gradient = torch.func.grad(lambda x: model(x).square().sum())(x.detach())
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, wanted)
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    torch.testing.assert_close(torch.jit.trace(model.base_model.model, (x,), check_trace=False)(x), expected)
    assert set(sizes) == {1}
    del sizes[:]
    model(x)
    assert sizes == [3, 1, 2, 1]


def test_second_derivatives(monkeypatch):
    def penalty(model, x):
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward(retain_graph=True)
        return y

    assert_as_alone(attached(), run, run, penalty, monkeypatch=monkeypatch)


def test_generation_with_a_cache(monkeypatch):
    model = lorapar.attach(tiny_model(), LoraConfig(r=4), start="paper").eval()
    tokens = torch.randint(2, 258, (2, 6), generator=torch.Generator().manual_seed(0))

    def generated():
        return model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)

    first, seen, inner = generated(), [], siblings.lora_layers
    monkeypatch.setattr(siblings, "lora_layers", lambda x, of, p: (seen.append(len(of)), inner(x, of, p))[1])
    assert torch.equal(generated(), first)
    assert seen.count(3) == 8 * len(model.base_model.model.model.layers)
    monkeypatch.setattr(siblings, "SHARING", False)
    assert torch.equal(generated(), first)


def test_any_sequence_of_calls_gives_what_each_layer_gives_alone(monkeypatch):
    generator = torch.Generator().manual_seed(4)

    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    for _ in range(12):
        script = [(["q", "k", "v", "gate", "up"][pick(5)], pick(3), pick(8)) for _ in range(30)]

        def call(model, x, script=script):
            inputs, ys = [x, x.detach() * 0.5, x], []
            for name, which, change in script:
                if change == 0:
                    model.train(not model.training)
                if change == 1:
                    inputs[1].mul_(0.9)
                with torch.set_grad_enabled(change != 2 and which != 1):
                    ys.append(getattr(model.base_model.model.blocks[0], name)(inputs[which]))
            return torch.cat(ys, -1)

        learn = orders("q", "k", "v", "gate", "up")
        assert_as_alone(attached(Net(blocks=1)), learn, learn, call, learn, call, monkeypatch=monkeypatch)
