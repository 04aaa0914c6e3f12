"""PEFT's configuration of a recipe's section `lora`."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from ..errors import InputError

# Where the recipe is silent, the paper's (section 4.1); which modules are adapted then, targets.py says.
DEFAULTS = {
    "r": 8,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "task_type": "CAUSAL_LM",
}


def lora_config(lora: Mapping[str, Any]) -> LoraConfig:
    """PEFT's configuration of the section `lora`; our key `base` is not PEFT's."""
    try:
        return LoraConfig(**(DEFAULTS | {key: value for key, value in lora.items() if key != "base"}))
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error
