"""`lorapar.run` on each architecture of tests/architectures.py, and docs/models.md, which says how each came out.

`python -m tests.lorapar.whole_runs > docs/models.md` writes the page anew; test_architectures.py holds it to the runs.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lorapar import load_recipe, run
from lorapar.files import read_json
from lorapar.memory.needs import lengths_of, needs
from lorapar.model.load import auto_class
from tests.architectures import MULTIMODAL, save
from tests.lorapar.driver import SOURCES, recipe_values, records, write_recipe

TITLES = {
    "llama": "Llama",
    "tied": "Llama, tied embeddings",
    "qwen3": "Qwen3",
    "qwen3_5": "Qwen3.5, text (hybrid: linear attention)",
    "qwen3_next": "Qwen3-Next (hybrid, experts)",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "gpt_oss": "gpt-oss",
    "gemma2": "Gemma 2 (soft-capped logits)",
    "gemma3": "Gemma 3, text",
    "gemma3_multimodal": "Gemma 3 with vision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "phi3": "Phi-3",
    "gpt_neox": "GPT-NeoX, Pythia",
    "olmo2": "OLMo 2",
    "granite": "Granite (scaled logits)",
    "looped": "one block run twice (custom code)",
}
PAGE = """\
# Models

Written by `python -m tests.lorapar.whole_runs`: each row is a tiny model of random weights that went through
`lorapar.run`, from labels to the exported adapter and the merged model, with `lora.target_modules` left out. A test
holds this page to the runs.

- **score**: Σ gφ and Σ (gφ)² of every element equal those of one example at a time in float64 (relative error below
  1e-9). "one row at a time": examples cannot be told apart in a batch, so `score.batch_size` has no effect.
- **SFT**, **GRPO**: every active element moved and nothing else did, bit for bit.
- **export**: plain PEFT and plain transformers load the adapter and the merged model with the same logits; the merged
  model is of the base's class, and no tensor outside the adapted layers has changed.
- **plan**: `lorapar plan` says what each stage needs.

Text rows train a multimodal model's language model; its towers are kept as they are.

| model | class | attach: adapted | left out | score | SFT | GRPO | export | plan |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass
class Outcome:
    """One run: its folder, the model's, and the recipe."""

    name: str
    model: Path
    folder: Path
    recipe: Path

    @property
    def log(self) -> str:
        return (self.folder / "run.log").read_text(encoding="utf-8")

    @property
    def factors(self) -> Mapping[str, Tensor]:
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    @property
    def adapted(self) -> list[str]:
        """The adapted layers, by their names in the base."""
        end = ".lora_A.weight"
        return [n.removeprefix("base_model.model.").removesuffix(end) for n in self.factors if n.endswith(end)]


def whole_run(name: str, folder: Path) -> Outcome:
    """Two steps of SFT and one of GRPO on the architecture `name`, exported and merged."""
    save(name, folder / "model")
    values: dict[str, Any] = recipe_values(folder / "model")
    values["output_dir"] = str(folder / "run")
    values["data"] = {"sources": [{**source, "size": 20} for source in SOURCES], "held_out": 2}
    values["score"] = {"examples": 4}
    values["sft"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
    values["grpo"] |= {"max_steps": 1, "max_completion_length": 4}
    values["evaluate"] = {"max_new_tokens": 2}
    values["export"] = {"merged": True}
    recipe = write_recipe(folder / "recipe.yaml", values)
    run(load_recipe(recipe))
    return Outcome(name, folder / "model", folder / "run", recipe)


def row(outcome: Outcome) -> str:
    """The line of docs/models.md."""
    check_proof(outcome)
    check_export(outcome)
    line = re.findall(r"INFO lora: (.*)", outcome.log)[0]
    # The shares of so small a model mean nothing.
    left = re.sub(r" [\d.]+%", "", line.partition("; left out: ")[2])
    adapted = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in outcome.adapted}))
    alone = "one row at a time" if "one example at a time" in outcome.log else "yes"
    recipe = load_recipe(outcome.recipe)
    plan = "no" if any(need.unknown for need in needs(recipe, lengths_of(recipe))) else "yes"
    kind = read_json(outcome.folder / "merged" / "config.json")["architectures"][0]
    return f"| {TITLES[outcome.name]} | `{kind}` | {adapted} | {left} | {alone} | yes | yes | yes | {plan} |"


def check_proof(outcome: Outcome) -> None:
    made = records(outcome.folder)
    for stage in ("sft", "grpo"):
        assert made[stage]["moved"] == made[stage]["active"] > 0, (stage, made[stage])


@torch.no_grad()
def check_export(outcome: Outcome) -> None:
    """What is loaded again by plain PEFT and plain transformers."""
    assert not [n for n in outcome.factors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    config = tf.AutoConfig.from_pretrained(outcome.model)
    tokens = torch.arange(3, 43)[None]
    kind = auto_class(config)
    base, merged = (kind.from_pretrained(p, dtype="float32") for p in (outcome.model, outcome.folder / "merged"))
    assert merged.config.architectures == [type(base).__name__] == config.architectures
    if outcome.name in MULTIMODAL:
        assert type(tf.AutoModelForImageTextToText.from_pretrained(outcome.folder / "merged")) is type(base)
        images = [folder / "preprocessor_config.json" for folder in (outcome.model, outcome.folder / "merged")]
        assert images[0].read_text() == images[1].read_text()
    before, after = base.state_dict(), merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed <= {f"{layer}.weight" for layer in outcome.adapted}, "a tensor outside the adapted layers"
    for part in ("adapter", "merged"):
        # As the card beside it says: a class that loads the whole model, by the name that the card calls it by.
        card = (outcome.folder / part / "README.md").read_text()
        assert ("AutoModelForImageTextToText" if kind is tf.AutoModelForImageTextToText else "ForCausalLM") in card
    alone = base(input_ids=tokens).logits
    adapter = PeftModel.from_pretrained(base, str(outcome.folder / "adapter")).eval()
    ours, theirs = adapter(input_ids=tokens).logits, merged(input_ids=tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (ours - alone).abs().max() > 1e-4, "the adapter does nothing"


def page(rows: Iterator[str]) -> str:
    return PAGE + "\n".join(rows) + "\n"


def all_rows() -> Iterator[str]:
    for name in TITLES:
        with tempfile.TemporaryDirectory() as folder:
            yield row(whole_run(name, Path(folder)))


if __name__ == "__main__":
    print(page(all_rows()), end="")
