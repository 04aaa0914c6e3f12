"""Scoring on a Llama-2-7B shape with random weights: what bench/test_scoring_7b.py and bench/gpu/scoring.py share.

200 tokens an example, half of them the answer's, bf16 on a GPU. Against the released script's way (one example a step
through PEFT's layers) and against a forward and backward for dX alone: our layers, batches, answer positions and loss
without the sums, so that the ratio is what the sums cost. On the CPU a small shape stands in, in fp32.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorapar
from bench.baselines import released_script
from bench.scoring import Batch, Rows, as_rows, padded_batches
from lorapar.scoring.batches import cross_entropy_gradient, head_on

TOKENS, BATCH = 200, 8
OURS, SCRIPT, BARE = "ours", "released script's", "forward and dX alone"
SHAPES = {
    "cuda": LlamaConfig(),  # transformers' defaults are Llama-2-7B's
    "cpu": LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
    ),
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# How far our scores may be from the script's: bf16 has 8 bits, and the two ways round at different places.
NEAR = {"cuda": 5e-2, "cpu": 1e-4}
LORA = LoraConfig(
    r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)


@dataclass
class Scored:
    """Our model and PEFT's with the same factors, and the examples as each way takes them."""

    device: str
    examples: Rows
    batches: list[Batch]
    ours: Any
    script: Any

    def ways(self) -> dict[str, Callable[[], Any]]:
        return {
            OURS: lambda: lorapar.score(self.ours, None, as_rows(self.examples), batch_size=BATCH),
            SCRIPT: lambda: released_script.score(self.script, self.examples, self.device),
            BARE: lambda: bare(self.ours, self.batches),
        }

    def warm_up(self) -> None:
        lorapar.score(self.ours, None, as_rows(self.examples[:BATCH]), batch_size=BATCH)
        released_script.score(self.script, self.examples[:2], self.device)
        bare(self.ours, self.batches[:1])


def made(device: str, rows: int) -> Scored:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[device].vocab_size
    examples = []
    for _ in range(rows):
        ids = torch.randint(3, vocabulary, (TOKENS,), generator=generator).tolist()
        examples.append((ids, [-100] * (TOKENS // 2) + ids[TOKENS // 2 :]))
    batches = [(ids.to(device), labels.to(device)) for ids, labels in padded_batches(examples, BATCH)]
    ours = lorapar.attach(random_model(device), LORA, start="paper")
    script = get_peft_model(random_model(device), deepcopy(LORA)).eval()
    script.load_state_dict(ours.state_dict())
    return Scored(device, examples, batches, ours, script)


def random_model(device: str) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[device])
    try:
        with torch.device(device):
            return LlamaForCausalLM(SHAPES[device])
    finally:
        torch.set_default_dtype(default)


def bare(model: Any, batches: list[Batch]) -> None:
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
