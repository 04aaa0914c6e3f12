"""Every recipe in examples/ is valid, and says what its page of the paper says."""

from pathlib import Path

import pytest

import lorapar
from lorapar.config import parse

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))


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


def test_there_are_recipes():
    assert len(RECIPES) >= 7
