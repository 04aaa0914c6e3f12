"""The head on answers alone, a number of tokens at a time: against TRL's, against float64, and what it leaves out."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import add_fused_lm_head

from lorapar.errors import InputError
from lorapar.training.answer_head import AnswerLogProbs, is_plain, score_answers_alone
from tests.architectures import ARCHITECTURES, LoopedConfig, LoopedForCausalLM, make
from tests.tiny import tiny_model

SMALL = dict(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip


def fused(model):
    add_fused_lm_head(model, 0.9, outputs=("log_probs", "entropy", "is_top1"))
    return is_plain(model, model.forward, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes", "plain"),
    [
        ("llama", {}, True),
        ("qwen2", {"tie_word_embeddings": True}, True),
        ("granite", {"logits_scaling": 4.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("cohere", {"logit_scale": 0.25}, False),
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
    ],
)
def test_a_head_is_plain_where_its_output_is_the_logits(kind, changes, plain, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **changes)).to(dtype).train()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # logits as far apart as a trained model's
    assert fused(model) == plain
    assert model.training


@pytest.mark.parametrize("where", ["logits", "hidden"])
def test_a_model_that_does_more_to_its_logits_than_trl_knows_is_refused(where):
    """As code of the model's own may, under whatever name: MiniCPM divides the hidden state."""

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **given):
            if where == "logits":
                out = super().forward(*args, **given)
                out.logits = out.logits / 3
                return out
            hidden = self.model(*args, **given).last_hidden_state
            return CausalLMOutput(logits=self.lm_head(hidden / 3))

    model = Scaled(tiny_model().config)
    with pytest.raises(InputError, match="does something to its logits that TRL's trainers leave out"):
        fused(model)
    add_fused_lm_head(model)
    score_answers_alone(model, 4)
    ids = torch.arange(4, 10)[None]
    with pytest.raises(InputError, match="does something to its logits"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_s_answers_have_the_probabilities_of_its_logits(name):
    """In training mode, as a trainer calls it; a multimodal model with text alone."""
    model = make(name).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(2, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :11] = -100
    exact = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(model)
    score_answers_alone(model, 4)
    got = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, exact.masked_fill(labels[:, 1:] == -100, 0), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_part_beneath_its_head_is_refused():
    class Whole(LoopedForCausalLM):
        base_model_prefix = "transformer"

    with pytest.raises(InputError, match="Whole names no model beneath its output head"):
        score_answers_alone(Whole(LoopedConfig()), None)


@pytest.mark.parametrize("tokens", [1, 7, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("needs_trl", [False, True])
def test_the_answer_head_gives_trl_s_log_probabilities_entropy_and_gradients(tokens, temperature, needs_trl):
    ids = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :11] = -100
    labels[1, 15:] = -100
    weights = torch.randn(3, 19, generator=torch.Generator().manual_seed(2))
    found = []
    for ours in (False, True):
        model = tiny_model()
        for parameter in model.get_output_embeddings().parameters():
            parameter.requires_grad_(False)
        add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            score_answers_alone(model, tokens, temperature, needs_trl)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        # The entropy has a gradient where TRL's own function serves.
        (out.log_probs * weights).sum().add(needs_trl * (out.entropy * weights.flip(0)).sum()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((out, grads))
    (theirs, their_grads), (ours, our_grads) = found
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-5)
    # And the definition of both.
    logits = tiny_model()(input_ids=ids).logits[:, :-1] / temperature
    exact = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    torch.testing.assert_close(ours.log_probs, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_two_products_are_exact(dtype, bound):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((37, 24), (61, 24)))
    bias, given = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (61, 37))
    targets = torch.randint(0, 61, (37,), generator=generator)
    hidden, weight, bias = (t.to(dtype).double() for t in (hidden, weight, bias))
    exact = hidden.clone().requires_grad_()
    wanted = (exact @ weight.T + bias).log_softmax(-1)
    wanted[torch.arange(37), targets].backward(given)
    h = hidden.to(dtype).requires_grad_()
    log_probs, entropy, is_top = AnswerLogProbs.apply(h, weight.to(dtype), bias.to(dtype), targets, 10)
    log_probs.backward(given.to(log_probs.dtype))

    def off(mine, theirs):
        return float((mine.double() - theirs).norm() / theirs.norm())

    assert off(log_probs.detach(), wanted[torch.arange(37), targets].detach()) < bound
    assert off(entropy, -(wanted.exp() * wanted).sum(-1).detach()) < bound
    assert off(h.grad, exact.grad) < bound
    assert not entropy.requires_grad
    if dtype == torch.float64:
        assert torch.equal(is_top, wanted.argmax(-1) == targets)


def test_the_answer_head_scores_no_prompt_and_survives_a_batch_without_answers():
    model = tiny_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    seen = []
    fused = model.forward.__func__

    def watched(self, *args, **given):
        if given.get("shift_labels") is not None:
            seen.append(given["shift_labels"].numel())
        return fused(self, *args, **given)

    model.forward = watched.__get__(model)
    score_answers_alone(model, 4, needs_trl=True)
    ids = torch.randint(2, 258, (2, 12))
    labels = ids.clone()
    labels[:, :7] = -100
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    # Two tokens to hold TRL's function against the model's own logits, once, and the ten with a label.
    assert seen == [2, 4, 4, 2]
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert not out.log_probs.any()
    out.log_probs.sum().backward()
    # Without `fused_lm_head` it is the model's own forward.
    assert model(input_ids=ids).logits.shape == (2, 12, 258)
    assert model.generate(ids[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)
