"""Every architecture of tests/architectures.py: its scores against one example at a time in float64."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import lorapar
from lorapar.adapter.layers import lora_parameters
from lorapar.scoring.batches import IGNORED
from tests.architectures import ARCHITECTURES, LoopedConfig, LoopedForCausalLM, LoopedModel, make
from tests.lorapar.test_scoring import large_start, naive_sums, sums_of, worst


def adapted(model, task_type="CAUSAL_LM"):
    """Every linear layer of the language model but the head."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not any(part in name for part in ("lm_head", "vis", "router", "shared_expert"))
    ]
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped products take no float64
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type=task_type)
    attached = lorapar.attach(model, settings, start="paper").double()
    large_start(attached)
    return attached


def unequal_rows():
    """Lengths that go together in a padded batch, since less than a twentieth of it is padding."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(2, 250, (length,), generator=generator).tolist() for length in (41, 12, 40, 38, 12)]
    return [{"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]} for ids in made]


ALONE = "one example at a time"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_one_example_at_a_time_in_float64(name, caplog):
    model, examples = adapted(make(name).double()), unequal_rows()
    assert worst(sums_of(model, examples, batch_size=3), naive_sums(model, examples)) < 1e-9
    assert (ALONE in caplog.text) == (name == "looped")


class Variant(LoopedModel):
    """A block that runs once, in a way that is not every model's."""

    layout = "rows first"

    def forward(self, input_ids, **unused):
        x = self.embed_tokens(input_ids)
        turned = self.layout == "tokens first"
        q, k, v = (proj(x.transpose(0, 1) if turned else x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(0, 1)[:, None] if turned else y[:, None] for y in (q, k, v))
        causal = self.layout != "looks ahead"
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)[:, 0]
        if self.layout == "experts":
            chosen = input_ids % 2 == 0
            up = torch.zeros_like(x)
            up[chosen], up[~chosen] = self.up_proj(x[chosen]), self.down_proj(x[~chosen])
        else:
            up = self.down_proj(nn.functional.silu(self.up_proj(x)))
        return BaseModelOutputWithPast(last_hidden_state=x + up)


class VariantForCausalLM(LoopedForCausalLM):
    """`forward` takes the tokens and nothing else."""

    inner = Variant
    has_head = True

    def get_output_embeddings(self):
        return self.lm_head if self.has_head else None

    def forward(self, input_ids):
        hidden = self.model(input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=nn.functional.linear(hidden, self.lm_head.weight))


@pytest.mark.parametrize("layout", ["rows first", "no head", "tokens first", "experts", "looks ahead"])
def test_a_batch_that_cannot_be_told_apart_is_scored_one_example_at_a_time(layout, monkeypatch, caplog):
    monkeypatch.setattr(Variant, "layout", layout)
    monkeypatch.setattr(VariantForCausalLM, "has_head", layout != "no head")
    torch.manual_seed(0)
    model, examples = adapted(VariantForCausalLM(LoopedConfig()).double(), task_type=None), unequal_rows()
    # As many rows as tokens: the shape alone does not tell which come first.
    examples += [{"input_ids": [i + 5, i + 9, i + 7], "labels": [IGNORED, i + 9, i + 7]} for i in range(3)]
    assert worst(sums_of(model, examples, batch_size=3), naive_sums(model, examples)) < 1e-9
    assert (ALONE in caplog.text) == (layout not in ("rows first", "no head"))


def test_a_shared_layer_is_scored_alone_even_where_only_some_rows_run_it_twice(monkeypatch):
    """No look beforehand can show it."""
    once = LoopedModel.forward

    def forward(self, input_ids, **kwargs):
        self.turns = 2 if bool((input_ids == 200).any()) else 1
        return once(self, input_ids, **kwargs)

    monkeypatch.setattr(LoopedModel, "forward", forward)
    model, examples = adapted(make("looped").double()), unequal_rows()
    examples[3]["input_ids"][5] = 200
    assert worst(sums_of(model, examples, batch_size=3), naive_sums(model, examples)) < 1e-9


def test_gradients_that_were_there_before_scoring_are_there_after():
    model = adapted(make("looped").double())
    before = {name: torch.randn_like(parameter) for name, parameter in lora_parameters(model).items()}
    for name, parameter in lora_parameters(model).items():
        parameter.grad = before[name].clone()
    lorapar.score(model, None, unequal_rows())
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in lora_parameters(model).items())
