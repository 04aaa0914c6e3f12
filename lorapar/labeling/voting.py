"""From votes to labels: the majority by weight, ties by a rule, a person's correction before both; votes are kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..data.answers import text_of
from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

TIES = ("system1", "system2", "drop", "ask")
COLUMN = "column:"  # what the name of a voter that reads labels from a column begins with
LABEL_COLUMNS = ("system", "votes", "agreement", "teachers", "decided_by")


class Voter(Protocol):
    """Anything that votes: 1 (System 1), 2 (System 2) or None (no vote) for each row."""

    name: str

    def vote(self, rows: "Dataset") -> list[int | None]: ...


def label(
    dataset: "Dataset",
    teachers: Sequence[Voter],
    votes: Mapping[str, Sequence[int | None]] | None = None,
    ties: str = "system2",
    weights: Mapping[str, float] | None = None,
    corrections: Mapping[str, int] | None = None,
) -> "Dataset":
    """`dataset` with the columns `system` (1 | 2), `votes` ({name: 1 | 2 | None}), `agreement`, `teachers` and
    `decided_by` ("votes" | "tie" | "no_votes" | "person").

    Args:
        teachers: voters of any kind. votes: votes cast already, by the voter's name; that voter is not asked again.
        ties: what becomes of a row with equal weight for both systems, or with no vote: "system1", "system2", or left
        out of the data ("drop"); "ask" is "system2" where the reserves have not broken the tie. Where a column
        of labels is the only voter, a row without a label is refused, unless it is to be dropped.
        weights: of a voter's vote, else 1. corrections: a person's labels by `id`, which override the votes.

    `agreement` is the majority's share of the cast votes, by weight: 0.5 at a tie, 0 where no vote was cast. Labels
    that the data set already has are replaced.
    """
    return labelled_and_dropped(dataset, teachers, votes, ties, weights, corrections)[0]


def labelled_and_dropped(
    dataset: "Dataset",
    teachers: Sequence[Voter],
    votes: Mapping[str, Sequence[int | None]] | None = None,
    ties: str = "system2",
    weights: Mapping[str, float] | None = None,
    corrections: Mapping[str, int] | None = None,
) -> tuple["Dataset", "Dataset"]:
    """(what `label` returns; the rows that `ties="drop"` leaves out, with the same columns and `system` 0)."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    if ties not in TIES:
        raise InputError(f"label.ties: unknown rule {ties!r}; allowed: {', '.join(TIES)}")
    cast = {name: list(given) for name, given in (votes or {}).items()}
    cast |= votes_of([voter for voter in teachers if voter.name not in cast], dataset)
    if not cast:
        raise InputError("label.voters: expected at least one voter or votes that were cast already, got none")
    for name, given in cast.items():
        if len(given) != len(dataset):
            raise InputError(f"label: {name} cast {len(given)} votes for {len(dataset)} rows")
        for vote in given:
            if vote not in (1, 2, None):
                raise InputError(f"label: {name} voted {vote!r}; allowed: 1, 2 or None")

    corrected = corrections or {}
    ids = check_corrections(corrected, dataset) if corrected else []
    if ties != "drop" and all(name.startswith(COLUMN) for name in cast):
        _check_labels(cast, dataset, corrected)
    systems, agreements, decided, by_row = [], [], [], []
    for index in range(len(dataset)):
        of_row = {name: given[index] for name, given in cast.items()}
        system, agreement, by = decide(of_row, ties, weights or {})
        if corrected and ids[index] in corrected:
            system, by = corrected[ids[index]], "person"
        systems.append(system)
        agreements.append(agreement)
        decided.append(by)
        by_row.append(of_row)
    added = Dataset.from_dict(
        {
            "system": systems,
            "votes": by_row,
            "agreement": agreements,
            "teachers": [list(cast)] * len(dataset),
            "decided_by": decided,
        },
        features=Features(
            system=Value("int64"),
            votes={name: Value("int64") for name in cast},
            agreement=Value("float64"),
            teachers=List(Value("string")),
            decided_by=Value("string"),
        ),
    )
    bare = dataset.remove_columns([name for name in LABEL_COLUMNS if name in dataset.column_names])
    labelled = concatenate_datasets([bare, added], axis=1)
    with_label = [index for index, system in enumerate(systems) if system]
    dropped = [index for index, system in enumerate(systems) if not system]
    return labelled.select(with_label), labelled.select(dropped)


def _check_labels(cast: Mapping[str, Sequence[int | None]], dataset: "Dataset", corrected: Mapping[str, int]) -> None:
    """InputError where nothing says which system a row has: its label is not there, and nobody else votes."""
    empty = [index for index, (row_id, *votes) in enumerate(zip(dataset["id"], *cast.values()))
             if not any(votes) and str(row_id) not in corrected]  # fmt: skip
    if empty:
        first = dataset[empty[0]]
        name = next(iter(cast)).removeprefix(COLUMN)
        raise InputError(
            f"label.column: {name!r} is empty in {len(empty)} of {len(dataset)} rows, first in row {first['id']} (its "
            f"prompt: {beginning(first)}); fill it in, leave such rows out with label.ties: drop, or have others vote "
            f"on them: label.voters: [{{name: column, column: {name}}}, operations] with label.weights: "
            f'{{"{COLUMN}{name}": 2}}'
        )


def beginning(row: Mapping[str, Any]) -> str:
    """The first words of what a row's user asks, by which a person finds it."""
    prompt = row["prompt"]
    return f"{(prompt if isinstance(prompt, str) else text_of(prompt[-1:])).strip()!r:.40}"


def check_corrections(corrections: Mapping[str, int], dataset: "Dataset") -> list[str]:
    """The rows' ids; InputError for a correction of a row that is not among them."""
    ids = [str(row_id) for row_id in dataset["id"]]
    strays = set(corrections).difference(ids)
    if strays:
        raise InputError(f"label.corrections: no row has the id {min(strays)!r}; {len(strays)} such in all")
    return ids


def votes_of(voters: Sequence[Voter], dataset: "Dataset") -> dict[str, list[int | None]]:
    """{name: votes on every row}; InputError for two voters of one name."""
    for name, count in Counter(voter.name for voter in voters).items():
        if count > 1:
            raise InputError(f"label.voters: {count} voters are called {name!r}; each needs a name of its own")
    return {voter.name: list(voter.vote(dataset)) for voter in voters}


def decide(votes: Mapping[str, int | None], ties: str, weights: Mapping[str, float]) -> tuple[int, float, str]:
    """(1 or 2, or 0 for a row to drop; the majority's share of the cast votes; "votes", "tie" or "no_votes")."""
    first, second = weigh(votes, weights)
    agreement = max(first, second) / (first + second) if first + second else 0.0
    system = majority(votes, weights)
    if system is not None:
        return system, agreement, "votes"
    return {"system1": 1, "system2": 2, "ask": 2, "drop": 0}[ties], agreement, "tie" if first else "no_votes"


def majority(votes: Mapping[str, int | None], weights: Mapping[str, float]) -> int | None:
    """The system with the greater weight of votes, 1 or 2; None at a tie, and where no vote was cast."""
    first, second = weigh(votes, weights)
    # Weights such as 0.1 + 0.2 and 0.3 are equal but for rounding.
    if abs(first - second) <= 1e-9:
        return None
    return 1 if first > second else 2


def weigh(votes: Mapping[str, int | None], weights: Mapping[str, float]) -> tuple[float, float]:
    """(weight of the votes for System 1, weight of those for System 2); a voter without a weight counts 1."""
    first, second = (sum(weights.get(name, 1.0) for name, vote in votes.items() if vote == system) for system in (1, 2))
    return first, second
