"""The labelled rows: `labels.jsonl` read and checked, and the rows of a split and of some systems."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..errors import InputError
from ..files import read_jsonl
from .rows import TOLD, to_dataset, without_arrows_nulls
from .tables import without_nulls

LABELLED_COLUMNS = ("id", "prompt", "completion", "answer", "split", "source", "system")


def load_labels(path: Path) -> Dataset:
    """The labelled rows; InputError for a line that lacks what later stages read."""
    try:
        rows = read_jsonl(path)
    except InputError as error:
        raise InputError(f"{error}; restore it, or delete it to have it made again") from None
    for number, row in enumerate(rows, start=1):
        for column in LABELLED_COLUMNS:
            if row.get(column) is None:
                raise InputError(f"{path}: line {number} has no {column!r}; label writes {', '.join(LABELLED_COLUMNS)}")
        if row["system"] not in (1, 2) or row["split"] not in ("train", "held_out"):
            given = row["system"], row["split"]
            raise InputError(f"{path}: line {number}: system and split are {given}, allowed: 1 or 2, train or held_out")
    # Older files hold every message's keys in each, as nulls, and so the keys of every call's arguments and every tool.
    turns = (
        turn for row in rows for name in ("prompt", "completion") if isinstance(row[name], list) for turn in row[name]
    )
    if any(value is None for turn in turns for value in turn.values()):
        rows = [{**row, **without_nulls({name: row[name] for name in TOLD if name in row})} for row in rows]
    return to_dataset(rows)


def rows_of(dataset: Dataset, systems: Sequence[int], split: str = "train") -> Dataset:
    """The rows of a split that carry one of the systems' labels; all rows where there are no such columns.

    Raises InputError where none is left.
    """
    dataset = without_arrows_nulls(dataset)
    columns = dataset.column_names
    of_system = dataset["system"] if "system" in columns else [None] * len(dataset)
    of_split = dataset["split"] if "split" in columns else [None] * len(dataset)
    keep = [
        i
        for i, (system, part) in enumerate(zip(of_system, of_split))
        if ("system" not in columns or system in systems) and ("split" not in columns or part == split)
    ]
    if not keep:
        raise InputError(
            f"data: no {split} row is labelled System {' or '.join(map(str, systems))}; "
            "change the labelling rule or its threshold, or give other rows"
        )
    return dataset.select(keep)


def put_aside(dataset: Dataset, system: int, count: int) -> tuple[Dataset, Dataset]:
    """(the labelled rows without those put aside, those): the train rows of `system` with the `count` smallest digests
    of their ids, whatever the rows' order. Rows of the same id stay together; of a prompt that has rows of both
    systems, the other's are in neither.

    Raises InputError unless a train row of the system is left.
    """
    own = rows_of(dataset, [system])
    ids = sorted(set(own["id"]), key=lambda name: hashlib.sha256(str(name).encode()).digest())
    if count >= len(ids):
        raise InputError(
            f"grpo.watch_rows: got {count}, allowed: at most {len(ids) - 1}, since {len(ids)} train rows are labelled "
            f"System {system} and stage 1 needs one"
        )
    chosen = set(ids[:count])
    aside = [
        i for i, (name, part) in enumerate(zip(dataset["id"], dataset["split"])) if name in chosen and part == "train"
    ]
    taken, of_system = set(aside), dataset["system"]
    rest = dataset.select([i for i in range(len(dataset)) if i not in taken])
    return rest, dataset.select([i for i in aside if of_system[i] == system])


def once_a_prompt(dataset: Dataset) -> Dataset:
    """The first row of each `id`, which is that of a prompt; all rows where there is no such column."""
    first = {name: i for i, name in reversed(list(enumerate(dataset["id"])))} if "id" in dataset.column_names else {}
    return dataset.select(sorted(first.values())) if first and None not in first else dataset


def drawn(dataset: Dataset, system: int, count: int | None, seed: int) -> Dataset:
    """At most `count` training rows of a system, drawn by the seed; None: all of them, in the seed's order."""
    rows = rows_of(dataset, [system]).shuffle(seed=seed)
    return rows.select(range(min(count or len(rows), len(rows))))
