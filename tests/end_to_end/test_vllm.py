"""vLLM itself, in a Python of its own that LORAPAR_VLLM_PYTHON names, with adapters that were exported here.

In float32 on a CPU, so that nothing but the order of sums is between it and PEFT: VLLM_CPU_KVCACHE_SPACE is a GiB.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapar
from lorapar.adapter.layers import lora_parameters
from lorapar.exporting.serving import CHECKED_WITH, TABLE, check_vllm
from lorapar.model.load import load_model, load_tokenizer
from lorapar.model.locate import ALIAS, resolve
from lorapar.recipe.sections import ModelConfig

PYTHON = os.environ.get("LORAPAR_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="LORAPAR_VLLM_PYTHON is not set: it names a Python that has vLLM"),
]
QUESTIONS = ["Compute: 3 + 4 =", "Compute: 7 - 9 + 2 =", "The capital of France is", "def add(a, b):\n    return",
             "Water boils at", "Once upon a time", "1, 2, 3, 4,", "Red, green and"]  # fmt: skip
NEW_TOKENS = 24


def exported(folder: Path, start: Any, seed: int) -> dict[str, Any]:
    """An adapter of SmolLM2 that answers otherwise than the base, as export writes it; what the check says of it."""
    model = lorapar.attach(
        load_model(ModelConfig(ALIAS, dtype="float32", device="cpu")),
        LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
        start=start,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    lorapar.export(model, load_tokenizer(ModelConfig(ALIAS)), folder)
    return check_vllm(folder / "adapter", model.get_base_model())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The request and what vLLM made of it: two adapters, of ranks 8 and 16, in one engine."""
    folder = tmp_path_factory.mktemp("vllm")
    checks = {name: exported(folder / name, start, seed) for seed, (name, start) in enumerate(
        {"sft": "paper", "grpo": "twin"}.items())}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft" / "adapter")
    request = {
        "base": str(resolve(ALIAS)),
        "adapters": {name: str(folder / name / "adapter") for name in checks},
        "rank": max(check["max_lora_rank"] for check in checks.values()),
        "prompts": [tokenizer(text)["input_ids"] for text in QUESTIONS],
        "stops": [tokenizer.eos_token_id],
        "new_tokens": NEW_TOKENS,
        "table": {name: {"within": known.within, "linear": known.linear} for name, known in TABLE.items()},
        "out": str(folder / "out.json"),
    }
    (folder / "request.json").write_text(json.dumps(request))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                   "DO_NOT_TRACK": "1"}  # fmt: skip
    program = str(Path(__file__).with_name("with_vllm.py"))
    done = subprocess.run([str(PYTHON), program, str(folder / "request.json")], capture_output=True, text=True,
                          timeout=1500, env=os.environ | environment, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {"request": request, "checks": checks, **json.loads((folder / "out.json").read_text())}


@torch.no_grad()
def test_its_greedy_answers_are_peft_s(served: dict[str, Any]):
    request = served["request"]
    by_name = {}
    for name in ("base", *request["adapters"]):
        model = AutoModelForCausalLM.from_pretrained(request["base"], dtype="float32")
        if name != "base":
            model = PeftModel.from_pretrained(model, request["adapters"][name])
        model.eval()
        tokens = same = 0
        furthest = 0.0
        for prompt, (ids, theirs) in zip(request["prompts"], served["answers"][name]):
            scores = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            tokens += len(ids)
            same += int((scores.argmax(-1) == torch.tensor(ids)).sum())
            ours = scores[range(len(ids)), ids]
            furthest = max(furthest, float((ours - torch.tensor(theirs)).abs().max()))
        by_name[name] = [ids for ids, _ in served["answers"][name]]
        print(
            f"vLLM {served['version']}, {name}: {same} of {tokens} tokens are PEFT's, log-probabilities {furthest:.1e}"
        )
        assert same >= 0.99 * tokens, name
        assert furthest < 1e-3, name
    # The adapters are there: each answers otherwise than the base, and than the other.
    assert by_name["base"] != by_name["sft"] != by_name["grpo"] != by_name["base"]


def test_what_the_check_says_is_what_it_loads(served: dict[str, Any]):
    assert [check["max_lora_rank"] for check in served["checks"].values()] == [8, 16]
    assert all(check["served"] for check in served["checks"].values())


def test_the_table_of_architectures_is_vllm_s(served: dict[str, Any]):
    if not served["version"].startswith(f"{CHECKED_WITH}."):
        pytest.skip(f"the table is of vLLM {CHECKED_WITH}, this is {served['version']}")
    read = {name: facts for name, facts in served["classes"].items() if isinstance(facts, dict)}
    assert len(read) >= 15, served["classes"]
    for name, facts in read.items():
        assert facts["lora"], name
        packed = facts["packed"]
        within = {child for children in packed.values() for child in children}
        for layer in TABLE[name].linear:
            # What is packed under this very name must be packed out of it alone (Phi-3's qkv_proj).
            assert layer in within or layer not in packed, f"{name}: {layer}"
        if TABLE[name].within.startswith("model.language_model."):
            assert facts["layer"].startswith("language_model.model.layers."), name
