"""Every recipe in examples/ is valid, and says what its page of the paper says."""

import re
from pathlib import Path

import pytest

import lorapar
from lorapar.recipe.reading import parse

EXAMPLES = Path(__file__).parents[2] / "examples"
# Not the launchers' files.
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if not path.name.endswith(".sky.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipe_is_valid(path):
    recipe = lorapar.load_recipe(path)
    assert parse(recipe.as_dict()).as_dict() == recipe.as_dict()


def test_the_paper_s_settings():
    recipe = lorapar.load_recipe(EXAMPLES / "gsm8k_llama2_7b.yaml")
    assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.partition.theta) == (8, 64, 0.9)
    assert recipe.sft.trainer["learning_rate"] == 2e-4
    assert recipe.sft.trainer["gradient_accumulation_steps"] == 32
    assert (recipe.grpo.trainer["learning_rate"], recipe.grpo.trainer["adam_beta2"]) == (5e-6, 0.99)
    assert recipe.grpo.trainer["num_generations"] == 8
    assert lorapar.load_recipe(EXAMPLES / "paper" / "table4.yaml").start == "pissa"


def test_what_the_script_left_to_a_library_s_default_is_set_by_hand():
    """Each setting whose default has changed since, and those beside it, stand in the recipe."""
    text = (EXAMPLES / "gsm8k_llama2_7b.yaml").read_text()
    by_hand = {
        "sft": {"adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 1.0, "packing": False},
        "grpo": {"beta": 0.04, "loss_type": "grpo", "scale_rewards": "group", "num_iterations": 1, "epsilon": 0.2,
                 "temperature": 0.9, "top_k": 50, "top_p": 1.0},
    }  # fmt: skip
    recipe = lorapar.load_recipe(EXAMPLES / "gsm8k_llama2_7b.yaml")
    for stage, values in by_hand.items():
        trainer = getattr(recipe, stage).trainer
        assert {key: trainer.get(key) for key in values} == values
        for key in values:
            assert re.search(rf"^  {key}: .*\(default then", text, re.M), key


@pytest.mark.parametrize("path", sorted((EXAMPLES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_command_line_that_a_table_names_is_a_recipe(path):
    """The rows of the paper's tables are overrides in the recipe's comments."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    tried = 0
    for line in lines:
        words = re.findall(r"--([\w.]+) (?:'([^']*)'|([^\s')]+))", line)
        overrides = [(key, re.sub(r"\$\{ab.*?\}|\$ab", "0.5", quoted or bare)) for key, quoted, bare in words]
        overrides = [(key, value) for key, value in overrides if key != "output_dir"]
        if overrides:
            recipe = lorapar.load_recipe(path, overrides)
            assert parse(recipe.as_dict()).as_dict() == recipe.as_dict()
            tried += 1
    assert tried >= 1


def test_there_are_recipes():
    assert len(RECIPES) >= 7
