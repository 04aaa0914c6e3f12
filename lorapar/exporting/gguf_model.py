"""A transformers model in llama.cpp's terms: its hyperparameters, its tensors' names, and how those are laid out.

llama.cpp's own converter is the specification (ggml-org/llama.cpp, conversion/base.py, llama.py and qwen.py). Few
architectures, each held against llama.cpp itself by a test, rather than many that are not.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

log = logging.getLogger("lorapar")
# A checkpoint's class → llama.cpp's architecture. Mistral's is Llama's there.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama",
                 "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}  # fmt: skip
# How positions are scaled, and the settings of each that are written; YaRN's finer ones are llama.cpp's defaults.
ROPE_SETTINGS = {
    "default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


def check_model(config: Any) -> None:
    """InputError, in one line, for a model of which no GGUF is made here; `config`: transformers' own."""
    name = _class(config)
    if name not in ARCHITECTURES:
        raise InputError(
            f"export.gguf: {name} is not converted here, which is done for {', '.join(ARCHITECTURES)}; write the "
            "merged model (export.merged: true) and convert merged/ with llama.cpp's convert_hf_to_gguf.py"
        )
    if architecture(config) == "qwen3" and config.attention_bias:
        raise InputError(
            "export.gguf: got a Qwen3 with attention_bias true, which llama.cpp does not load; use adapter/"
        )
    rope = _rope(config)
    kind, factor = rope["rope_type"], rope.get("partial_rotary_factor") or 1
    given = {"hidden_act": config.hidden_act} if config.hidden_act != "silu" else {}
    given |= {"rope_type": kind} if kind not in ROPE_SETTINGS else {}
    given |= {"partial_rotary_factor": factor} if factor != 1 else {}
    written = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_SETTINGS.get(kind, rope)}
    given |= {key: value for key, value in rope.items() if key not in written and value is not None}
    if given:
        raise InputError(
            f"export.gguf: a model with {', '.join(f'{key} {value}' for key, value in given.items())} is not converted "
            f"here (allowed: hidden_act silu, rope_type {', '.join(ROPE_SETTINGS)} with their main settings); convert "
            "merged/ (export.merged: true) with llama.cpp's convert_hf_to_gguf.py"
        )


def say_what_differs(config: Any) -> None:
    """A line in the log where llama.cpp computes the architecture otherwise than transformers."""
    window = getattr(config, "sliding_window", None)
    # Qwen2 names a window that it does not use unless told to.
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        log.warning(
            "export: gguf: the model attends to the last %d tokens, and llama.cpp to all: beyond %d tokens they differ",
            window, window,
        )  # fmt: skip


def architecture(config: Any) -> str:
    return ARCHITECTURES[_class(config)]


def _class(config: Any) -> str:
    return (config.architectures or [type(config).__name__])[0]


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_hyperparameters(writer: Any, config: Any) -> None:
    """The keys that describe the model, into a `gguf.GGUFWriter`."""
    import gguf

    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_dim(config))
    if _head_dim(config) * heads != config.hidden_size:
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, [head_dim / 2] fp32, where Llama 3 rescales them; else None."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = _head_dim(config)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    rescaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / rescaled


def tensor_names(config: Any, names: list[str]) -> dict[str, str]:
    """{a parameter's name: llama.cpp's}, without a head that is the embedding again; InputError for unknown ones."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture(config))
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name in names:
        # Old checkpoints hold the rotary frequencies too, which every reader computes.
        if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        called = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise InputError(f"export.gguf: the checkpoint's {name} has no place in llama.cpp's {architecture(config)}")
        found[name] = called
    return found


def as_laid_out(config: Any, name: str, tensor: Tensor) -> Tensor:
    """A weight [out, in], a bias [out] or a LoRA B [out, r] of parameter `name`, its rows in llama.cpp's order.

    llama.cpp rotates neighbouring rows of a head together in the architecture "llama", transformers the first half with
    the second: there q's and k's rows are permuted.
    """
    if architecture(config) != "llama":
        return tensor
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads or config.num_attention_heads
    else:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
