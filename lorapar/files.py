"""Reading and writing a run's files, each written whole or not at all.

A file is written beside its destination, flushed to the disk, and renamed over it; a folder likewise. A reader
therefore finds the old content, the new content, or nothing, also after `kill -9` or on a full disk.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InputError

# Windows has no quotas of this kind.
FULL_DISK_ERRORS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
FULL_DISK_WORDS = ("No space left", "PytorchStreamWriter", "inline_container", "iostream error", "requested and")
TEMPORARY = ".*.tmp"  # what _replacing and atomic_folder call a thing until it is whole


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    # mkstemp makes files private; artefacts follow the user's umask like any other file.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    try:
        with _full_disk_named(path):
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a fresh temporary folder that becomes `path` (replacing what is there) once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    try:
        with _full_disk_named(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # While what was written is still there: once it is cleared away, the disk has room again.
        if disk_is_full(error, path.parent):
            raise InputError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise


def _flush_to_disk(path: Path) -> None:
    # Windows flushes only what is open for writing; elsewhere a file that may only be read is flushed too.
    with open(path, "r+b" if sys.platform == "win32" else "rb") as file:
        os.fsync(file.fileno())


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and folders that a process which was killed left in `folder` and its subfolders."""
    for path in [*folder.glob(TEMPORARY), *folder.glob(f"*/{TEMPORARY}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def disk_is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether a full disk (of `folder`) is behind an error, also where a library wraps it in its own words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
            return True
        # safetensors names the cause; torch.save says only that its stream failed, or is not as long as was written;
        # NumPy's tofile says "4096 requested and 3888 written".
        if any(words in str(error) for words in FULL_DISK_WORDS):
            return "No space left" in str(error) or shutil.disk_usage(folder).free < 1 << 24
        error = error.__cause__ or error.__context__
    return False


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 with the line ends that `text` has, so that the same text is the same file on every system."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path | str, rows: Any) -> None:
    with _replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def expanded(path: Path | str, at: str) -> Path:
    """A path with its ~ expanded; InputError, which names the key `at`, for the home of nobody and for no path."""
    try:
        if "\0" not in str(path):
            return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{at}: got {str(path)!r}, but there is no such user; give the folder itself") from None
    raise InputError(f"{at}: got {str(path)!r}, which holds a NUL and can be no path")


def read_text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None


def read_json(path: Path | str) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: corrupt or truncated JSON ({error})") from None


def read_jsonl(path: Path | str) -> list[dict]:
    """The rows of a file with one JSON object a line; InputError, naming the line, for anything else."""
    rows = []
    # Not splitlines(): a JSON string may hold a raw U+2028, which ends a line there and not here.
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is corrupt or truncated JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not an object of columns but {type(row).__name__}")
        rows.append(row)
    return rows


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write safetensors with `metadata`, and a digest of the tensors, as JSON under its one key, "lorapar".

    One key, because the library writes several in a random order, and equal artefacts must be equal files.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as temporary:
        try:
            facts = {**metadata, "sha256": sha256_tensors(contiguous)}
            save_file(contiguous, temporary, metadata={"lorapar": json.dumps(facts)})
        except SafetensorError as error:
            # safetensors reports the operating system's error as text only.
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `save_tensors` wrote; InputError where the file is missing, cut short, changed since, or another's."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lorapar")
            # Copied out of the file, which Windows does not replace while it is mapped into memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: corrupt or truncated safetensors ({error})") from None
    if text is None:
        raise InputError(f"{path}: not an artefact of lorapar (its metadata lacks the key 'lorapar')")
    metadata = json.loads(text)
    if metadata.pop("sha256", None) != sha256_tensors(tensors):
        raise InputError(f"{path}: corrupt: its tensors do not give the sha256 that it records")
    return tensors, metadata


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of contiguous tensors on the CPU: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def why_not_whole(path: Path) -> str | None:
    """What is wrong with one file of a checkpoint or an adapter, None where it is there and complete."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.suffix == ".json":
        try:
            read_json(path)
        except InputError:
            return f"{path.name} is corrupt or truncated JSON"
    elif path.suffix == ".jsonl":
        try:
            read_jsonl(path)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is corrupt or truncated safetensors ({error})"
    # torch.save writes a zip archive, whose directory comes last.
    elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return f"{path.name} is corrupt or truncated"
    return None


def sha256_file(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """A digest of a JSON-like value that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
