"""Voters that look beyond the worked answer, at the target model or at a column of labels; and all voters by name."""

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..data.columns import is_blank
from ..data.task_scores import is_right
from ..data.tokens import prompt_ids
from ..errors import InputError, suggestion
from ..model.generate import answer_greedily
from ..progress import Progress
from .rules import Operations, ReasoningSteps
from .voting import COLUMN, Voter, beginning

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Probe:
    """System 1 if the target model's greedy short answer is right, else System 2.

    What the model answers without working needs no deliberation. A row without an answer to compare with gets no vote.
    In a launch every process has it vote on the same rows, and each asks its model about a part of them.
    """

    name = "probe"
    asks_model = True

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        max_new_tokens: int = 16,
        batch_size: int = 16,
    ):
        for key, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"label.voters: {key} of probe must be a whole number of at least 1, got {value!r}")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def vote(self, rows: "Dataset") -> list[int | None]:
        asked = [index for index, answer in enumerate(rows["answer"]) if answer]
        ids = [prompt_ids(rows[index], self.tokenizer) for index in asked]
        with Progress("label: probe", len(ids), "row") as progress:
            given = answer_greedily(
                self.model, self.tokenizer, ids, self.max_new_tokens, self.batch_size, progress.update, shared=True
            )
        votes: list[int | None] = [None] * len(rows)
        for index, text in zip(asked, given):
            votes[index] = 1 if is_right(text, rows[index]) else 2
        return votes


class Column:
    """The label in a column of the data: 1 or 2 in any form of a number, "System1", "system 2", "S1", ...; an empty
    cell is no vote."""

    def __init__(self, column: str):
        self.column = column
        self.name = f"{COLUMN}{column}"

    def vote(self, rows: "Dataset") -> list[int | None]:
        if self.column not in rows.column_names:
            raise InputError(
                f"label.column: the rows have no column {self.column!r}; they have {', '.join(rows.column_names)}"
            )
        votes: list[int | None] = []
        for index, value in enumerate(rows[self.column]):
            label = _label(value)
            if label is None and not is_blank(value):
                counts = Counter(repr(other) for other in rows[self.column] if not is_blank(other))
                there = ", ".join(f"{other:.40} ({count})" for other, count in counts.most_common(6))
                raise InputError(
                    f"label.column: {self.column!r} of row {rows['id'][index]} is {value!r:.60}; allowed: 1, 2, "
                    f"System1, System2, S1, S2 (its prompt: {beginning(rows[index])}); the column has {there}: write 1 "
                    "in place of what means System 1 (answered immediately), 2 of what means System 2 (worked out)"
                )
            votes.append(label)
        return votes


def _label(value: Any) -> int | None:
    """1 or 2 where a cell says so beyond doubt. True is no 1: a column of yes and no does not say which system."""
    text = str(value).strip().casefold()
    system = re.fullmatch(r"(?:s|sys|system)[\s_-]*([12])(?:\.0+)?", text)
    if system:
        return int(system[1])
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in (1, 2) else None


class Random:
    """A control: each row is System 1 with probability `system1`, whatever it holds; the same row, seed and share, the
    same vote."""

    name = "random"

    def __init__(self, system1: float = 0.5, seed: int = 0):
        if not isinstance(system1, float | int) or isinstance(system1, bool) or not 0 <= system1 <= 1:
            raise InputError(f"label.voters: system1 of random must be a share in [0, 1], got {system1!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InputError(f"label.voters: seed of random must be a whole number, got {seed!r}")
        self.system1, self.seed = system1, seed

    def vote(self, rows: "Dataset") -> list[int | None]:
        # By its id, so that a row's vote does not depend on the other rows.
        draws = (sha256(f"{self.seed} {row_id}".encode()).digest()[:8] for row_id in rows["id"])
        return [1 if int.from_bytes(draw, "big") < self.system1 * 2**64 else 2 for draw in draws]


# Every voter that a recipe can list, by name; the arguments of its class are its options. A class with `asks_model` is
# given the target model and its tokenizer first, and does no more than keep them until it votes. In a launch such a
# voter votes in every process, the others in the main one alone.
VOTERS: dict[str, Any] = {
    "operations": Operations,
    "steps": ReasoningSteps,
    "probe": Probe,
    "column": Column,
    "random": Random,
}


def asks_model(spec: str | dict[str, Any]) -> bool:
    """Whether the voter that a recipe names asks the target model."""
    name = spec if isinstance(spec, str) else spec.get("name")
    return getattr(VOTERS.get(str(name)), "asks_model", False)


def make_voters(
    specs: Sequence[str | dict[str, Any]],
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> list[Voter]:
    """The voters that a recipe names: "operations", or {"name": "operations", "threshold": 2}.

    Options are the arguments of the voter's class. `model` and `tokenizer` are for voters that ask the target model.
    """
    return [_make_voter({"name": spec} if isinstance(spec, str) else dict(spec), model, tokenizer) for spec in specs]


def _make_voter(options: dict[str, Any], model: Any, tokenizer: Any) -> Voter:
    name = options.pop("name", None)
    if name not in VOTERS:
        raise InputError(f"label.voters: unknown voter {name!r}; {suggestion(name, VOTERS)}")
    voter = VOTERS[name]
    allowed = [key for key in inspect.signature(voter).parameters if key not in ("model", "tokenizer")]
    for key in options:
        if key not in allowed:
            raise InputError(f"label.voters: {name} has no option {key!r}; allowed: {', '.join(allowed)}")
    if asks_model(name):
        if model is None or tokenizer is None:
            raise InputError(f"label.voters: {name} asks the target model, so it needs a model and a tokenizer")
        return voter(model, tokenizer, **options)
    if voter is Column and "column" not in options:
        raise InputError("label.voters: column needs the option 'column', the name of the column with the labels")
    return voter(**options)
