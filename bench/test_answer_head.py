"""Log-probabilities and entropy of the completions alone, forward and backward, against TRL's head over every position.

The head alone, of SmolLM2-135M's size (hidden 576, vocabulary 49,152), fp32: 8 rows of 256 prompt and 64 completion
tokens, on a CPU, where TRL scores prompts too. Each way's peak of memory beyond what was there before it is recorded.
"""

import pytest
import torch

from bench.interleaved import interleave
from bench.scoring import with_peaks

pytest.importorskip("trl", reason="trl is not installed: the other way is its head")

from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lorapar.training.answer_head import score_answers_alone

ROWS, PROMPT, COMPLETION = 8, 256, 64
CONFIG = LlamaConfig(
    vocab_size=49152, hidden_size=576, num_hidden_layers=0, num_attention_heads=9, num_key_value_heads=3
)


def headed(tokens: int | None) -> LlamaForCausalLM:
    """Embeddings, a norm and a frozen head; `tokens` at a time by ours, None: TRL's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if tokens is not None:
        score_answers_alone(model, tokens)
    return model


def test_answer_head(benchmark, report):
    ids = torch.randint(0, CONFIG.vocab_size, (ROWS, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :PROMPT] = -100

    def scored(model):
        def run():
            states = model.get_input_embeddings()(ids).requires_grad_()
            out = model(inputs_embeds=states, labels=labels, fused_lm_head=True)
            out.log_probs.sum().backward()
            return out.log_probs.detach(), out.entropy.detach(), states.grad

        return run

    peaks: dict[str, int] = {}
    ways = {"ours, 256 tokens": scored(headed(256)), "TRL's": scored(headed(None))}
    timed = interleave(benchmark, "answer head [cpu]", with_peaks(ways, peaks), rounds=3)
    for got, want in zip(timed.results["ours, 256 tokens"], timed.results["TRL's"]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    timed.facts = {"rows": ROWS, "prompt": PROMPT, "completion": COMPLETION, "peak_extra_bytes": peaks}
    report(timed)
