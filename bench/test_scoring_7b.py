"""Scoring on a Llama-2-7B shape with random weights in bf16, 200 tokens an example, half of them the answer's.

Against the released script's way (one example a step through PEFT's layers) and against a forward and backward for dX
alone: our layers, batches, answer positions and loss without the sums, so that the ratio is what the sums cost.
On the CPU a small shape stands in, to try the case without a GPU.
"""

import os
from copy import deepcopy

import pytest
import torch

from bench.interleaved import interleave
from bench.scoring import as_rows, error, padded_batches, with_peaks

pytest.importorskip("transformers", reason="transformers is not installed: the model is its Llama")
pytest.importorskip("peft", reason="peft is not installed: the other way runs PEFT's layers")
pytest.importorskip("pandas", reason="pandas is not installed: the released script's way imports it")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorapar
from bench.baselines import released_script
from lorapar.score_batches import cross_entropy_gradient, head_on

TOKENS, BATCH = 200, 8
ROWS = int(os.environ.get("LORAPAR_BENCH_ROWS", 32))
SHAPES = {
    "cuda": LlamaConfig(),  # transformers' defaults are Llama-2-7B's
    "cpu": LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
    ),
}
LORA = LoraConfig(
    r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)


def random_model(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(SHAPES[device])
    finally:
        torch.set_default_dtype(default)


def bare(model, batches) -> None:
    """A forward and a backward that carries dX down to the embedding, and no factor's gradient."""
    factors = released_script.trainable(model).values()
    for factor in factors:
        factor.requires_grad_(False)
    for ids, labels in batches:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        answers = targets != -100
        with head_on(model, answers):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        weights = (1.0 / answers.sum(1, keepdim=True)).expand(answers.shape)[answers]
        logits.backward(cross_entropy_gradient(logits.detach(), targets[answers], weights))
        assert embedded.grad is not None
    for factor in factors:
        assert factor.grad is None
        factor.requires_grad_(True)


def test_scoring_7b(benchmark, report, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[device].vocab_size
    examples = []
    for _ in range(ROWS):
        ids = torch.randint(3, vocabulary, (TOKENS,), generator=generator).tolist()
        examples.append((ids, [-100] * (TOKENS // 2) + ids[TOKENS // 2 :]))
    batches = [(ids.to(device), labels.to(device)) for ids, labels in padded_batches(examples, BATCH)]
    ours = lorapar.attach(random_model(device, dtype), LORA, start="paper")
    script = get_peft_model(random_model(device, dtype), deepcopy(LORA)).eval()
    script.load_state_dict(ours.state_dict())
    peaks: dict[str, int] = {}

    ways = {
        "ours": lambda: lorapar.score(ours, None, as_rows(examples), batch_size=BATCH),
        "released script's": lambda: released_script.score(script, examples, device),
        "forward and dX alone": lambda: bare(ours, batches),
    }
    lorapar.score(ours, None, as_rows(examples[:BATCH]), batch_size=BATCH)
    released_script.score(script, examples[:2], device)
    bare(ours, batches[:1])
    timed = interleave(benchmark, f"scoring, 7B shape [{device}]", with_peaks(ways, peaks, device), device, rounds=3)
    timed.facts = {
        "rows": ROWS,
        "tokens_a_row": TOKENS,
        "batch_size": BATCH,
        "dtype": str(dtype),
        "peak_extra_bytes": peaks,
        "error": error(timed.results["ours"], timed.results["released script's"]),
        "cost over forward and dX alone": timed.median("ours") / timed.median("forward and dX alone"),
    }
    assert timed.facts["error"] < (5e-2 if dtype == torch.bfloat16 else 1e-4)
    if device == "cuda":
        timed.required = {"released script's": 5.0, "forward and dX alone": 1 / 1.15}
    report(timed)
