"""The labelled rows: `labels.jsonl` read and checked, and the rows of a split and of some systems."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..errors import InputError
from ..files import read_jsonl
from .rows import to_dataset

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
    return to_dataset(rows)


def rows_of(dataset: Dataset, systems: Sequence[int], split: str = "train") -> Dataset:
    """The rows of a split that carry one of the systems' labels; all rows where there are no such columns.

    Raises InputError where none is left.
    """
    columns = dataset.column_names
    keep = [
        i
        for i in range(len(dataset))
        if ("system" not in columns or dataset[i]["system"] in systems)
        and ("split" not in columns or dataset[i]["split"] == split)
    ]
    if not keep:
        raise InputError(
            f"data: no {split} row is labelled System {' or '.join(map(str, systems))}; "
            "change the labelling rule or its threshold, or give other rows"
        )
    return dataset.select(keep)
