"""Slices that cancel their twin are left out; layers of 4-bit and 8-bit bases; dropout under checkpointing."""

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

import lorapar
from lorapar.adapter.layers import MaskedLinear, lora_parameters, masked_layers
from lorapar.adapter.proof import Snapshot, verify
from lorapar.partitioning.partition import Partition
from lorapar_kernels import siblings
from tests.lorapar.test_scoring import large_start, naive_sums, sums_of, worst
from tests.tiny import TARGETS, tiny_model

TOKENS = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(0))


def config(**keys):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=TARGETS) | keys))


def rank_partition(model, slices):
    """The slices given are active in both stages, in every layer."""
    masks = {}
    for name, parameter in lora_parameters(model).items():
        mask = torch.zeros(parameter.shape, dtype=torch.bool)
        if ".lora_A." in name:
            mask[slices] = True
        else:
            mask[:, slices] = True
        masks[name] = mask
    return Partition({kind: masks for kind in ("s1", "s2", "sft", "grpo")}, {"theta": 0.9, "rank": 4})


def loss_of(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in lora_parameters(model).items()}


def ranks_seen(monkeypatch):
    """The rank of every product that the layers ask for."""
    seen = []
    inner = siblings.lora_layers
    ranks = lambda layers: [layer.lora_a.shape[0] for layer in layers]  # noqa: E731
    monkeypatch.setattr(siblings, "lora_layers", lambda x, of, p: (seen.extend(ranks(of)), inner(x, of, p))[1])
    return seen


def test_slices_that_cancel_are_left_out_of_every_product(monkeypatch):
    model = lorapar.attach(tiny_model(), config(), start="twin")
    lorapar.activate(model, rank_partition(model, [1, 3]), "sft")
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            rows = parameter if ".lora_A." in name else parameter.t()
            rows[[1, 3]] += 0.02 * torch.randn_like(rows[[1, 3]])
    seen = ranks_seen(monkeypatch)
    loss, ours = gradients(model)
    assert set(seen) == {4}
    for layer in masked_layers(model).values():
        assert layer.live_ranks.tolist() == [1, 3, 5, 7]
        layer.live_ranks = None
    whole_loss, whole = gradients(model)
    assert set(seen) == {4, 8}
    torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_layer_without_an_active_slice_is_its_base(monkeypatch):
    model = lorapar.attach(tiny_model(), config(), start="twin")
    partition = rank_partition(model, [0])
    first = next(iter(masked_layers(model)))
    for masks in partition.masks.values():
        for name, mask in masks.items():
            if name.startswith(first + "."):
                mask.zero_()
    lorapar.activate(model, partition, "grpo")
    layer = masked_layers(model)[first]
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert layer.live_ranks.numel() == 0


def test_a_slice_that_a_stage_moved_is_computed_with_in_the_next():
    model = lorapar.attach(tiny_model(), config(), start="twin")
    lorapar.activate(model, rank_partition(model, [0]), "sft")
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.factors("default")[0][0] += 1.0
    lorapar.activate(model, rank_partition(model, [2]), "grpo")
    assert all(layer.live_ranks.tolist() == [0, 2, 4, 6] for layer in masked_layers(model).values())


def test_loading_other_values_forgets_what_was_left_out():
    model = lorapar.attach(tiny_model(), config(), start="twin")
    lorapar.activate(model, rank_partition(model, [0]), "sft")
    state = {name: tensor + 0.1 for name, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    assert all(layer.live_ranks is None for layer in masked_layers(model).values())


def test_element_partition_and_paper_start_leave_nothing_out():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    lorapar.activate(model, rank_partition(model, [0]), "sft")
    assert all(layer.live_ranks is None for layer in masked_layers(model).values())


def test_dropout_is_the_same_at_recompute():
    model = lorapar.attach(tiny_model(), config(lora_dropout=0.3), start="paper").train()
    lorapar.activate(model, rank_partition(model, [0, 1, 2, 3]), "sft")
    gradients(model)  # from the second step on, layers of one input are computed together
    torch.manual_seed(5)
    plain_loss, plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss, recomputed = gradients(model)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


bnb_missing = importlib.util.find_spec("bitsandbytes") is None
needs_bnb = pytest.mark.skipif(bnb_missing, reason="bitsandbytes is not installed (pip install 'lorapar[bnb]')")


def quantised(model, kind):
    """The tiny model with every target replaced by bitsandbytes' layer of its weight."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name == "lm_head":
                continue
            shape = child.in_features, child.out_features
            if kind == "nf4":
                made = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, made.to("cpu"))
    return model.requires_grad_(False)


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("start", ["twin", "pissa"])
def test_a_quantised_base_is_trained_and_never_written(kind, start):
    from lorapar.adapter.layers_bnb import LAYERS

    base = quantised(tiny_model(), kind)
    with torch.no_grad():
        expected = base(input_ids=TOKENS).logits
    model = lorapar.attach(base, config(), start=start)
    assert all(type(layer) in LAYERS.values() for layer in masked_layers(model).values())
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    # A twin cancels in exact arithmetic; LLM.int8() rounds what a layer is given, so the last bits of one show later.
    bounds = dict(rtol=1e-4, atol=1e-5) if kind == "nf4" else dict(rtol=0.1, atol=0.05)
    torch.testing.assert_close(logits, expected, **bounds)
    partition = rank_partition(model, [0, 2])
    lorapar.activate(model, partition, "sft")
    before = Snapshot.take(model)
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2, weight_decay=0.1)
    first = float(loss_of(model))
    for _ in range(5):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss_of(model)) < first
    counted = verify(model, before, partition, "sft")
    assert counted["moved"] > 0
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, expected)


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_layer_equals_peft_s(kind):
    base = quantised(tiny_model(), kind)
    model = lorapar.attach(copy.deepcopy(base), config(), start="paper")
    plain = PeftModel(copy.deepcopy(base), config())
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not any(isinstance(module, MaskedLinear) for module in plain.modules())
    model.train()
    plain.train()
    loss, ours = gradients(model)
    theirs_loss = loss_of(plain)
    theirs_loss.backward()
    torch.testing.assert_close(loss, theirs_loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in plain.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_a_quantised_base_and_back_gives_the_very_base(kind):
    model = lorapar.attach(quantised(tiny_model(), kind), config(), start="twin")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(input_ids=TOKENS).logits
        model.merge_adapter()
        assert not torch.equal(model(input_ids=TOKENS).logits, expected)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=TOKENS).logits, expected)


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_scored_as_one_example_at_a_time(kind):
    """Each sum against a backward an example through the layers as they train."""
    model = lorapar.attach(quantised(tiny_model(), kind), config(), start="paper")
    large_start(model)
    rows = [{"input_ids": TOKENS[i, : 8 + 3 * i].tolist(), "labels": TOKENS[i, : 8 + 3 * i].tolist()} for i in range(2)]
    expected = naive_sums(model, rows)
    for batch_size in (1, 2):
        assert worst(sums_of(model, rows, batch_size=batch_size), expected) < 1e-5


class InPlace(nn.Module):
    """Changes what its layers return, as DeBERTa does: `q /= scale`."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        y = self.up(x)
        y *= 2.0
        z = self.down(y.clone()).transpose(-1, -2)
        z /= 3.0
        return z


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8)])
def test_what_a_layer_returns_can_be_changed_in_place(shape):
    x = torch.linspace(-1, 1, 2 * 8 * (3 if len(shape) == 3 else 1)).view(shape)
    torch.manual_seed(0)
    ours = lorapar.attach(InPlace(), config(target_modules=["up", "down"]), start="paper")
    large_start(ours)
    ours(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(ours).values())
    scores = lorapar.score(ours, None, [x], loss=lambda model, row: model(row).square().sum())
    for name, parameter in lora_parameters(ours).items():
        gphi = parameter.grad.double() * parameter.detach()
        torch.testing.assert_close(scores[name].double(), (gphi - 0.5 * gphi.square()).abs(), rtol=1e-4, atol=1e-7)
