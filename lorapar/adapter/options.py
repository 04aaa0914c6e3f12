"""PEFT's configuration of a recipe."""

from peft import LoraConfig

from ..errors import InputError
from ..recipe.sections import Recipe


def lora_config(recipe: Recipe) -> LoraConfig:
    """PEFT's configuration of the recipe, with the paper's defaults where it is silent (paper section 4.1)."""
    defaults = {
        "r": 8,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    try:
        return LoraConfig(**(defaults | {key: value for key, value in recipe.lora.items() if key != "base"}))
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error
