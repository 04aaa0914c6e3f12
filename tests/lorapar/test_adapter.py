"""Attaching, starts, masks on a model, PEFT's own machinery, and the proof that nothing else changed."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import lorapar
from lorapar.adapter.attach import MaskedLinear, load_adapter, save_adapter
from lorapar.adapter.layers import lora_parameters, masked_layers
from lorapar.adapter.proof import FrozenElementsChanged, Snapshot, verify
from lorapar.errors import InputError
from lorapar.partitioning.partition import Partition
from tests.tiny import TARGETS, tiny_model

TOKENS = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(0))
STARTS = ["paper", "twin", "pissa", "olora", "peft"]


def config(**keys):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=TARGETS) | keys))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def random_partition(model, share=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = lora_parameters(model)
    masks = {n: torch.rand(p.shape, generator=generator) < share for n, p in parameters.items()}
    return Partition({kind: masks for kind in ("s1", "s2", "sft", "grpo")}, {"theta": 0.9, "rank": None})


@pytest.mark.parametrize("start", STARTS)
def test_start_never_writes_the_base(start):
    base = tiny_model()
    before = copy.deepcopy(base.state_dict())
    expected = logits(base)
    model = lorapar.attach(base, config(), start=start)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[key]), name
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("start", ["twin", "pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_twin_starts_leave_the_function_the_base_s(start, use_rslora):
    base = tiny_model()
    expected = logits(base)
    model = lorapar.attach(base, config(use_rslora=use_rslora), start=start)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    for layer in masked_layers(model).values():
        a, b, scaling = layer.factors("default")
        assert a.shape[0] == b.shape[1] == 8
        assert layer.trainable_rank == 4
        assert scaling == pytest.approx(8 / 4**0.5 if use_rslora else 2.0)
        assert a.abs().sum() > 0
        assert torch.equal(a[:4], a[4:])
        assert torch.equal(b[:, :4], -b[:, 4:])


def test_paper_start_is_the_paper_s_and_shifts_the_base():
    base = tiny_model()
    expected = logits(base)
    model = lorapar.attach(base, config(r=32, lora_alpha=256), start="paper")
    values = torch.cat([p.detach().reshape(-1) for p in lora_parameters(model).values()])
    assert values.std().item() == pytest.approx(0.01, rel=0.05)
    assert not torch.allclose(logits(model), expected, atol=1e-6)


def test_pissa_start_is_the_best_rank_r_approximation():
    model = lorapar.attach(tiny_model(), config(), start="pissa")
    layer = next(iter(masked_layers(model).values()))
    a, b, scaling = layer.factors("default")
    weight = layer.get_base_layer().weight.detach()
    u, sigma, vh = torch.linalg.svd(weight)
    best = u[:, :4] * sigma[:4] @ vh[:4]
    torch.testing.assert_close(scaling * (b[:, :4] @ a[:4]).detach(), best, rtol=1e-4, atol=1e-5)


def test_olora_start_is_the_first_columns_of_q_and_rows_of_r():
    model = lorapar.attach(tiny_model(), config(), start="olora")
    for layer in masked_layers(model).values():
        a, b, _ = layer.factors("default")
        a, b = a[:4].detach(), b[:, :4].detach()
        weight = layer.get_base_layer().weight.detach()
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=1e-4, atol=1e-5)
        # Q's first r columns are a basis of W's first r, of which R's first r rows are the coordinates.
        torch.testing.assert_close(b @ a[:, :4], weight[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, b.T @ weight, rtol=1e-4, atol=1e-5)


def test_same_seed_same_start():
    one, two, three = (lorapar.attach(tiny_model(), config(), start="twin", seed=s) for s in (0, 0, 1))
    pairs = list(zip(*(lora_parameters(m).values() for m in (one, two, three))))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("start", STARTS)
def test_saved_folder_loads_with_plain_peft(start, tiny_folder, tmp_path):
    model = lorapar.attach(AutoModelForCausalLM.from_pretrained(tiny_folder), config(), start=start)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, tmp_path / "a", start=start)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a")
    assert not any(isinstance(m, MaskedLinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a")
    assert torch.equal(logits(ours), logits(model))
    assert next(iter(masked_layers(ours).values())).trainable_rank == 4
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_give_the_base_back_bit_for_bit(dtype):
    model = lorapar.attach(tiny_model().to(dtype), config(r=4, lora_alpha=64), start="paper")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    unmerged = logits(model)
    for _ in range(3):
        model.merge_adapter()
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), unmerged)


def test_gradients_are_masked_and_the_forward_is_not():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    free = logits(model)
    made = random_partition(model)
    lorapar.activate(model, made, "sft")
    assert torch.equal(logits(model), free)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in lora_parameters(model).items():
        mask = made.active("sft")[name]
        assert torch.equal(parameter.grad[~mask], torch.zeros(int((~mask).sum())))
        assert parameter.grad[mask].abs().sum() > 0


def test_dropout_repeats_under_gradient_checkpointing():
    norms = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lorapar.attach(tiny_model(), config(lora_dropout=0.3), start="paper")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in lora_parameters(model).values()]))
    torch.testing.assert_close(*norms)


def test_dropout_comes_back_with_the_adapter(tmp_path):
    """A stage trains with the p of the start that it loads."""
    save_adapter(lorapar.attach(tiny_model(), config(lora_dropout=0.3), start="twin"), tmp_path / "a")
    back = load_adapter(tiny_model(), tmp_path / "a")
    assert {layer.lora_dropout["default"].p for layer in masked_layers(back).values()} == {0.3}


def test_another_adapter_is_not_masked_and_switching_works():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    lorapar.activate(model, random_partition(model), "sft")
    ours = logits(model)
    model.add_adapter("ref", config())
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), ours)
    model.set_adapter("default")
    assert torch.equal(logits(model), ours)


def test_verify_finds_one_changed_bit_anywhere():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    made = random_partition(model)
    lorapar.activate(model, made, "sft")
    before = Snapshot.take(model)
    with pytest.raises(FrozenElementsChanged, match="not one of"):
        verify(model, before, made, "sft")
    name, parameter = next(iter(lora_parameters(model).items()))
    mask = made.active("sft")[name]
    with torch.no_grad():
        parameter[mask] += 1
    assert verify(model, before, made, "sft")["moved"] == int(mask.sum())
    inactive = tuple((~mask).nonzero()[0].tolist())
    with torch.no_grad():
        parameter[inactive] = -parameter[inactive]
    with pytest.raises(FrozenElementsChanged, match=f"1 inactive elements of {name}"):
        verify(model, before, made, "sft")
    with torch.no_grad():
        parameter[inactive] = -parameter[inactive]
        model.get_base_model().model.embed_tokens.weight[3, 1].neg_()
    with pytest.raises(FrozenElementsChanged, match="embed_tokens.weight of the frozen base changed"):
        verify(model, before, made, "sft")


def test_a_negative_zero_is_a_change():
    model = lorapar.attach(tiny_model(), config(), start="peft")
    made = random_partition(model)
    before = Snapshot.take(model)
    name = next(n for n in lora_parameters(model) if "lora_B" in n)
    inactive = tuple((~made.active("sft")[name]).nonzero()[0].tolist())
    with torch.no_grad():
        lora_parameters(model)[name][inactive] = -0.0
    with pytest.raises(FrozenElementsChanged, match="1 inactive"):
        verify(model, before, made, "sft")


def test_a_partition_that_does_not_fit_is_named():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    made = random_partition(lorapar.attach(tiny_model(), config(r=5), start="paper"))
    with pytest.raises(InputError, match=r"q_proj.lora_A.default.weight is \[5, 64\] there, \[4, 64\] in the model"):
        lorapar.activate(model, made, "sft")


def test_a_stage_with_nothing_active_is_refused():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with pytest.raises(InputError, match="no element is active in sft"):
        lorapar.activate(model, random_partition(model, share=0.0), "sft")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(target_modules=["q_porj"]), "lora.target_modules: got .*q_porj"),
        (dict(target_modules=["q_proj", "lm_head"]), "lm_head is the output head"),
        (dict(target_modules=["embed_tokens"]), "embed_tokens is a Embedding; only nn.Linear"),
        (dict(use_dora=True), "lora.use_dora: not supported"),
        (dict(lora_bias=True), "lora.lora_bias: not supported"),
        (dict(modules_to_save=["lm_head"]), "lora.modules_to_save: not supported"),
        (dict(bias="all"), "lora.bias: got 'all'"),
        (dict(use_qalora=True), "lora.use_qalora: not supported"),
        (dict(alora_invocation_tokens=[3]), "lora.alora_invocation_tokens: not supported"),
        (dict(layer_replication=[(0, 1)]), "lora.layer_replication: not supported"),
    ],
)
def test_what_our_layers_do_not_have_is_refused_by_name(keys, message):
    with pytest.raises(InputError, match=message):
        lorapar.attach(tiny_model(), config(**keys), start="paper")


def test_a_start_that_writes_the_base_is_refused():
    with pytest.raises(InputError, match="use start: pissa or olora"):
        lorapar.attach(tiny_model(), config(init_lora_weights="pissa"), start="peft")


def test_rank_above_the_singular_values_is_refused():
    with pytest.raises(InputError, match="lora.r: got 64"):
        lorapar.attach(tiny_model(), config(r=64), start="pissa")


def test_layers_replace_only_linear_targets():
    model = lorapar.attach(tiny_model(), config(target_modules=["q_proj"]), start="paper")
    assert len(masked_layers(model)) == 2
    assert sum(isinstance(m, nn.Linear) and not isinstance(m, MaskedLinear) for m in model.modules()) > 2
