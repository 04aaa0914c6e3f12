"""Siblings of an accelerated model give what PEFT's layers give, whatever is done to them between their calls."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lorapar_kernels as lk
from lorapar_kernels import siblings


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 4, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def input_of(tokens=2, **keys):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64, **keys)


def models(**keys):
    """PEFT's own, and one whose q, k and v are one op."""
    keys = dict(r=3, target_modules=["q", "k", "v"], init_lora_weights=False) | keys
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(Block(), LoraConfig(**keys)).double().train()
        if accelerated:
            lk.accelerate(model)
            for _ in range(2):
                sum(y.sum() for y in model(input_of(requires_grad=True))).backward()
            model.zero_grad()
            assert model.base_model.model.q._siblings.mode == siblings.SHARED
        yield model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_peft(call, **keys):
    """call: a function of the block and of x; what it returns, and every gradient, is compared."""
    found = []
    for model in models(**keys):
        x = input_of(requires_grad=True)
        try:
            returned = call(model.base_model.model, x)
        except RuntimeError as error:
            returned = type(error)
        found.append((returned, x.grad, gradients(model)))
    if isinstance(found[0][0], type):
        assert found[0][0] is found[1][0]
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def one_by_one(block, x):
    for y in block(x):
        y.square().sum().backward()


def as_they_are_called(block, x):
    for layer in (block.q, block.k, block.v):
        layer(x).square().sum().backward()


def by_grad(block, x):
    q, k, v = block(x)
    return [
        *torch.autograd.grad(q.sum(), x),
        *torch.autograd.grad(k.sum() + v.sum(), [x, *block.k.lora_A.parameters()]),
    ]


def one_twice(block, x):
    q, _, _ = block(x)
    q.sum().backward()
    q.sum().backward()


def kept_and_once_more(block, x):
    q, k, v = block(x)
    q.square().sum().backward(retain_graph=True)
    (q.square().sum() + k.sum()).backward()
    v.sum().backward()


def kept_for_two_and_not_for_the_third(block, x):
    q, k, v = block(x)
    one = q.square().sum() + k.sum()
    one.backward(retain_graph=True)
    v.square().sum().backward()
    (one * 2.0).backward()


def a_step_of_one_between(block, x):
    q, k, _ = block(x)
    q.square().sum().backward()
    torch.optim.SGD(block.q.parameters(), 0.1).step()
    k.square().sum().backward()


def a_step_of_the_next_between(block, x):
    q, k, _ = block(x)
    q.square().sum().backward()
    with torch.no_grad():
        block.k.lora_B["default"].weight.mul_(2.0)
    k.square().sum().backward()


def a_step_of_the_last_between(block, x):
    q, k, v = block(x)
    q.square().sum().backward()
    with torch.no_grad():
        block.v.lora_A["default"].weight.mul_(2.0)
    k.square().sum().backward()
    v.square().sum().backward()


def a_base_that_changes_between(block, x):
    q, k, _ = block(x)
    q.square().sum().backward()
    block.k.base_layer.weight.mul_(2.0)
    k.square().sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        one_by_one,
        as_they_are_called,
        by_grad,
        one_twice,
        kept_and_once_more,
        kept_for_two_and_not_for_the_third,
        a_step_of_one_between,
        a_step_of_the_next_between,
        a_step_of_the_last_between,
        a_base_that_changes_between,
    ],
)
def test_backward_passes_of_single_outputs(call):
    assert_as_peft(call)


def test_a_group_whose_backward_leaves_outputs_out_is_given_up():
    """It would keep x for them, as long as the loss is there."""
    *_, model = models()
    for _ in range(2):
        q, k, v = model(x := input_of(requires_grad=True))
        loss = q.sum() + k.detach().sum() + v.sum()
        loss.backward()
    assert model.base_model.model.q._siblings.mode == siblings.ALONE
    assert x.grad is not None


@pytest.mark.parametrize("kept", ["mm", "addmm_", "mul", "lora", "nothing"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_selective_checkpointing(kept, p):
    """What it keeps is not changed in place, and a recompute finds it."""

    def policy(context, op, *args, **keys):
        save = kept in str(op)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    *_, model = models(lora_dropout=p)
    found = []
    for context in ({}, {"context_fn": partial(create_selective_checkpoint_contexts, policy)}):
        torch.manual_seed(2)
        x = input_of(requires_grad=True)
        ys = checkpoint(lambda x: model(x.tanh()), x, use_reentrant=False, **context)
        sum(y.square().sum() for y in ys).backward()
        found.append((ys, x.grad, gradients(model)))
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_output_without_a_gradient(create_graph):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    def call(block, x):
        other = torch.ones((), dtype=x.dtype, requires_grad=True)
        (Cut.apply(block(x)[0]).sum() * other).backward(create_graph=create_graph)

    assert_as_peft(call)


@pytest.mark.parametrize("after", [False, True])
def test_hooks_of_a_factor_are_called_for_outputs_that_are_used(after):
    def call(block, x):
        factor, seen = block.k.lora_A["default"].weight, []
        if after:
            factor.register_post_accumulate_grad_hook(lambda factor: seen.append(factor.grad.sum()))
        else:
            factor.register_hook(lambda grad: (seen.append(grad.sum()), grad * 2.0)[1])
        q, _, v = block(x)
        (q.sum() + v.sum()).backward()
        sum(y.sum() for y in block(x)).backward()
        return seen

    assert_as_peft(call)


def test_an_output_of_a_frozen_adapter_has_no_gradient():
    def call(block, x):
        block.q.requires_grad_(False)
        ys = block(x.detach())
        sum(y.sum() for y in ys).backward()
        return [y.requires_grad for y in ys]

    assert_as_peft(call)


def set_data(block, x):
    x.data = x.data * 3.0


def put_base(block, x):
    block.k.base_layer = nn.Linear(8, 4).double().requires_grad_(False)
    for parameter in block.k.base_layer.parameters():
        parameter.fill_(0.5)


def put_adapter(block, x):
    config = LoraConfig(r=2, target_modules=["k"], init_lora_weights=False)
    torch.manual_seed(1)
    block.k.update_layer("other", 2, lora_alpha=4, config=config)
    block.k.double().set_adapter("other")


def changed(what):
    def change(block, x):
        with torch.no_grad():
            what(block.k).mul_(2.0)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda block, x: block.k.scale_layer(3.0),
        lambda block, x: block.k.scaling.update(default=7.0),
        changed(lambda k: k.lora_A["default"].weight),
        changed(lambda k: k.lora_B["default"].weight),
        changed(lambda k: k.base_layer.weight),
        lambda block, x: setattr(block.k.lora_A["default"], "weight", nn.Parameter(torch.ones(3, 8).double())),
        put_base,
        lambda block, x: block.k.requires_grad_(False),
        lambda block, x: block.k.base_layer.register_forward_hook(lambda module, args, y: y * 3.0),
        lambda block, x: block.k.lora_A["default"].register_forward_hook(lambda module, args, y: y * 3.0),
        lambda block, x: block.k.delete_adapter("default"),
        put_adapter,
        set_data,
        lambda block, x: x.unsqueeze_(0),
        lambda block, x: x.detach_().requires_grad_(),
    ],
    ids=["scale", "scaling", "A", "B", "base", "new A", "new base", "frozen", "base hook", "A hook", "deleted", "added",
         "x.data", "x.unsqueeze_", "x.detach_"],
)  # fmt: skip
def test_what_changes_between_two_siblings_is_what_the_second_computes_with(change):
    def call(block, leaf):
        # An x of its own, so that it may be changed in place.
        x = leaf.detach() * 1.0 if change is set_data else leaf * 1.0
        q = block.q(x)
        change(block, x)
        k = block.k(x)
        if k.requires_grad:
            k.square().sum().backward()
        return q.detach(), k.detach(), k.requires_grad

    assert_as_peft(call)


def test_a_hook_on_every_module_that_comes_between_siblings():
    def call(block, x):
        block.q(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: y * 1.5)
        try:
            return block.k(x)
        finally:
            handle.remove()

    assert_as_peft(call)


def test_inference_mode_begins_and_ends_between_siblings():
    def call(block, x):
        x = x.detach()
        with torch.inference_mode():
            block.q(x)
        with torch.no_grad():
            first = block.k(x).add_(1.0)
            block.q(x)
        with torch.inference_mode():
            second = block.k(x)
        return first, second.clone(), second.is_inference()

    assert_as_peft(call)


def test_dropout_has_the_mode_of_its_own_module():
    """Monte Carlo dropout, and a trainer that turns dropout off by module."""

    def drops(layer, x):
        return float((layer(x) - layer(x)).abs().sum()) > 0.0

    for model in models(lora_dropout=0.5):
        x, block = input_of(), model.base_model.model
        modules = [module for module in block.modules() if isinstance(module, nn.Dropout)]
        assert drops(block.q, x)
        [module.eval() for module in modules]
        assert not drops(block.q, x)
        block.eval()
        [module.train() for module in modules]
        assert drops(block.q, x)
        q = block.q(x)
        block.k.lora_dropout.eval()
        torch.testing.assert_close(block.k(x), block.k(x), rtol=0, atol=0)
        assert q.shape == (2, 6)


def test_a_dropout_of_everything():
    def call(block, x):
        ys = block(x)
        sum(y.square().sum() for y in ys).backward()
        return ys

    found = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(Block(), LoraConfig(r=3, target_modules=["q", "k", "v"], lora_dropout=1.0)).double()
        lk.accelerate(model) if accelerated else None
        for _ in range(2):
            model.zero_grad()
            found.append((call(model.base_model.model, x := input_of(requires_grad=True)), x.grad, gradients(model)))
    torch.testing.assert_close(found[2:], found[:2])


def test_another_cuda_stream_takes_no_output(monkeypatch):
    """Without a GPU: x says that it is on one, and the stream is what is asked of torch."""

    class OnGpu(torch.Tensor):
        is_cuda = True

        def get_device(self):
            return 0

    stream = [0]
    monkeypatch.setattr(siblings, "_raw_stream", lambda device: stream[device])
    x = input_of().as_subclass(OnGpu)
    key = siblings._key(x)
    assert siblings._key(x) == key
    stream[0] = 1
    assert siblings._key(x) != key
