"""Reading one source of the recipe: a local file, a hub data set, or tasks that reasoning-gym makes.

Each gives plain rows, {column: value}, as they stand there; `data.py` brings them into one form.
"""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, not_installed, suggestion
from ..files import read_json, read_text

if TYPE_CHECKING:
    from ..recipe.sections import SourceConfig

FILE_FORMS = (".jsonl", ".json", ".csv", ".parquet")


def _read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of one local file; every value of a .csv is a string."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        rows = []
        # Not splitlines(): a JSON string may hold a raw U+2028, which ends a line there and not here.
        for number, line in enumerate(read_text(path).lstrip("\ufeff").split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}: line {number} is corrupt or truncated JSON ({error})") from None
    elif path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise InputError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path).lstrip("\ufeff"), newline=""))
        rows = list(reader)
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise InputError(f"{path}: row {number} has another number of fields than the header")
    else:
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: corrupt or truncated parquet ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not an object of columns but {type(row).__name__}")
    return rows


def _read_hub(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a hub data set, "owner/name" or "owner/name:config"."""
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split).to_list()
    # `datasets` raises FileNotFoundError, ConnectionError (both OSError) or ValueError for an unknown name,
    # config or split, for a hub out of reach and for data sets that would need to run code.
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"data.sources: {name!r} (split {split!r}) could not be read from the hub: {error}") from error


def _make_reasoning_gym(source: "SourceConfig") -> list[dict[str, Any]]:
    """`size` rows (1000) made by the tasks named, in equal shares; row i of a task comes from seed + i.

    `source.config` holds options for every task, or {task: options} where all its keys are tasks of this
    source.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise InputError(
            f"data.sources: {source.name!r} needs {not_installed('reasoning-gym, which', 'quickstart')}"
        ) from None

    tasks = [task.strip() for task in source.name.partition(":")[2].split(",")]
    size = 1000 if source.size is None else source.size
    rows = []
    for index, task in enumerate(tasks):
        if task not in DATASETS:
            near = suggestion(task, sorted(DATASETS), count=3)
            raise InputError(f"data.sources: reasoning_gym has no task {task!r}; {near}")
        options = source.config.get(task, {}) if set(source.config) <= set(tasks) else source.config
        allowed = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
        for key in options:
            if key not in allowed:
                raise InputError(
                    f"data.sources: config key {key!r} is no option of {task}; allowed: {', '.join(sorted(allowed))}"
                )
        count = size // len(tasks) + (index < size % len(tasks))
        try:
            entries = reasoning_gym.create_dataset(task, size=count, seed=source.seed, **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(f"data.sources: {task} does not take config {options}: {error}") from error
        for position in range(count):
            entry = entries[position]
            if entry["answer"] is None:
                raise InputError(f"data.sources: reasoning_gym's {task} gives no single answer (row {position})")
            # The metadata of two tasks have nothing in common, so they stay JSON text.
            metadata = json.dumps(entry["metadata"], default=str)
            rows.append(
                {
                    "question": entry["question"],
                    "answer": str(entry["answer"]),
                    "task": task,
                    "metadata": metadata,
                }
            )
    return rows


def read_source(source: "SourceConfig") -> list[dict[str, Any]]:
    if source.size is not None and source.size < 1:
        raise InputError(f"data.sources: size of {source.name!r} must be at least 1, got {source.size}")
    path = Path(source.name).expanduser()
    made = source.name.startswith("reasoning_gym:")
    for key, value in (("seed", source.seed), ("config", source.config)):
        if value and not made:
            raise InputError(f"data.sources: {key} of {source.name!r}: got {value!r}; only reasoning_gym:<task> has it")
    if made:
        rows = _make_reasoning_gym(source)
    elif path.suffix in FILE_FORMS:
        rows = _read_file(path)
    elif path.exists():
        raise InputError(f"{path}: not a data file; allowed: {', '.join(FILE_FORMS)}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source.name):
        rows = _read_hub(source.name, source.split)
    else:
        raise InputError(
            f"data.sources: {source.name!r} is no file ({', '.join(FILE_FORMS)}), hub id (owner/name or "
            f"owner/name:config) or reasoning_gym:<task>[,<task>...]"
        )
    rows = rows[: source.size]
    if not rows:
        raise InputError(f"data.sources: {source.name} has no rows")
    return rows
