"""The labelled rows: `labels.jsonl` read and checked, and the rows of a split and of some systems."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..errors import InputError
from ..files import read_jsonl
from .rows import TOLD, to_dataset, without_arrows_nulls
from .tables import without_nulls

# Evaluated on while stage 1 trains, at most, where the recipe does not say how many: each evaluation takes them all.
EVAL_ROWS = 256
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


def put_aside(
    dataset: Dataset, systems: Sequence[int], count: int, key: str = "grpo.watch_rows"
) -> tuple[Dataset, Dataset]:
    """(the labelled rows without those put aside, those): the train rows of `systems` with the `count` smallest digests
    of their ids, whatever the rows' order. Rows of the same id stay together; of a prompt that has rows of both
    systems, those of a system that is not asked for are in neither.

    key: of the recipe, which asks for it. Raises InputError unless a train row of the systems is left.
    """
    own = rows_of(dataset, systems)
    ids = sorted(set(own["id"]), key=lambda name: hashlib.sha256(str(name).encode()).digest())
    if count >= len(ids):
        raise InputError(
            f"{key}: got {count}, allowed: at most {len(ids) - 1}, since {len(ids)} train rows are labelled "
            f"System {' or '.join(map(str, systems))} and stage 1 needs one"
        )
    chosen = set(ids[:count])
    aside = [
        i for i, (name, part) in enumerate(zip(dataset["id"], dataset["split"])) if name in chosen and part == "train"
    ]
    taken, of_system = set(aside), dataset["system"]
    rest = dataset.select([i for i in range(len(dataset)) if i not in taken])
    return rest, dataset.select([i for i in aside if of_system[i] in systems])


def once_a_prompt(dataset: Dataset) -> Dataset:
    """The first row of each `id`, which is that of a prompt; all rows where there is no such column."""
    first = {name: i for i, name in reversed(list(enumerate(dataset["id"])))} if "id" in dataset.column_names else {}
    return dataset.select(sorted(first.values())) if first and None not in first else dataset


def eval_rows(dataset: Dataset, systems: Sequence[int], asked: int | float | None) -> tuple[Dataset, Dataset]:
    """(the labelled rows without those that stage 1 evaluates on, those), by `put_aside`.

    asked: `sft.eval_rows`, a number of rows or a share of the systems' train rows; None: a tenth, at most EVAL_ROWS.
    """
    own = len(set(rows_of(dataset, systems)["id"]))
    return put_aside(dataset, systems, rows_asked(asked, own), "sft.eval_rows")


def rows_asked(asked: int | float | None, own: int) -> int:
    """How many of `own` rows `sft.eval_rows` puts aside."""
    if isinstance(asked, int):
        return asked
    return max(1, min(round((asked or 0.1) * own), own if asked else EVAL_ROWS))


def drawn(dataset: Dataset, system: int, count: int | None, seed: int) -> Dataset:
    """At most `count` training rows of a system, drawn by the seed; None: all of them, in the seed's order."""
    rows = rows_of(dataset, [system]).shuffle(seed=seed)
    return rows.select(range(min(count or len(rows), len(rows))))
