"""Local data files as rows, {column: value}: found by a name, unpacked, and read as they are.

    a file, a folder, or a pattern  →  files  →  bytes, decompressed  →  rows

Values stay what the file says: those of .csv and .tsv are text, those of the others have their types. `datasets` reads
such files too, but guesses types (an answer 007 becomes 7) and keeps a copy in its cache. What a file is, its content
decides where that is certain: a .jsonl may hold one JSON array, a .json one object a line.
"""

import codecs
import csv
import glob
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from .messages import CHATS, is_chat

FILE_FORMS = (".jsonl", ".json", ".csv", ".parquet", ".ndjson", ".tsv", ".arrow")
# Suffixes behind those, and pyarrow's names of them.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
ALLOWED = f"{', '.join(FILE_FORMS)}, each also with {', '.join(COMPRESSIONS)}"
# What `datasets` and the hub write beside data.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
# By which a file's name says what split it belongs to (`datasets` has the same).
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Between the fields of a .csv that has no comma in its header.
SEPARATORS = (",", ";", "\t", "|")
LONGEST_FIELD = 2**31 - 1  # csv's own limit is 131,072 characters; a C long is no larger on Windows


# Which files


def local_path(name: str) -> Path:
    """A source's name as a path, with ~ for the home folder; InputError for one that no file can have."""
    try:
        path = Path(name).expanduser()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data.sources: {name[:80]!r} cannot be a file's name: {error}") from None


def local_files(name: str, split: str = "train") -> list[Path]:
    """The files of this machine that a source's name means, in order; none where it means nothing here.

    A folder means its data files, of those named by a split (train-*.parquet, test/...) the split's; a pattern
    (data/*.jsonl) the data files that fit it.
    """
    path = local_path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path, split)
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
    return [Path(file) for file in found if os.path.isfile(file) and form_of(Path(file))]


def _files_in(folder: Path, split: str) -> list[Path]:
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and form_of(path)]
    files = [path for path in inside if path.name not in NO_DATA and not any(part[0] in "._" for part in path.parts)]
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path), []).append(folder / path)
    named = [name for name in splits if name]
    if len(named) < 2:
        return [folder / path for path in files]
    if split not in named:
        raise InputError(f"data.sources: {folder} has the splits {', '.join(named)}, by its files' names, and no "
                         f"{split!r}; set the source's split to one of them")  # fmt: skip
    return splits[split]


def _split_of(path: Path) -> str:
    """The split that a file's name or folders say it belongs to, by the hub's words for them; "" for none."""
    words = set(re.split(r"[-._ 0-9/\\]+", str(path).casefold()))
    return next((split for split, names in SPLIT_WORDS.items() if words & names), "")


def form_of(path: Path) -> str:
    """The form of a data file by its name, in small letters and without a compression's suffix; "" for no such name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_FORMS else ""


# Their rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of one local file; InputError, naming the file and the row or line, for what cannot be read."""
    form = form_of(path)
    if form in (".parquet", ".arrow"):
        rows = _columnar(path, form)
    elif form in (".csv", ".tsv"):
        rows = _separated(_text(path), path, form)
    else:
        rows = _json_rows(_text(path), path, lines=form != ".json")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not an object of columns but {type(row).__name__}")
    return rows


def _bytes(path: Path) -> bytes:
    """A file's content, decompressed."""
    import pyarrow

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return data
    try:
        return pyarrow.input_stream(pyarrow.BufferReader(data), compression=compression).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: corrupt or truncated {compression} ({error})") from None


def _text(path: Path) -> str:
    data = _bytes(path)
    packed = next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), None)
    if packed:
        what = f"name it {path.name}{packed}" if packed in COMPRESSIONS else "unpack it"
        raise InputError(f"{path}: not a text file but a compressed one; {what}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (b"\x00" in data[:4] and len(data) > 3):
        raise InputError(f"{path}: not a UTF-8 text file but UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: not a UTF-8 text file (line {line} has the byte 0x{data[error.start]:02x}); save it as UTF-8, "
            "from Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def _json_rows(text: str, path: Path, lines: bool) -> list[Any]:
    """Of a file with one array, one object, or an object a line; `lines`: its name says the last."""
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    # Nested too deeply, and integers of too many digits, which are a ValueError.
    except (ValueError, RecursionError) as error:
        first = text.lstrip().partition("\n")[0]
        # An array that is cut short is no file of lines.
        if (lines and not first.startswith("[")) or ((lines or first.startswith("{")) and _parses(first)):
            return _rows_by_line(text, path)
        raise InputError(f"{path}: corrupt or truncated JSON ({error})") from None
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        kind = type(whole).__name__
        raise InputError(f"{path}: row 1 is not an object of columns but {kind}" if lines else
                         f"{path}: expected a list of rows, got {kind}")  # fmt: skip
    return _rows_within(whole, path, lines)


def _rows_within(whole: dict[str, Any], path: Path, lines: bool) -> list[Any]:
    """The rows of a file that is one object: those under its one key with a list of objects, else itself."""
    tables = {key: value for key, value in whole.items() if _is_table(value)}
    if any(is_chat(value) for value in tables.values()) or set(CHATS) & set(whole) or (lines and len(whole) > 1):
        return [whole]
    if len(tables) == 1 and "tools" not in tables:
        return next(iter(tables.values()))
    if tables and len(tables) == len(whole):
        raise InputError(f"{path}: has rows under several keys ({', '.join(tables)}); keep those of one")
    if whole and not lines and all(isinstance(value, dict | list) for value in whole.values()):
        raise InputError(f"{path}: expected a list of rows, got an object of columns ({', '.join(whole)}); write rows, "
                         "as pandas does with to_json(orient='records')")  # fmt: skip
    return [whole]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, dict) for item in value)


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_by_line(text: str, path: Path) -> list[Any]:
    rows = []
    # Not splitlines(): a JSON string may hold a raw U+2028, which ends a line there and not here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is corrupt or truncated JSON ({error})") from None
    return rows


def _separated(text: str, path: Path, form: str) -> list[dict[str, Any]]:
    """The rows of a .csv or .tsv, whose first line names the columns; columns without a name are left out."""
    csv.field_size_limit(LONGEST_FIELD)
    separator = "\t" if form == ".tsv" else ","
    # A line that spreadsheets write to say so.
    if said := re.match(r"sep=(.)\r?\n", text):
        separator, text = said[1], text[said.end() :]
    else:
        separator = _separator(text, separator, path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    table: list[list[str]] = []
    try:
        table.extend(fields for fields in reader if fields)
    except csv.Error as error:
        raise InputError(f"{path}: row {max(len(table), 1)} (to line {reader.line_num}) has quotes that do not close, "
                         f"or stand within a field ({error}); double a field's own quotes") from None  # fmt: skip
    if not table:
        return []
    names = [name.strip() for name in table[0]]
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{path}: column {name!r} comes twice in the header")
    for number, fields in enumerate(table[1:], start=1):
        if len(fields) != len(names):
            raise InputError(f"{path}: row {number} has another number of fields than the header ({len(fields)}, not "
                             f"{len(names)}, separated by {separator!r})")  # fmt: skip
    return [{name: value for name, value in zip(names, fields) if name} for fields in table[1:]]


def _separator(text: str, usual: str, path: Path) -> str:
    """The usual one, or the only other one that the header has where it has none of that."""
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=usual, strict=True), [])
    except csv.Error:
        return usual
    if len(header) != 1:
        return usual
    others = [other for other in SEPARATORS if other in header[0]]
    if len(others) > 1:
        raise InputError(f"{path}: its header {header[0]!r} has no {usual!r}, and more than one other separator; write "
                         f"it with {usual!r}")  # fmt: skip
    return others[0] if others else usual


def _columnar(path: Path, form: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    data = pyarrow.BufferReader(_bytes(path))
    try:
        if form == ".parquet":
            table = pyarrow.parquet.read_table(data)
        else:
            # A file of `datasets` is a stream; Feather's begins with this.
            opened = pyarrow.ipc.open_file if data.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
            data.seek(0)
            table = opened(data).read_all()
        return [without_nulls(row) for row in table.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: corrupt or truncated {form[1:]} ({error})") from None


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A columnar file's row without the keys that others' objects have: Arrow gives each object the keys of all."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if item is not None}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {name: cleaned(value) for name, value in row.items()}
