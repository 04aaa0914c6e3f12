"""Whether vLLM serves an adapter, found out without vLLM: its configuration, names, ranks and shapes.

vLLM loads a PEFT folder by rules of its own. It refuses some configurations; it renames a multimodal wrapper's modules,
and leaves out, in silence, what then is none of its own; it packs q, k and v into one layer; and it has a fixed list
of maximal ranks. What is known of that is below, as vLLM 0.32 has it (files of its repository, under vllm/):

- lora/peft_helper.py: the configurations it refuses.      - config/lora.py: `MaxLoRARanks`.
- lora/utils.py `parse_fine_tuned_lora_name`, lora/lora_model.py: the tensors' names.
- model_executor/models/*.py: each class's `packed_modules_mapping`, its linear layers, its `hf_to_vllm_mapper`.

An architecture that is not in the table is said to be unknown here, neither served nor not. What vLLM will not load is
a warning and no error: the folder is right for PEFT, and the merged model is served by anything.
"""

import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from ..adapter.merging import PREFIX
from ..files import read_json

log = logging.getLogger("lorapar")

CHECKED_WITH = "0.32"
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Starts that change no base; of others PEFT's folder is no plain LoRA.
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA's factors (lora_bias)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "modules_to_save": "modules that are saved whole (modules_to_save)",
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # qkv_proj, o_proj
MLP = ("gate_proj", "up_proj", "down_proj")  # gate_up_proj, down_proj
DECODER = (*ATTENTION, *MLP)
LINEAR_ATTENTION = ("in_proj_qkvz", "in_proj_ba", "out_proj")
# transformers names a wrapper's language model so since 4.52, and vLLM's mappers bring it to their own names.
WRAPPED = "model.language_model."


@dataclass(frozen=True)
class Served:
    """What vLLM serves of an architecture.

    Attributes:
        linear: the last parts of the names of linear layers that take LoRA, as PEFT has them. within: what those of the
            language model begin with, before and after vLLM's renaming the same modules.
    """

    linear: tuple[str, ...]
    within: str = "model.layers."


WRAPPER = Served(DECODER, f"{WRAPPED}layers.")
TABLE: dict[str, Served] = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
            "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM", "Exaone4ForCausalLM",
            "CohereForCausalLM", "Cohere2ForCausalLM",
            # By vLLM's wrapper of transformers' own code, which keeps every name.
            "Olmo2ForCausalLM", "Olmo3ForCausalLM", "SmolLM3ForCausalLM",
        ),
        Served(DECODER),
    ),
    "Phi3ForCausalLM": Served(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "GPTNeoXForCausalLM": Served(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "gpt_neox.layers."),
    # Of mixtures of experts the attention; experts are fused parameters, which lorapar does not adapt.
    **dict.fromkeys(
        ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM"), Served(ATTENTION)
    ),
    "Qwen3NextForCausalLM": Served((*ATTENTION, *LINEAR_ATTENTION)),
    "Qwen3_5ForCausalLM": Served((*DECODER, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")),
    **dict.fromkeys(
        (
            "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration", "Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration",
        ),
        WRAPPER,
    ),
}  # fmt: skip


def check_vllm(folder: Path, base: nn.Module) -> dict[str, Any]:
    """Hold an exported adapter against what vLLM loads; log how to serve it, or what is in the way, in a line.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors. base: the base model, with LoRA layers or
            without; only its configuration and its linear layers' sizes are read.

    Returns {"architecture": name, "served": True, False or None (not known here), "rank": the largest,
    "max_lora_rank": what --max-lora-rank must be, None above 512, "problems": [a line each]}.
    """
    settings = read_json(folder / "adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config: Any = getattr(base, "config", None)
    # transformers writes the class's name when it saves; a model that was never saved is of the class itself.
    architecture = next(iter(getattr(config, "architectures", None) or []), type(base).__name__)
    known = TABLE.get(architecture)
    pairs, problems = _pairs(shapes)
    problems += _of_configuration(settings) + _of_sizes(pairs, base)
    if known is not None:
        problems += _of_names(list(pairs), known)
    rank = max((a[0] for a, _ in pairs.values()), default=0)
    needed = next((size for size in MAX_RANKS if size >= rank), None)
    if needed is None:
        problems.append(f"its rank {rank} is above {MAX_RANKS[-1]}, the largest that vLLM has")
    served = False if problems else None if known is None else True
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    at = ["--revision", revision] if revision else []
    words = [
        "vllm",
        "serve",
        name,
        *at,
        "--enable-lora",
        "--max-lora-rank",
        needed,
        "--lora-modules",
        f"adapter={folder}",
    ]
    command = shlex.join(map(str, words))
    if problems:
        log.warning("export: vLLM will not load adapter/ as it is: %s; docs/serving.md", "; ".join(problems))
    elif known is None:
        log.info("export: whether vLLM serves adapters of %s is not known here (docs/serving.md); to try: %s",
                 architecture, command)  # fmt: skip
    else:
        log.info("export: vLLM serves it: %s", command)
    return {"architecture": architecture, "served": served, "rank": rank, "max_lora_rank": needed, "problems": problems}


def _pairs(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], list[str]]:
    """({module: (A's shape, B's)} without PEFT's prefix, what is no whole pair)"""
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    strange = []
    for name, shape in shapes.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if found is None:
            strange.append(name)
        else:
            factors.setdefault(found[1], {})[found[2]] = shape
    problems = [f"{_few(strange)}: no tensor of LoRA"] if strange else []
    halves = [name for name, both in factors.items() if set(both) != {"A", "B"}]
    problems += [f"{_few(halves)}: one of lora_A and lora_B is missing"] if halves else []
    return {name: (both["A"], both["B"]) for name, both in factors.items() if name not in halves}, problems


def _of_configuration(settings: dict[str, Any]) -> list[str]:
    problems = [f"it does not know {what}" for key, what in REFUSED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        problems.append(f"it does not know trained biases (bias: {settings['bias']})")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in INITS:
        problems.append(f"it refuses init_lora_weights: {start}, a start that changes the base")
    return problems


def _of_sizes(pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], base: nn.Module) -> list[str]:
    """Pairs that are of no linear layer of the base, or not of its size."""
    modules: dict[str, Any] = dict(base.named_modules())
    unknown = [name for name in pairs if not isinstance(modules.get(name), nn.Linear | LoraLayer)]
    problems = [f"{_few(unknown)}: no linear layer of the base"] if unknown else []
    for name, (a, b) in pairs.items():
        if name in unknown:
            continue
        size = (modules[name].out_features, modules[name].in_features)
        if (b[0], a[1]) != size or a[0] != b[1]:
            problems.append(
                f"{name}: B·A is {b[0]} × {a[1]} of ranks {b[1]} and {a[0]}, the layer {size[0]} × {size[1]}"
            )
    return problems


def _of_names(modules: list[str], known: Served) -> list[str]:
    """Modules outside the language model, and those whose layer takes no LoRA."""
    outside = [name for name in modules if not name.startswith(known.within)]
    problems = []
    if outside:
        # A vision tower's are loaded with --enable-tower-connector-lora, experimental; the head's are another matter.
        problems.append(f"{_few(outside)}: outside the language model's layers, which alone are served for certain")
    other = sorted({name.rpartition(".")[2] for name in modules if name not in outside} - set(known.linear))
    if other:
        problems.append(f"{', '.join(other)}: no linear layer that takes LoRA there")
    return problems


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
