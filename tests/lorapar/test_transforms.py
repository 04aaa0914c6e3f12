"""torch.func's transforms, a trace and an export of a model: our LoRA layers give what PEFT's give."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lorapar

# Of the arguments' checks, which a trace leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.o = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        # q and v are given one tensor, as in attention.
        return self.o(torch.tanh(self.q(x) * self.v(x)))


def model_of(make, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = make(Model().double(), LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q", "v", "o"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    # What is learned over the first calls is there.
    for _ in range(2):
        model(X).sum().backward()
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def stacked(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.stack([p, 2.0 * p, p - 1.0]) for name, p in trained(model).items()}


def call(model):
    return lambda parameters, x: functional_call(model, parameters, (x,))


def loss(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).pow(2).sum()


def batched_gradients(model: nn.Module):
    y = model(X)
    parameters = [p for p in model.parameters() if p.requires_grad]
    eye = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, parameters, eye, is_grads_batched=True)


def traced(model: nn.Module):
    return torch.jit.trace(model.eval(), (X,))(X + 1.0)


CASES = {
    "functional_call": lambda m: call(m)(trained(m), X),
    "grad": lambda m: grad(loss(m), argnums=(0, 1))(trained(m), X),
    "vmap": lambda m: vmap(call(m), in_dims=(None, 1))(trained(m), torch.stack([X, X + 1.0], 1)),
    "gradients of each example": lambda m: vmap(grad(loss(m)), in_dims=(None, 0))(trained(m), X),
    "gradient of a vmap": lambda m: grad(lambda p: vmap(loss(m), in_dims=(None, 0))(p, X).sum())(trained(m)),
    "an ensemble of adapters": lambda m: vmap(call(m), in_dims=(0, None))(stacked(m), X),
    "jvp": lambda m: jvp(lambda p: call(m)(p, X), (trained(m),), ({n: p + 1.0 for n, p in trained(m).items()},)),
    "jacobians": lambda m: [jac(lambda p: call(m)(p, X))(trained(m)) for jac in (jacrev, jacfwd)],
    "hessian": lambda m: hessian(lambda x: loss(m)(trained(m), x))(X),
    "is_grads_batched": batched_gradients,
    "jit.trace of a layer": lambda m: traced(m.base_model.model.q),
    "jit.trace": traced,
    "export": lambda m: torch.export.export(m.eval(), (X,)).module()(X + 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_as_peft(name):
    ours, theirs = (
        torch.utils._pytree.tree_leaves(CASES[name](model_of(make))) for make in (lorapar.attach, get_peft_model)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_dropout_in_a_vmap_is_drawn_as_it_says():
    model, rows = model_of(lorapar.attach, dropout=0.5), X[:1].expand(8, -1)
    same = vmap(lambda row: model(row), randomness="same")(rows)
    different = vmap(lambda row: model(row), randomness="different")(rows)
    assert len(same.unique(dim=0)) == 1
    assert len(different.unique(dim=0)) > 1
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda row: model(row))(rows)
    # The gradient is of the mask that the forward drew.
    torch.manual_seed(1)
    got = grad(loss(model))(trained(model), X)
    torch.manual_seed(1)
    model.zero_grad()
    model(X).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_a_trace_with_dropout_is_refused():
    with pytest.raises(RuntimeError, match=r"a LoRA layer with dropout cannot be traced; call model\.eval\(\) first"):
        torch.jit.trace(model_of(lorapar.attach, dropout=0.5), (X,))
