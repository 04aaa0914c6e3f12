"""The label stage of a run: `labels.jsonl`, from the voters' and the teachers' votes and a person's corrections."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..data.labels import eval_rows, put_aside, rows_of
from ..data.tables import local_files
from ..data.tokens import check_below, encode
from ..data.turns import labelled as labelled_tokens
from ..distributed import processes
from ..errors import InputError, require
from ..files import sha256_file, write_jsonl
from ..model.load import load_config
from ..recipe.sections import Recipe
from ..stage import LABELS, Facts, Run, Stage
from .agreement import fleiss_kappa
from .asking import ask
from .local import help_with, helped
from .panel import UNANSWERED, UNASKED, Panel, check_weights, examples, make_panel, remaining, store_path, table_of
from .review import read_corrections, write_review
from .store import VoteStore
from .voters import Column, asks_model, make_voters
from .voting import check_corrections, decide, labelled_and_dropped, votes_of

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("lorapar")
REVIEW = "review.csv"
# What votes.jsonl records of each vote.
VOTE_FACTS = ("outcome", "reason", "latency", "tokens_in", "tokens_out", "calls", "cost")


def label_stage(run: Run) -> Facts:
    """Ask every voter about every row, the teachers after the voters that need no network.

    The processes of a launch share what models on this machine are asked; all else is the main process's work.
    """
    recipe, folder = run.recipe, run.folder
    # First, so that a missing key or an unusable template is refused before a model is loaded.
    panel = panel_of(recipe, voter_names(recipe))
    corrections = corrections_of(recipe, folder)
    rows, counts = run.load_rows()
    for source, count in counts.items():
        log.info("label: %s: %s", source, ", ".join(f"{n} {what}" for what, n in count.items()))
    if recipe.data.loss != "last":
        # Before teachers are paid for rows whose turns cannot be told apart.
        for row in cast("Sequence[dict[str, Any]]", rows):
            labelled_tokens(row, run.tokenizer, recipe.data.loss)
    check_corrections(corrections, rows)
    check_tokens(run, rows)
    votes, facts = local_votes(run, rows), {}
    if panel is not None:
        if not processes.is_main():
            help_with(panel.here)
        from_teachers, facts = processes.from_main(lambda: ask_panel(panel, rows, votes, folder, run.tokenizer))
        votes |= from_teachers
    facts = {"sources": counts, **facts}
    return processes.from_main(lambda: _write(run, rows, votes, corrections, facts))


def _write(
    run: Run, rows: "Dataset", votes: Mapping[str, Sequence[int | None]], corrections: Mapping[str, int], facts: Facts
) -> Facts:
    """Decide by the votes and write the labelled rows, and those dropped; the facts for the stage's record."""
    labelled, dropped = _decided(run.recipe, rows, votes, corrections)
    write_dropped(run.folder, dropped)
    write_jsonl(run.folder / LABELS, labelled)
    split_system = list(zip(labelled["split"], labelled["system"]))
    return {
        "rows": len(labelled),
        **({"dropped": len(dropped)} if len(dropped) else {}),
        **facts,
        **decided_otherwise(labelled),
        **{f"{split}_system{s}": split_system.count((split, s)) for split in ("train", "held_out") for s in (1, 2)},
    }


def check_tokens(run: Run, rows: "Dataset") -> None:
    """InputError for a row with a token that the model has no embedding for, before anybody is asked about it."""
    tokenizer = run.tokenizer
    # Only an added token can lie beyond the embedding.
    highest = max(tokenizer.get_added_vocab().values(), default=0)
    if highest < tokenizer.vocab_size:
        return
    embeddings = load_config(run.recipe.model).get_text_config().vocab_size
    for row in rows if highest >= embeddings else ():
        ids = encode(row, tokenizer)[0]  # pyright: ignore[reportArgumentType]
        check_below(embeddings, ids, tokenizer, f"{row['source']}: row {row['id']}")  # pyright: ignore[reportArgumentType, reportCallIssue]


def _decided(
    recipe: Recipe, rows: "Dataset", votes: Mapping[str, Sequence[int | None]], corrections: Mapping[str, int]
) -> tuple["Dataset", "Dataset"]:
    """(the labelled rows, those dropped); InputError where a stage has no row to train on, or scoring none."""
    labelled, dropped = labelled_and_dropped(rows, [], votes, recipe.label.ties, recipe.label.weights, corrections)
    needed = {system for stage in recipe.stages for system in getattr(recipe, stage).systems}
    if recipe.partition.selection != "all":
        needed |= {1, 2}
    column = recipe.label.column
    for system in sorted(needed):
        if column is not None and (system, "train") not in zip(labelled["system"], labelled["split"]):
            raise InputError(
                f"label.column: no train row is labelled System {system} by the column {column!r}; name one that has "
                "both labels, or label with label.voters or label.teachers"
            )
        rows_of(labelled, [system], "train")
    watched = recipe.watched_system()
    left = labelled
    if watched is not None:
        left, _ = put_aside(labelled, [watched], recipe.grpo.watch_rows)
    if "sft" in recipe.stages and recipe.sft.evaluates():
        eval_rows(left, recipe.sft.systems, recipe.sft.eval_rows)
    return labelled, dropped


def labelled_alone(run: Run) -> "Dataset | None":
    """The rows as `label` would label them, None where it would ask a teacher or the model; nothing is written."""
    label = run.recipe.label
    if label.teachers or (label.column is None and any(map(asks_model, label.voters or []))):
        return None
    corrections = corrections_of(run.recipe, run.folder)
    rows, _ = run.load_rows()
    check_corrections(corrections, rows)
    return _decided(run.recipe, rows, local_votes(run, rows), corrections)[0]


def dry_run(run: Run) -> str:
    """A table of what the teachers still have to be asked; nobody is asked and nothing is written."""
    panel = panel_of(run.recipe, voter_names(run.recipe))
    if panel is None:
        return "No call remains: the recipe has no teachers."
    rows, _ = run.load_rows()
    return what_remains(panel, rows, run.folder, run.tokenizer)


def review(run: Run) -> Path:
    """Write the rows on which the votes so far differ as a CSV for a person; nobody is asked."""
    panel = panel_of(run.recipe, voter_names(run.recipe))
    rows, _ = run.load_rows()
    path, count = write_split(run.recipe, rows, local_votes(run, rows), panel, run.folder)
    log.info("label: %d rows to review in %s; write 1 or 2 under corrected and run label again", count, path)
    return path


def local_votes(run: Run, rows: "Dataset") -> dict[str, list[int | None]]:
    """The votes of the voters that need no network."""
    label = run.recipe.label
    if label.column:
        return votes_of([Column(label.column)], rows)
    voters = label.voters or []
    model = run.load_model() if any(map(asks_model, voters)) else None
    made = make_voters(voters, model, run.tokenizer)
    together = [voter for voter, spec in zip(made, voters) if asks_model(spec)]
    alone = [voter for voter in made if voter not in together]
    votes = processes.from_main(lambda: votes_of(alone, rows)) | votes_of(together, rows)
    return {voter.name: votes[voter.name] for voter in made}


def voter_names(recipe: Recipe) -> list[str]:
    """The names of the recipe's voters."""
    if recipe.label.column:
        return [f"column:{recipe.label.column}"]
    return [f"column:{voter.get('column')}" if isinstance(voter, dict) and voter.get("name") == "column"
            else str(_name_of(voter)) for voter in recipe.label.voters or []]  # fmt: skip


def _name_of(voter: str | dict[str, Any]) -> Any:
    return voter if isinstance(voter, str) else voter.get("name")


def panel_of(recipe: Recipe, voters: Sequence[str] = ()) -> Panel | None:
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
    with helped(panel.here), VoteStore(store_path(panel.label, folder)) as store:
        codes = ask(panel, rows, store, local, tokenizer)
        write_jsonl(folder / "votes.jsonl", _vote_lines(panel, rows, codes, store))
        calls, cost = store.spent()
    unanswered = sum(votes.count(UNANSWERED) for votes in codes.values())
    if unanswered:
        log.warning("label: %d of %d votes are unanswered; votes.jsonl says why", unanswered,
                    len(rows) * len(panel.members))  # fmt: skip
    votes = {name: [code if code in (1, 2) else None for code in given] for name, given in codes.items()}
    facts = {"calls": calls, "cost": round(cost, 6), "unanswered": unanswered}
    cast = {**local, **votes}
    kappa = fleiss_kappa([(row.count(1), row.count(2)) for row in zip(*cast.values())])
    return votes, facts | {"kappa": kappa and round(kappa, 4)}


def _vote_lines(panel: Panel, rows: "Dataset", codes: Mapping[str, Sequence[int]], store: VoteStore) -> Iterator[dict]:
    """The lines of `votes.jsonl`, one a row: each teacher's vote and what it cost."""
    for example in examples(rows):
        votes = {}
        for member in panel.members:
            vote, code = store.get(member.key(example)), codes[member.name][example.index]
            if vote is None or code == UNASKED:
                votes[member.name] = {"vote": None, "outcome": "not_asked" if code == UNASKED else "unanswered"}
            else:
                votes[member.name] = {"vote": vote.vote, **{key: getattr(vote, key) for key in VOTE_FACTS}}
        yield {"id": example.id, "votes": votes}


def what_remains(panel: Panel, rows: "Dataset", folder: Path, tokenizer: Any) -> str:
    """A table of the calls, tokens and cost that are left to pay; nobody is asked and nothing is written."""
    path = store_path(panel.label, folder)
    with VoteStore(path, read_only=True) if path.exists() else nullcontext() as store:
        return table_of(panel, remaining(panel, rows, store, tokenizer), store.spent() if store else (0, 0.0))


def corrections_of(recipe: Recipe, folder: Path) -> dict[str, int]:
    """A person's labels, from the file that the recipe names or else from the folder's review.csv, if there is one."""
    path = Path(recipe.label.corrections).expanduser() if recipe.label.corrections else folder / REVIEW
    if not path.exists() and recipe.label.corrections is None:
        return {}
    corrections = read_corrections(path)
    if corrections:
        log.info("label: %d labels corrected by a person in %s", len(corrections), path)
    return corrections


def write_split(
    recipe: Recipe, rows: "Dataset", local: Mapping[str, Sequence[int | None]], panel: Panel | None, folder: Path
) -> tuple[Path, int]:
    """Write the rows on which the votes so far differ, or that have none, into review.csv; (its path, their number)."""
    path = Path(recipe.label.corrections).expanduser() if recipe.label.corrections else folder / REVIEW
    store_at = store_path(recipe.label, folder)
    if panel is not None and not store_at.is_file():
        raise InputError(f"{store_at}: no such file; run label first, which asks the teachers")
    members = panel.members if panel else []
    with VoteStore(store_at, read_only=True) if panel else nullcontext() as store:
        split, listed = [], set()
        for example in examples(rows):
            stored = {member.name: store.get(member.key(example)) for member in members} if store else {}
            votes = {name: given[example.index] for name, given in local.items()}
            votes |= {name: vote.vote if vote else None for name, vote in stored.items()}
            system, agreement, by = decide(votes, recipe.label.ties, recipe.label.weights)
            # A correction is of a prompt, and of all its completions.
            if len(set(votes.values()) - {None}) != 1 and example.id not in listed:
                listed.add(example.id)
                reasons = {name: vote.reason or vote.outcome for name, vote in stored.items() if vote}
                split.append({"id": example.id, "question": example.question, "answer": example.answer,
                              "system": system or "dropped", "agreement": f"{agreement:.2f}", "decided_by": by,
                              "votes": votes, "reasons": reasons})  # fmt: skip
    split.sort(key=lambda row: row["agreement"])
    voters = [*local, *(member.name for member in members)]
    return path, write_review(path, split, voters)


def write_dropped(folder: Path, dropped: "Dataset") -> None:
    """Write the rows that `ties: drop` left out into `dropped.jsonl`, with their votes and no system."""
    path = folder / "dropped.jsonl"
    if len(dropped):
        log.warning("label: %d rows are left out by label.ties: drop; dropped.jsonl has them", len(dropped))
        write_jsonl(path, ({**row, "system": None} for row in dropped))  # pyright: ignore[reportGeneralTypeIssues]
    else:
        path.unlink(missing_ok=True)


def decided_otherwise(labelled: "Dataset") -> dict[str, int]:
    """How many labels were decided by something other than votes: {"by_tie": 3, ...}."""
    counts = Counter(labelled["decided_by"])
    return {f"by_{by}": counts[by] for by in ("tie", "no_votes", "person") if counts[by]}


def check(run: Run) -> None:
    """Make the voters: each refuses options that it does not have."""
    if run.recipe.label.column is None:
        # Voters that ask the model keep it for later, so that their options are checked without one.
        make_voters(run.recipe.label.voters or [], cast(Any, "not loaded"), cast(Any, "not loaded"))


def inputs(run: Run) -> Facts:
    """What labels depend on beside the recipe's sections: local data, template and corrections by their content."""
    recipe, facts = run.recipe, {}
    if recipe.lora.get("base") and any(map(asks_model, recipe.label.voters or [])):
        facts["base"] = recipe.lora["base"]
    paths = [path for source in recipe.data.sources for path in local_files(source.name, source.split)]
    paths += [Path(path).expanduser() for path in (recipe.label.template, recipe.label.corrections) if path]
    facts["data"] = {str(path): sha256_file(path) for path in paths if path.is_file()}
    if (run.folder / REVIEW).is_file():
        facts["review"] = read_corrections(run.folder / REVIEW)
    return facts


def stage(recipe: Recipe) -> Stage:
    return Stage(
        "label",
        run=label_stage,
        sections=("model", "data", "label"),
        writes=(LABELS, *(["votes.jsonl"] if recipe.label.teachers else [])),
        outside=inputs,
        check=check,
        together=True,
    )
