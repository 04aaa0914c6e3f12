"""The whole method on SmolLM2-135M, cut short: every artefact is what it should be, and loads elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorapar
from lorapar.adapter.attach import load_adapter
from lorapar.adapter.layers import ADAPTER
from lorapar.data.tokens import encode
from lorapar.model.load import load_model, load_tokenizer
from lorapar.model.locate import ALIAS, ALIAS_ORIGIN, resolve
from lorapar.recipe.reading import load_recipe, parse
from lorapar.recipe.sections import ModelConfig

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SHORT = {
    "score.examples": "16",
    "sft.max_steps": "3",
    "sft.save_steps": "2",
    "grpo.max_steps": "2",
    # Five steps must move the model by more than rounding the merged weights to bf16 does.
    "sft.learning_rate": "2.0e-3",
    "grpo.per_device_train_batch_size": "8",
    "grpo.num_generations": "4",
    "evaluate.limit": "8",
    "export.merged": "true",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    return lorapar.run(load_recipe(QUICKSTART, [*SHORT.items(), ("output_dir", str(folder))]))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The saved factors by the names of the partition."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.replace(".weight", f".{ADAPTER}.weight"): tensor for name, tensor in tensors.items()}


def test_every_artefact_is_there(run):
    for name in ("recipe.yaml", "labels.jsonl", "scores.safetensors", "partition.safetensors", "metrics.json",
                 "report.html", "run.log", "stages.json", "answers.jsonl"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    for folder in ("start", "sft", "grpo", "adapter"):
        config = json.loads((run / folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["base_model_name_or_path"] == ALIAS_ORIGIN
    # That model's weights are not those that were trained on, to the last bit.
    assert "rounded to 4 bits" in (run / "adapter" / "README.md").read_text()
    assert not list(run.rglob("*.tmp"))


def test_partition_is_that_of_a_naive_sort_of_the_run_s_own_scores(run):
    made = lorapar.Partition.load(run / "partition.safetensors")
    for system, scores in enumerate(lorapar.load_scores(run / "scores.safetensors"), start=1):
        names = sorted(scores)
        flat = torch.cat([scores[name].reshape(-1) for name in names]).double()
        values, order = flat.sort(descending=True, stable=True)
        needed = int((values.cumsum(0) < 0.9 * flat.sum()).sum()) + 1
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[order[:needed]] = True
        got = torch.cat([made.kept(system)[name].reshape(-1) for name in names])
        assert torch.equal(got, kept)
    assert 0.2 < made.summary()["fraction"]["active_sft"] < 0.7


def test_after_each_stage_not_one_inactive_element_differs(run):
    made = lorapar.Partition.load(run / "partition.safetensors")
    records = json.loads((run / "stages.json").read_text())
    for before, stage in (("start", "sft"), ("sft", "grpo")):
        old, new = adapter(run / before), adapter(run / stage)
        assert old.keys() == made.active(stage).keys()
        for name, mask in made.active(stage).items():
            assert torch.equal(old[name][~mask].view(torch.int32), new[name][~mask].view(torch.int32))
        moved = sum(int((old[n] != new[n]).sum()) for n in old)
        active = sum(int(mask.sum()) for mask in made.active(stage).values())
        assert moved == records[stage]["moved"] > 0.9 * active
        assert records[stage]["optimizer_state_bytes"] == 8 * active


def test_adapter_and_merged_model_load_elsewhere_with_our_logits(run):
    tokens = torch.randint(40_000, (2, 20), generator=torch.Generator().manual_seed(1))
    base = resolve(ALIAS)

    @torch.no_grad()
    def logits(model):
        return model.eval()(input_ids=tokens).logits

    ours = logits(load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), run / "grpo"))
    plain_base = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    base_logits = logits(plain_base)
    plain = PeftModel.from_pretrained(plain_base, run / "adapter")
    torch.testing.assert_close(logits(plain), ours, rtol=1e-4, atol=2e-3)
    with plain.disable_adapter():
        assert torch.equal(logits(plain), base_logits)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32")
    # The merged weights are bf16; what that rounding does to logits, in units of their spread.
    off = logits(merged) - ours
    assert off.abs().max() / ours.std() < 0.5
    # And it is the adapter's model, not the base: what five steps changed is there.
    assert off.norm() < 0.25 * (base_logits - ours).norm()
    started = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), run / "start")
    torch.testing.assert_close(logits(started), base_logits, rtol=1e-4, atol=2e-3)


def test_metrics_hold_what_the_contract_names(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("base", "sft", "grpo"):
        assert set(metrics["accuracy"][name]) == {"all", "system1", "system2"}
    assert set(metrics["partition"]["fraction"]) == {"s1_only", "s2_only", "shared", "active_sft", "active_grpo"}
    for stage in ("label", "score", "partition", "sft", "grpo", "evaluate", "export"):
        assert metrics["seconds"][stage] > 0
        assert metrics["peak_memory_bytes"][stage] > 1 << 20
    assert set(metrics["optimizer_state_bytes"]) == {"sft", "grpo"}


def test_the_same_command_does_nothing_again(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.log"}
    overrides = [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "lorapar", "run", str(QUICKSTART), "--output_dir", str(run), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before, skipped") == 8
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.log"}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"recipe.yaml"}


def whole_error(sums, exact) -> list[float]:
    """‖sums − exact‖ ÷ ‖exact‖ over the whole model, of Σgφ and of Σ(gφ)²."""

    def norm(tensors) -> float:
        return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())

    return [
        norm(sums[name][which] - want[which] for name, want in exact.items())
        / norm(want[which] for want in exact.values())
        for which in (0, 1)
    ]


def test_sums_equal_one_example_at_a_time_in_float64():
    """Σgφ and Σ(gφ)² each, on the real model at the paper's start.

    In float64 they are the same numbers. In fp32 the model's own rounding over 30 layers is 1e-4, however the sums are
    made: PyTorch's autograd in fp32, one example at a time, is the yardstick there.
    """
    from tests.lorapar.test_scoring import naive_sums

    texts = [
        ("The capital of France is", " Paris, which lies on the Seine."),
        ("A farmer has 3 cows and buys 4 more. How many has he now?\n", "He has 3 + 4 = 7 cows."),
        ("Compute: 8 + 5 =", " 13."),
    ]
    model_config = ModelConfig("smollm2-135m", dtype="float32", device="cpu")
    tokenizer = load_tokenizer(model_config)
    rows = []
    for prompt, completion in texts:
        ids, n_prompt = encode({"prompt": prompt, "completion": completion}, tokenizer)
        rows.append({"input_ids": ids, "labels": [-100] * n_prompt + ids[n_prompt:]})
    config = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
    model = lorapar.attach(load_model(model_config), config, "paper")

    def scored(model) -> dict[str, tuple[torch.Tensor, ...]]:
        gathered = {}

        def keep(running):
            for name, sums in running.sums.items():
                gathered[f"{name}.lora_A.{ADAPTER}.weight"] = sums[:2]
                gathered[f"{name}.lora_B.{ADAPTER}.weight"] = sums[2:]

        lorapar.score(model, None, rows, on_batch=keep)
        return gathered

    single, naive_single = scored(model), naive_sums(model, rows)
    model.double()
    exact = naive_sums(model, rows)
    assert max(whole_error(scored(model), exact)) < 1e-6
    for ours, autograd in zip(whole_error(single, exact), whole_error(naive_single, exact), strict=True):
        assert ours < max(1e-4, 2 * autograd)
        assert autograd < 1e-3


def test_gsm8k_rows_through_the_same_pipeline(gsm8k, tmp_path):
    rows = tmp_path / "rows.jsonl"
    Dataset.from_json(str(gsm8k / "train.jsonl")).select(range(120)).to_json(str(rows))
    recipe = {
        "model": "smollm2-135m",
        "output_dir": str(tmp_path / "run"),
        "data": {"sources": [{"name": str(rows), "held_out": 12}], "chat": True, "max_prompt_length": 256},
        "label": {"voters": [{"name": "operations", "threshold": 3}]},
        "lora": {"r": 4, "lora_alpha": 8},
        "score": {"examples": 8},
        "sft": {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "max_length": 512},
        "grpo": {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 24,
                 "bf16": False, "rewards": ["correct", "integer", "tags", "closeness"], "beta": 0.04,
                 "learning_rate": 1e-3},
        "evaluate": {"max_new_tokens": 16, "limit": 3},
    }  # fmt: skip
    folder = lorapar.run(parse(recipe))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"]["all"] >= 4
    labelled = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert {row["system"] for row in labelled} == {1, 2}
    assert all(row["answer"].replace(",", "").lstrip("-").replace(".", "").isdigit() for row in labelled)
    held_out = {row["id"] for row in labelled if row["split"] == "held_out"}
    assert len(held_out) == 12
    assert not held_out & {row["id"] for row in labelled if row["split"] == "train"}
