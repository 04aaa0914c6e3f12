"""A model's device, dtype, tokenizer, configuration and weights.

Weights come from safetensors or GGUF, never from a pickle, and code from a repository only where the recipe
says `trust_remote_code: true`.
"""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..data.tokens import OURS, check_below, encode
from ..distributed import sharding
from ..errors import InputError, suggestion
from ..files import read_text
from .generate import make_greedy
from .locate import check_loaded, origin, resolve
from .quantised import QUANTISED, given_form, quantisation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe.sections import ModelConfig

# What transformers gives a chat template whatever it is told, so that no default holds.
GIVEN = ("documents", "raise_exception", "strftime_now", "bos_token", "eos_token", "unk_token", "sep_token",
         "pad_token", "cls_token", "mask_token", "additional_special_tokens")  # fmt: skip
# A block of transformers' own around what is generated.
GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 where the device computes in it (a GPU since Ampere, a CPU with AVX512-BF16 or AMX), else fp32.

    SmolLM2-135M trains four times as fast in bf16 on such a CPU (410 against 105 tokens/s on 2 cores); on
    others bf16 is emulated and slower than fp32.
    """
    place = torch.device(device)
    if place.type == "cuda":
        fast = torch.cuda.get_device_capability(place) >= (8, 0) or torch.version.hip is not None
    elif place.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def choose_device(given: str | None) -> torch.device:
    """The device given, else this process's GPU (accelerate numbers them by LOCAL_RANK), else the CPU."""
    if given is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise InputError(f"model.device: {given!r} is no device; allowed: cpu, cuda, cuda:<number>, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"model.device: {given!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def _as_input_error(config: "ModelConfig") -> Iterator[None]:
    """Turn what transformers raises for an unusable model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        key = "model.trust_remote_code" if "trust_remote_code" in str(error) else "model.name"
        raise InputError(f"{key}: {config.name!r} could not be loaded: {text}") from error


def load_tokenizer(config: "ModelConfig") -> "PreTrainedTokenizerBase":
    """The model's tokenizer with the chat template and the tokens that `config` names, as every stage and the exported
    model have it; one without a padding token pads with its EOS token.

    Raises InputError for a token that the tokenizer lacks, and for a template that writes a token without an embedding.
    """
    from transformers import AutoTokenizer

    place = str(resolve(config.name))
    with _as_input_error(config):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    for key in ("eos_token", "pad_token"):
        token = getattr(config, key)
        if token is not None and token not in tokenizer.get_vocab():
            near = suggestion(token, sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}), count=3)
            raise InputError(f"model.{key}: got {token!r}, which is no token of {config.name!r}; {near}")
        if token is not None:
            setattr(tokenizer, key, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template)
    if config.chat_template_kwargs:
        if tokenizer.chat_template is None:
            raise InputError(f"model.chat_template_kwargs: the tokenizer of {config.name!r} has no chat template; "
                             "set model.chat_template")  # fmt: skip
        check_variables(tokenizer.chat_template, config.chat_template_kwargs)
        tokenizer.chat_template = with_defaults(tokenizer.chat_template, config.chat_template_kwargs)
    for key in ("eos_token", "pad_token"):
        token = getattr(tokenizer, f"{key}_id")
        # Only an added token can lie beyond the embedding.
        if token is not None and token >= tokenizer.vocab_size:
            check_below(load_config(config).get_text_config().vocab_size, [token], tokenizer, f"model.{key}")
    if config.chat_template is not None:
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
        try:
            ids = encode({"id": "of a test", "prompt": turns[:1], "completion": turns[1:]}, tokenizer)[0]
        except InputError as error:
            raise InputError(f"model.chat_template: does not write a question and its answer; {error}") from None
        check_below(load_config(config).get_text_config().vocab_size, ids, tokenizer, "model.chat_template")
    return tokenizer


def _chat_template(given: str) -> str:
    """A template's text, given as such or as the path of a file."""
    if "{" in given:
        return given
    if Path(given).suffix not in (".jinja", ".j2", ".jinja2"):
        raise InputError(f"model.chat_template: got {given!r}, expected a .jinja file or a template's text")
    return read_text(Path(given).expanduser())


def with_defaults(template: "str | dict[str, str]", values: Mapping[str, Any]) -> Any:
    """A chat template, or each of several, in which `values` are set where the caller does not set them.

    So they hold wherever the template goes: into every stage, and into the exported tokenizer.
    """
    if isinstance(template, dict):
        return {name: with_defaults(text, values) for name, text in template.items()}
    # transformers' Jinja drops the newline behind a block, so the template begins a line as before.
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + template


def check_variables(template: "str | dict[str, str]", values: Mapping[str, Any]) -> None:
    """InputError for a value that the chat template, or each of several, does not read."""
    jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    read: set[str] = set()
    for text in template.values() if isinstance(template, dict) else [template]:
        try:
            read |= meta.find_undeclared_variables(jinja.parse(GENERATION.sub("", text)))
        except TemplateSyntaxError as error:
            raise InputError(f"model.chat_template: is no Jinja template: {error}") from None
    allowed = sorted(read - {*OURS, *jinja.globals, *GIVEN})
    for name in values:
        if name not in allowed:
            near = suggestion(name, allowed) if allowed else "it reads none"
            raise InputError(
                f"model.chat_template_kwargs: {name!r} is no variable that the chat template reads; {near}"
            )


def _literal(value: Any) -> str:
    """A value in Jinja's own writing; JSON's but for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def auto_class(config: Any) -> Any:
    """The transformers auto class that makes and loads a model of this configuration.

    The one whose model the checkpoint names in `architectures`: a wrapper around a language model (Gemma 3 with its
    vision tower, Qwen2.5-VL) stays whole, though AutoModelForCausalLM would take the text model out of some of them.
    """
    import transformers

    kinds: list[Any] = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText,
                        transformers.AutoModelForMultimodalLM]  # fmt: skip
    own = getattr(config, "auto_map", None) or {}
    for kind in kinds:
        if kind.__name__ in own:
            return kind
    named = config.architectures or []
    makers = [kind for kind in kinds if type(config) in kind._model_mapping]
    for kind in makers:
        classes = kind._model_mapping[type(config)]
        if any(made.__name__ in named for made in (classes if isinstance(classes, list | tuple) else [classes])):
            return kind
    return makers[0] if makers else kinds[0]


def load_config(config: "ModelConfig") -> Any:
    """The model's own configuration; no weight is read."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    place = str(resolve(config.name))
    with _as_input_error(config):
        loaded = AutoConfig.from_pretrained(place, **options)
        kind = auto_class(loaded)
        own = (getattr(loaded, "auto_map", None) or {}).get(kind.__name__)
        if config.trust_remote_code and own is not None:
            # As transformers does when it loads the weights, so that the plan can make the model without them.
            model_class = get_class_from_dynamic_module(own, place, revision=config.revision)
            kind.register(type(loaded), model_class, exist_ok=True)
    if config.attn_implementation is not None:
        loaded._attn_implementation = config.attn_implementation
    return loaded


def load_model(config: "ModelConfig", base: str | None = None, shard: bool = False) -> "PreTrainedModel":
    """The model in training mode, on the device and in the dtype that `config` says.

    base: "nf4" or "int8": its linear layers quantised by bitsandbytes as they are read; "bf16"; None: as `config` says.
    shard: leave this process's part of it alone on the device (`distributed.sharding`), where every process of a launch
    loads it; a plain base is read into main memory and goes to the device a block at a time, a 4-bit one is quantised
    on the device first. InputError for one in 8 bits or another quantised form.
    Its `name_or_path` is the absolute folder or the hub id that it was loaded from, and its `lorapar_origin` what an
    adapter saved for it calls its base (`locate.origin`). Its generation settings are greedy: sampling settings that
    the model came with are taken out.
    """
    place = str(resolve(config.name))
    device = choose_device(config.device)
    if config.dtype != "auto" and config.dtype not in DTYPES:
        raise InputError(f"model.dtype: unknown dtype {config.dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if base == "bf16" and config.dtype not in ("auto", "bfloat16"):
        raise InputError(f"lora.base: got bf16 beside model.dtype: {config.dtype}; leave one of them out")
    dtype = best_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    own = load_config(config)
    form = given_form(own)
    if base is not None and form is not None and form != base:
        raise InputError(f"lora.base: got {base}, but {config.name!r} holds its weights as {form}; leave the key out")
    held_as = form or (base if base in QUANTISED else None)
    if shard and held_as not in (None, "nf4", "fp4"):
        raise InputError(f"lora.base: {held_as} weights cannot be sharded over processes; use nf4 or bf16")
    held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if base in QUANTISED and form is None:
        options["quantization_config"] = quantisation(base, dtype, shard)
        from ..adapter.layers_bnb import held_to_their_weights

        held = held_to_their_weights()
    if base in QUANTISED or form is not None:
        # Quantised where it will stay: such a model is not moved afterwards.
        options["device_map"] = {"": str(device)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with held, _as_input_error(config):
        loaded: Any = auto_class(own).from_pretrained(
            place, use_safetensors=True, dtype=torch.bfloat16 if base == "bf16" else dtype, output_loading_info=True,
            **options,
        )  # fmt: skip
    model, info = loaded
    check_loaded(config.name, info)
    if (base in QUANTISED or form is not None) and importlib.util.find_spec("bitsandbytes"):
        from ..adapter.layers_bnb import take_over

        # Before anything is evaluated, which would repack its weights on some CPUs.
        take_over(model)
    model.lorapar_origin = origin(config.name, config.revision)
    make_greedy(model)
    head = model.get_output_embeddings()
    if head is not None and device.type == "cpu":
        # Generation hands the head the last position of each prompt, a strided view [batch, 1, hidden]. With a frozen
        # weight torch's CPU matmul does not fold it but copies the weight once a row: 250 times the time for 64 prompts
        # of SmolLM2-135M (torch 2.13).
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    if shard:
        sharding.shard(model, device)
    elif "device_map" not in options:
        model.to(device)
    return model.train()
