"""The whole method on SmolLM2-135M with its base in 4 and in 8 bits, cut short."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorapar
from lorapar.model.locate import ALIAS, resolve
from lorapar.recipe.reading import load_recipe

pytest.importorskip("bitsandbytes")
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SHORT = {
    # Not the processor's best: in bf16 rounding alone moves the logits by 0.23 standard deviations.
    "model.dtype": "float32",
    "score.examples": "8",
    "sft.max_steps": "2",
    "grpo.max_steps": "2",
    "grpo.per_device_train_batch_size": "8",
    "grpo.num_generations": "4",
    "grpo.beta": "0.04",
    "evaluate.limit": "4",
    "sft.gradient_checkpointing": "true",
    "grpo.gradient_checkpointing": "true",
    "export.merged": "true",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_every_stage_on_a_quantised_base(base, tmp_path):
    overrides = [*SHORT.items(), ("lora.base", base), ("output_dir", str(tmp_path / "run"))]
    run = lorapar.run(load_recipe(QUICKSTART, overrides))
    records = json.loads((run / "stages.json").read_text())
    for stage in ("sft", "grpo"):
        # Each active element moved, by steps that bf16 would have lost in part.
        assert records[stage]["moved"] == records[stage]["active"] > 500_000
    assert records["export"]["adapter_logit_difference"] < 1e-3
    assert records["export"]["merged_logit_difference"] < 0.5
    assert records["export"]["merged_from_trained_logit_difference"] > 0
    off, effect = merged_error(run)
    # Rounding to bf16 is 0.16 (nf4) and 0.25 (int8) of what four steps did; without the adapter it would be 1.
    assert off < 0.5 * effect
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert set(json.loads((run / "metrics.json").read_text())["accuracy"]) == {"base", "sft", "grpo"}


@torch.no_grad()
def merged_error(run: Path) -> tuple[float, float]:
    """On the original weights in fp32: ‖merged − adapter‖ over logits, and ‖base − adapter‖, what a merge that lost
    the adapter would have there."""
    tokens = torch.randint(40_000, (2, 20), generator=torch.Generator().manual_seed(1))
    base = AutoModelForCausalLM.from_pretrained(resolve(ALIAS), dtype="float32").eval()
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    ours = adapted(input_ids=tokens).logits
    with adapted.disable_adapter():
        without = adapted(input_ids=tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32").eval()(input_ids=tokens).logits
    return float((merged - ours).norm()), float((without - ours).norm())
