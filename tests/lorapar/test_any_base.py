"""A base that is not exactly an nn.Linear is called as PEFT calls it: its own forward, an inner adapter, hooks."""

import copy
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import lorapar
import lorapar_kernels as lk
from lorapar.adapter.attach import _register
from lorapar.adapter.layers import MaskedLinear, masked_layers
from lorapar.adapter.merging import merged_parameters
from lorapar.errors import InputError
from lorapar_kernels import siblings
from tests.tiny import tiny_model

TOKENS = torch.arange(2, 22)[None]
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


class Tripled(nn.Linear):
    def forward(self, x, scale=3.0):
        return super().forward(x) * scale


class Codes(torch.Tensor):
    """A tensor class of its own, as quantised weights are: what it holds is not what it multiplies by."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear:
                return func(args[0], args[1] * 0.5, *args[2:])
            return func(*args, **(kwargs or {}))


class Transposed(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Mlp(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = make(16, 24), make(24, 16)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def quantised(*shape):
    made = nn.Linear(*shape)
    made._parameters["weight"] = made.weight.data.as_subclass(Codes)
    return made


def pruned(*shape):
    return prune.random_unstructured(nn.Linear(*shape), "weight", 0.5)


BASES = {
    "subclass": Tripled,
    "transposed": Transposed,
    "quantised": quantised,
    "parametrized": lambda *shape: parametrizations.weight_norm(nn.Linear(*shape)),
    "weight_norm": lambda *shape: warned(nn.utils.weight_norm, nn.Linear(*shape)),
    "spectral_norm": lambda *shape: nn.utils.spectral_norm(nn.Linear(*shape)).eval(),
    "pruned": pruned,
    "plain": nn.Linear,
}


def warned(make, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


def config(**keys):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False) | keys))


def both(make, **keys):
    """A network of `make`'s layers under PEFT's layers and under ours, with the same factors."""
    theirs, ours, model = config(**keys), config(**keys), Mlp(make)
    _register(ours, model)
    plain, masked = get_peft_model(Mlp(make), theirs), get_peft_model(model, ours)
    masked.load_state_dict(plain.state_dict())
    assert len(masked_layers(masked)) == 2
    return plain.train(), masked.train()


def results(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(theirs, ours):
    for one, other in zip(theirs[:2], ours[:2]):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert theirs[2].keys() == ours[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_a_base_of_any_kind_gives_what_peft_s_layer_gives(kind, monkeypatch):
    fused = []
    inner = siblings.lora_layers
    monkeypatch.setattr(siblings, "lora_layers", lambda *rest: (fused.append(1), inner(*rest))[1])
    theirs, ours = both(BASES[kind])
    assert_same(results(theirs, X), results(ours, X))
    assert bool(fused) == (kind == "plain")


@pytest.mark.parametrize("kind", ["subclass", "transposed", "quantised", "parametrized"])
def test_a_scoring_pass_goes_through_the_base_too(kind):
    model = both(BASES[kind])[1]
    x, offsets = X.clone().requires_grad_(), torch.tensor([0, 5, 10, 15])
    layers = masked_layers(model)
    with torch.no_grad():
        expected = model(x)
    for layer in layers.values():
        layer.scoring, layer.offsets = lk.ScoreSums.zeros_like(*layer.factors("default")[:2]), offsets
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    scored = x.grad
    for layer in layers.values():
        assert bool(layer.scoring.a_gphi.any())
        layer.scoring = None
    torch.testing.assert_close(scored, results(model, X)[1], rtol=1e-4, atol=1e-4)


def test_what_is_no_product_of_its_weight_is_not_merged_or_started_from():
    for kind in ("subclass", "parametrized", "weight_norm", "pruned"):
        model = both(BASES[kind])[1]
        before = model(X)
        for attempt in (model.merge_adapter, lambda model=model: list(merged_parameters(model))):
            with pytest.raises(InputError, match="of its own; an adapter can be trained on it, but not merged"):
                attempt()
        assert torch.equal(model(X), before)
    with pytest.raises(InputError, match="of its own"):
        lorapar.attach(Mlp(Tripled), config(init_lora_weights=True), start="pissa")


def test_a_forward_put_on_the_instance_is_not_merged_away():
    model = both(nn.Linear)[1]
    base = model.base_model.model.up.base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) * 2
    before = model(X)
    with pytest.raises(InputError, match="a forward of its own"):
        model.merge_adapter()
    assert torch.equal(model(X), before)


def test_a_layer_that_accelerate_hooked_is_merged():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = both(nn.Linear)[1]
    base, expected = model.base_model.model.up.base_layer, model(X)
    add_hook_to_module(base, ModelHook())
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        remove_hook_from_module(base)


def test_a_merge_that_failed_leaves_nothing_to_unmerge():
    model = both(nn.Linear)[1]
    layer = model.base_model.model.up
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs"):
        layer.merge(safe_merge=True)
    layer.base_layer.weight.data = torch.ones(24, 16)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert bool((layer.base_layer.weight == 1).all())


def test_bitnet_s_linear_keeps_its_forward_under_a_twin_start():
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    base = tiny_model()
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = bitnet.AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            new.weight = module.weight
            base.set_submodule(name, new)
    with torch.no_grad():
        expected = base(TOKENS).logits
        model = lorapar.attach(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), start="twin")
        # A twin cancels in exact arithmetic; BitNet rounds what a layer is given, so last bits of one show later.
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_an_inner_adapter_of_a_mixed_model_is_kept():
    outputs = []
    for register in (False, True):
        torch.manual_seed(1)
        inner = LoHaConfig(target_modules=["up"], init_weights=False)
        model = get_peft_model(Mlp(nn.Linear), inner, adapter_name="inner", mixed=True)
        before = model(X)
        outer = config(target_modules=["up"])
        if register:
            outer._register_custom_module({nn.Linear: MaskedLinear})
        model.add_adapter("default", outer)
        model.set_adapter(["inner", "default"])
        if register:
            assert isinstance(model.base_model.model.up, MaskedLinear)
        outputs.append(model(X))
        assert not torch.allclose(outputs[-1], before)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    # Merging and unmerging take the inner one along.
    merged = model.base_model
    merged.merge_adapter()
    torch.testing.assert_close(model(X), outputs[1], rtol=1e-4, atol=1e-5)
    merged.unmerge_adapter()
    torch.testing.assert_close(model(X), outputs[1], rtol=1e-4, atol=1e-5)


def test_an_adapter_around_ours_is_unmerged_with_it():
    torch.manual_seed(1)
    ours = config(target_modules=["up"])
    ours._register_custom_module({nn.Linear: MaskedLinear})
    model = get_peft_model(Mlp(nn.Linear), ours, adapter_name="default", mixed=True)
    model.add_adapter("around", LoHaConfig(target_modules=["up"], init_weights=False))
    model.set_adapter(["around", "default"])
    expected = model(X)
    for _ in range(2):
        model.base_model.merge_adapter()
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        model.base_model.unmerge_adapter()
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


HOOKS = {
    "forward": lambda module, note: module.register_forward_hook(lambda m, i, o: note() or o * 2),
    "forward with kwargs": lambda module, note: module.register_forward_hook(
        lambda m, i, k, o: note() or o * 2, with_kwargs=True
    ),
    "forward_pre": lambda module, note: module.register_forward_pre_hook(lambda m, i: note() or (i[0] * 2,)),
    "backward": lambda module, note: module.register_full_backward_hook(lambda m, i, o: note() or (i[0] * 2,)),
    "backward_pre": lambda module, note: module.register_full_backward_pre_hook(lambda m, o: note() or (o[0] * 2,)),
    "global": lambda module, note: nn.modules.module.register_module_forward_hook(
        lambda m, i, o: (note(), o * 2)[1] if m is module else None
    ),
    "instance": lambda module, note: setattr(
        module, "forward", lambda x: (note(), nn.Linear.forward(module, x) * 2)[1]
    ),
}


PARTS = ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
# The instance's forward above is an nn.Linear's.
HOOKED = [(kind, part) for kind in HOOKS for part in PARTS if (kind, part) != ("instance", "lora_dropout.default")]


@pytest.mark.parametrize(("kind", "part"), HOOKED)
def test_hooks_run_and_change_what_they_change_in_peft_s_layer(kind, part):
    theirs, ours = both(nn.Linear)
    found = []
    for model in (theirs, ours):
        seen = []
        handle = HOOKS[kind](model.get_submodule(f"base_model.model.up.{part}"), lambda seen=seen: seen.append(1))
        given = results(model, X)
        found.append((len(seen), given))
        if handle is not None:
            handle.remove()
    assert found[0][0] == found[1][0] == 1
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("owner", [nn.Linear, nn.functional])
def test_a_forward_put_in_the_place_of_torch_s_own_is_called(owner, monkeypatch):
    theirs, ours = both(nn.Linear)
    name = "forward" if owner is nn.Linear else "linear"
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: inner(*arguments) * 2)
    assert_same(results(theirs, X), results(ours, X))


def test_masks_hold_beside_hooks_on_the_factors():
    model = both(nn.Linear)[1]
    layer = masked_layers(model)["base_model.model.up"]
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.register_forward_hook(lambda *_: None)
    a, b, _ = layer.factors("default")
    mask_a, mask_b = torch.rand_like(a) < 0.5, torch.rand_like(b) < 0.5
    whole = results(model, X)[2]
    layer.activate(mask_a, mask_b)
    masked = results(model, X)[2]
    for side, mask in (("A", mask_a), ("B", mask_b)):
        name = f"base_model.model.up.lora_{side}.default.weight"
        torch.testing.assert_close(masked[name], whole[name] * mask, rtol=1e-5, atol=1e-6)


def test_dropout_is_the_same_whichever_way_computes_it():
    model = both(nn.Linear, lora_dropout=0.4)[1]
    fused = results_from(model, 5)
    handles = [layer.base_layer.register_forward_hook(lambda *_: None) for layer in masked_layers(model).values()]
    assert_same(fused, results_from(model, 5))
    handles += [
        layer.lora_A["default"].register_forward_hook(lambda *_: None) for layer in masked_layers(model).values()
    ]
    assert_same(fused, results_from(model, 5))
    for handle in handles:
        handle.remove()
    assert torch.equal(results_from(model, 5)[0], fused[0])


def results_from(model, seed):
    torch.manual_seed(seed)
    return results(model, X)


def test_an_offloaded_model_computes_what_it_did():
    from accelerate import cpu_offload

    base = tiny_model()
    keys = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        expected = base(TOKENS).logits
        model = lorapar.attach(copy.deepcopy(base), keys, start="paper")
        adapted = model(TOKENS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.is_meta
        torch.testing.assert_close(model(TOKENS).logits, adapted, rtol=1e-5, atol=1e-5)
        cpu_offload(base, execution_device=torch.device("cpu"))
        model = lorapar.attach(base, keys, start="twin")
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_base_that_is_trained_too_gets_its_gradient(which):
    pair = both(nn.Linear)
    for model in pair:
        for layer in (model.base_model.model.up, model.base_model.model.down):
            getattr(layer.base_layer, which).requires_grad_()
    theirs, ours = (results(model, X) for model in pair)
    assert any(name.endswith(f"base_layer.{which}") for name in ours[2])
    assert_same(theirs, ours)


def test_keywords_reach_the_base_and_unknown_ones_are_refused_by_it():
    plain, masked = both(Tripled)
    layers = [model.base_model.model.up for model in (plain, masked)]
    one, other = (layer(X, scale=0.5) for layer in layers)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(layers[1](X, adapter_names=None), layers[1](X))
    for layer in (model.base_model.model.up for model in both(nn.Linear)):
        with pytest.raises(TypeError, match="scale"):
            layer(X, scale=0.5)


@pytest.mark.parametrize(
    "keys", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.0, "use_rslora": True}], ids=str
)
def test_a_second_adapter_of_another_kind_computes_as_peft_s(keys):
    pair = both(nn.Linear)
    for model in pair:
        torch.manual_seed(4)
        model.add_adapter("other", config(**keys))
        model.base_model.set_adapter(["default", "other"])
    assert_same(*(results(model, X) for model in pair))


def test_narrower_factors_than_x_are_taken_as_peft_takes_them():
    pair = both(nn.Linear)
    for model in pair:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    theirs, ours = (results(model, X) for model in pair)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.05, atol=0.05)
    assert all(gradient.dtype == torch.bfloat16 for gradient in ours[2].values())


@pytest.mark.parametrize("start", ["paper", "peft"])
def test_fan_in_fan_out_is_set_to_false_as_peft_does(start):
    given = config(init_lora_weights=True, fan_in_fan_out=True, target_modules=["up", "down"])
    with pytest.warns(UserWarning, match=r"lora.fan_in_fan_out: set to false"):
        model = lorapar.attach(Mlp(nn.Linear), given, start=start)
    assert given.fan_in_fan_out
    assert not model.peft_config["default"].fan_in_fan_out
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        expected = model(X)
        assert not torch.allclose(expected, Mlp(nn.Linear)(X), atol=0.1)
        torch.testing.assert_close(model.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-4)


def test_a_replica_s_tensors_are_no_parameters_and_fused_all_the_same(monkeypatch):
    model = both(nn.Linear)[1]
    layer = masked_layers(model)["base_model.model.up"]
    a, b, _ = layer.factors("default")
    layer.activate(torch.rand_like(a) < 0.5, torch.rand_like(b) < 0.5)
    expected = model(X)
    # As torch.nn.parallel.replicate leaves them.
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for name in list(module._parameters):
            tensor = module._parameters.pop(name)
            setattr(module, name, None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad))
    fused = []
    inner = siblings.lora_layers
    monkeypatch.setattr(siblings, "lora_layers", lambda *rest: (fused.append(1), inner(*rest))[1])
    assert torch.equal(model(X), expected)
    assert len(fused) == 2


def test_gpt2_s_conv1d_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"lora.target_modules: .*c_attn is a Conv1D; only nn.Linear"):
        lorapar.attach(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def test_a_layer_of_peft_s_own_is_named_as_such():
    model = get_peft_model(Mlp(nn.Linear), config())
    assert isinstance(model, PeftModel)
    with pytest.raises(InputError, match=r"up has a LoRA layer of PEFT's own; attach the adapter with lorapar.attach"):
        masked_layers(model)


def test_an_adapter_of_another_kind_is_named_as_such():
    for other in (LoHaConfig(target_modules=["up"]), AdaLoraConfig(target_modules=["up"], total_step=9)):
        with pytest.raises(InputError, match=rf"lora: the adapter must be a LoraConfig, got {type(other).__name__}"):
            lorapar.attach(Mlp(nn.Linear), other)
    with pytest.raises(InputError, match="up has an adapter of another kind, loha"):
        masked_layers(get_peft_model(Mlp(nn.Linear), LoHaConfig(target_modules=["up"])))


@pytest.mark.parametrize("masked", [False, True])
def test_a_whole_layer_compiles_as_one_graph(masked):
    model = both(nn.Linear)[1]
    if masked:
        for layer in masked_layers(model).values():
            a, b, _ = layer.factors("default")
            layer.activate(torch.rand_like(a) < 0.5, torch.rand_like(b) < 0.5)
    compiled = torch.compile(model.base_model.model.up, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model.base_model.model.up(X))


def test_a_layer_is_traced_and_exported():
    model = both(nn.Linear)[1].base_model.model
    expected = model(X)
    traced = warned(lambda: torch.jit.trace(model, (X,), check_trace=False))
    torch.testing.assert_close(traced(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected, rtol=1e-5, atol=1e-5)


def test_merging_takes_the_bias_along_and_gives_it_back():
    model = both(nn.Linear)[1]
    model.add_adapter("other", config(lora_bias=True))
    model.base_model.set_adapter("other")
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.lora_B["other"].bias.normal_()
        expected, bias = model(X), model.base_model.model.up.base_layer.bias.clone()
        model.merge_adapter()
        assert not torch.equal(model.base_model.model.up.base_layer.bias, bias)
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.up.base_layer.bias, bias)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_a_variant_s_output_keeps_the_base_s_dtype():
    pair = both(lambda *shape: nn.Linear(*shape).to(torch.bfloat16))
    for model in pair:
        torch.manual_seed(4)
        model.add_adapter("other", config(use_dora=True))
        model.base_model.set_adapter("other")
    theirs, ours = (model(X.bfloat16()) for model in pair)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_a_layer_s_output_can_be_changed_in_place():
    for model in both(nn.Linear):
        y = model.base_model.model.up(X.clone().requires_grad_())
        y.mul_(2).sum().backward()


def test_forward_mode_derivatives_are_peft_s():
    found = []
    for model in both(nn.Linear):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(X, X + 1))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_several_gradients_at_once_are_those_of_each():
    model = both(nn.Linear, lora_dropout=0.3)[1]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    y = model(X)
    dys = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(2))
    at_once = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        each = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for one, several in zip(each, at_once):
            torch.testing.assert_close(several[i], one, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_torch_func_compiles():
    model = both(nn.Linear)[1]
    gradient = torch.func.grad(lambda x: model(x).square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(X), gradient(X), rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func_go_through_the_layer_as_through_peft_s():
    found = []
    for model in both(nn.Linear):
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        found.append(torch.vmap(torch.func.grad(loss), (None, 0))(trained, X))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
