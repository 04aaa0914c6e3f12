"""The trainers' switches that trade time for memory: their defaults, and what each needs here."""

import importlib.util
from typing import Any

from ..errors import InputError, not_installed
from ..recipe.sections import StageConfig

# What `grpo.logprob_tokens: null` is on a CPU (bench/LOG.md); on a GPU TRL's own tiles are used.
CPU_LOGPROB_TOKENS = 256
# Key: what it does, the library it needs and the extra that brings it, whether it needs a GPU.
SWITCHES: dict[str, tuple[str, str | None, str | None, bool]] = {
    "gradient_checkpointing": ("each layer's insides are made again in the backward", None, None, False),
    "activation_offloading": ("what the backward needs waits in the host's memory", None, None, True),
    "use_liger_kernel": ("Liger's RMSNorm, SwiGLU and RoPE", "liger_kernel", "liger", True),
    "packing": ("rows laid end to end, without padding where FlashAttention keeps them apart (sft)", None, None, False),
    "use_vllm": ("rollouts by vLLM (grpo)", "vllm", "vllm", True),
    "padding_free": ("a batch as one row without padding (sft)", "flash_attn", None, True),
}


def obstacle(key: str, device: str) -> str | None:
    """Why a switch cannot be on here, with the remedy; None where it can."""
    _, library, extra, gpu = SWITCHES[key]
    if library is not None and importlib.util.find_spec(library) is None:
        name = library.replace("_", "-")
        if extra is None:
            return f"needs {name}, which is not installed; pip install {name}"
        return f"needs {not_installed(f'{name}, which', extra)}"
    return f"needs a GPU, the model is on {device}" if gpu and device != "cuda" else None


def check_switches(config: dict[str, Any], stage: str, device: str) -> None:
    """InputError for a switch of a stage's configuration that is on and cannot be here."""
    for key in SWITCHES:
        why = obstacle(key, device) if config.get(key) else None
        if why is not None:
            raise InputError(f"{stage}.{key}: got true, but it {why}; or leave it out")


def checkpointing(config: StageConfig, device: str) -> bool:
    """Whether a stage recomputes activations: as its recipe says, else as TRL does by default, but not on a CPU, where
    micro-batches bound the memory and recomputing takes a third more time."""
    if device == "cpu":
        return config.trainer.get("gradient_checkpointing", False)
    return config.setting("gradient_checkpointing")


def default_micro_batch_tokens(device: str) -> int | None:
    """What `sft.micro_batch_tokens: auto` is: a batch gains a CPU no time, and costs it memory."""
    return 512 if device == "cpu" else None


def switches(device: str) -> dict[str, str]:
    """{switch: its default on this device, or what stands in its way} for `lorapar doctor`."""
    defaults = {key: "off unless the recipe says true" for key in SWITCHES}
    if device != "cpu":
        defaults["gradient_checkpointing"] = "as TRL's default unless the recipe says otherwise"
    shown = {key: obstacle(key, device) or default for key, default in defaults.items()}
    tokens = default_micro_batch_tokens(device)
    shown["sft.micro_batch_tokens"] = "the whole batch" if tokens is None else f"{tokens} tokens at once"
    return shown
