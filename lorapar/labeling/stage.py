"""The label stage's dealings with teachers: ask, keep what they said, say what remains, let a person correct."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, require
from ..files import write_jsonl
from .agreement import fleiss_kappa
from .asking import ask
from .panel import UNANSWERED, UNASKED, Panel, check_weights, examples, make_panel, remaining, store_path, table_of
from .review import read_corrections, write_review
from .store import VoteStore
from .voting import decide

if TYPE_CHECKING:
    from datasets import Dataset

    from ..recipe.sections import Recipe

log = logging.getLogger("lorapar")
KEPT = ("outcome", "reason", "latency", "tokens_in", "tokens_out", "calls", "cost")


def panel_of(recipe: "Recipe", voters: Sequence[str] = ()) -> Panel | None:
    """The recipe's panel, None where it has no teacher; `voters`: the names of the other voters."""
    if recipe.label.teachers:
        return make_panel(recipe.label, recipe.model.name, voters)
    check_weights(recipe.label, voters)
    require(recipe.label.ties != "ask", "label.ties", "ask", "system1, system2 or drop: there is no teacher to ask")
    return None


def ask_panel(
    panel: Panel, rows: "Dataset", local: Mapping[str, Sequence[int | None]], folder: Path, tokenizer: Any
) -> tuple[dict[str, list[int | None]], dict[str, Any]]:
    """Ask what is missing, write `votes.jsonl`; ({teacher: votes}, facts for the stage's record)."""
    with VoteStore(store_path(panel.label, folder)) as store:
        codes = ask(panel, rows, store, local, tokenizer)
        write_jsonl(folder / "votes.jsonl", _kept(panel, rows, codes, store))
        calls, cost = store.spent()
    unanswered = sum(votes.count(UNANSWERED) for votes in codes.values())
    if unanswered:
        log.warning("label: %d of %d votes are unanswered; votes.jsonl says why", unanswered,
                    len(rows) * len(panel.seats))  # fmt: skip
    votes = {name: [code if code in (1, 2) else None for code in given] for name, given in codes.items()}
    facts = {"calls": calls, "cost": round(cost, 6), "unanswered": unanswered}
    cast = {**local, **votes}
    kappa = fleiss_kappa([(row.count(1), row.count(2)) for row in zip(*cast.values())])
    return votes, facts | {"kappa": kappa and round(kappa, 4)}


def _kept(panel: Panel, rows: "Dataset", codes: Mapping[str, Sequence[int]], store: VoteStore) -> Iterator[dict]:
    """A line of `votes.jsonl` a row: what each teacher said of it and what that took."""
    for example in examples(rows):
        said = {}
        for seat in panel.seats:
            vote, code = store.get(seat.key(example)), codes[seat.name][example.index]
            if vote is None or code == UNASKED:
                said[seat.name] = {"vote": None, "outcome": "not_asked" if code == UNASKED else "unanswered"}
            else:
                said[seat.name] = {"vote": vote.vote, **{key: getattr(vote, key) for key in KEPT}}
        yield {"id": example.id, "votes": said}


def what_remains(panel: Panel, rows: "Dataset", folder: Path, tokenizer: Any) -> str:
    """A table of the calls, tokens and cost that are left to pay; nobody is asked and nothing is written."""
    path = store_path(panel.label, folder)
    with VoteStore(path, read_only=True) if path.exists() else nullcontext() as store:
        return table_of(panel, remaining(panel, rows, store, tokenizer), store.spent() if store else (0, 0.0))


def corrections_of(recipe: "Recipe", folder: Path) -> dict[str, int]:
    """A person's labels: out of the file the recipe names, else out of the folder's review.csv, where it is there."""
    path = Path(recipe.label.corrections).expanduser() if recipe.label.corrections else folder / "review.csv"
    if not path.exists() and recipe.label.corrections is None:
        return {}
    corrections = read_corrections(path)
    if corrections:
        log.info("label: %d labels corrected by a person in %s", len(corrections), path)
    return corrections


def write_split(
    recipe: "Recipe", rows: "Dataset", local: Mapping[str, Sequence[int | None]], panel: Panel | None, folder: Path
) -> tuple[Path, int]:
    """Write the rows on which the votes so far differ, or that have none, into review.csv; (its path, their number)."""
    path = Path(recipe.label.corrections).expanduser() if recipe.label.corrections else folder / "review.csv"
    store_at = store_path(recipe.label, folder)
    if panel is not None and not store_at.is_file():
        raise InputError(f"{store_at}: no such file; run label first, which asks the teachers")
    seats = panel.seats if panel else []
    with VoteStore(store_at, read_only=True) if panel else nullcontext() as store:
        found = []
        for example in examples(rows):
            stored = {seat.name: store.get(seat.key(example)) for seat in seats} if store else {}
            votes = {name: given[example.index] for name, given in local.items()}
            votes |= {name: vote.vote if vote else None for name, vote in stored.items()}
            system, agreement, by = decide(votes, recipe.label.ties, recipe.label.weights)
            if len(set(votes.values()) - {None}) != 1:
                reasons = {name: vote.reason or vote.outcome for name, vote in stored.items() if vote}
                found.append({"id": example.id, "question": example.question, "answer": example.answer,
                              "system": system or "dropped", "agreement": f"{agreement:.2f}", "decided_by": by,
                              "votes": votes, "reasons": reasons})  # fmt: skip
    found.sort(key=lambda row: row["agreement"])
    voters = [*local, *(seat.name for seat in seats)]
    return path, write_review(path, found, voters)


def write_dropped(folder: Path, dropped: "Dataset") -> None:
    """Write the rows that `ties: drop` left out into `dropped.jsonl`, with their votes and no system."""
    path = folder / "dropped.jsonl"
    if len(dropped):
        log.warning("label: %d rows are left out by label.ties: drop; dropped.jsonl has them", len(dropped))
        write_jsonl(path, ({**row, "system": None} for row in dropped))  # pyright: ignore[reportGeneralTypeIssues]
    else:
        path.unlink(missing_ok=True)


def summary(labelled: "Dataset") -> dict[str, int]:
    """How many labels were decided by what, but by votes."""
    counts = Counter(labelled["decided_by"])
    return {f"by_{by}": counts[by] for by in ("tie", "no_votes", "person") if counts[by]}
