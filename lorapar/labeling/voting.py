"""From votes to labels: the majority of the votes cast, ties by a stated rule, every vote kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

TIES = ("system1", "system2", "drop")
LABEL_COLUMNS = ("system", "votes", "agreement", "teachers")


class Teacher(Protocol):
    """Anything that votes: 1 (System 1), 2 (System 2) or None (no vote) for each row."""

    name: str

    def vote(self, rows: "Dataset") -> list[int | None]: ...


def label(
    dataset: "Dataset",
    teachers: Sequence[Teacher],
    votes: Mapping[str, Sequence[int | None]] | None = None,
    ties: str = "system2",
) -> "Dataset":
    """`dataset` with the columns `system` (1 | 2), `votes` ({name: 1 | 2 | None}), `agreement` and
    `teachers`.

    `votes` holds votes that were cast already, by teacher's name; a teacher of that name is not asked again.
    A row with as many votes for one system as for the other, or with none at all, goes by `ties`: to
    "system1", to "system2", or out of the data ("drop"). `agreement` is the share of the cast votes that the
    majority has: 0.5 at a tie, 0 where no vote was cast. Labels that the data set has already are replaced.
    """
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    if ties not in TIES:
        raise InputError(f"label.ties: unknown rule {ties!r}; allowed: {', '.join(TIES)}")
    cast = {name: list(given) for name, given in (votes or {}).items()}
    names = [teacher.name for teacher in teachers]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"label.voters: {count} voters are called {name!r}; each needs a name of its own")
    for teacher in teachers:
        if teacher.name not in cast:
            cast[teacher.name] = list(teacher.vote(dataset))
    if not cast:
        raise InputError("label.voters: expected at least one voter or votes that were cast already, got none")
    for name, given in cast.items():
        if len(given) != len(dataset):
            raise InputError(f"label: {name} cast {len(given)} votes for {len(dataset)} rows")
        for vote in given:
            if vote not in (1, 2, None):
                raise InputError(f"label: {name} voted {vote!r}; allowed: 1, 2 or None")

    systems, agreements, by_row = [], [], []
    for index in range(len(dataset)):
        of_row = {name: given[index] for name, given in cast.items()}
        first = sum(vote == 1 for vote in of_row.values())
        second = sum(vote == 2 for vote in of_row.values())
        tie = {"system1": 1, "system2": 2, "drop": 0}[ties]
        systems.append(1 if first > second else 2 if second > first else tie)
        agreements.append(max(first, second) / (first + second) if first + second else 0.0)
        by_row.append(of_row)
    added = Dataset.from_dict(
        {
            "system": systems,
            "votes": by_row,
            "agreement": agreements,
            "teachers": [list(cast)] * len(dataset),
        },
        features=Features(
            system=Value("int64"),
            votes={name: Value("int64") for name in cast},
            agreement=Value("float64"),
            teachers=List(Value("string")),
        ),
    )
    bare = dataset.remove_columns([name for name in LABEL_COLUMNS if name in dataset.column_names])
    labelled = concatenate_datasets([bare, added], axis=1)
    return labelled.select([index for index, system in enumerate(systems) if system])
