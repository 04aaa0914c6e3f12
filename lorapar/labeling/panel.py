"""The panel of teachers, what each is asked, and what remains to be asked: all that is known before the first call."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError
from ..files import sha256_json
from ..recipe.checks import check_label
from ..recipe.sections import LabelConfig, PriceConfig, TeacherConfig
from .endpoint import EndpointTeacher
from .local import LocalTeacher
from .prompt import Prompt, make_prompt, question_and_answer
from .store import VoteStore
from .teacher import Teacher

# English has about 4 letters a token; used where there is no tokenizer and the endpoint does not count.
LETTERS_PER_TOKEN = 4
UNASKED, UNANSWERED = 0, -1


@dataclass(frozen=True)
class Example:
    """One row as the teachers see it."""

    index: int
    id: str
    question: str
    answer: str

    @property
    def digest(self) -> str:
        return sha256_json([self.question, self.answer])


@dataclass
class Member:
    """One teacher on the panel: its settings, what its votes' keys begin with (`prefix`), and how its calls went.

    `at`: its key in the recipe. `aside`: why it was set aside, None while it is asked.
    """

    teacher: Teacher
    config: TeacherConfig
    at: str
    prefix: str
    calls: int = 0
    failed_calls: int = 0
    failures_in_a_row: int = 0
    last_failed_at: float = 0.0
    last_failure: str = ""
    aside: str | None = None

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def in_flight(self) -> int:
        """How many of its calls are made at a time: of a local model, a batch in each process that answers."""
        helpers = len(self.teacher.helpers) if isinstance(self.teacher, LocalTeacher) else 0
        return self.config.in_flight * (1 + helpers)

    @property
    def price(self) -> PriceConfig:
        return self.config.price or PriceConfig(0.0, 0.0)

    def key(self, example: Example) -> str:
        return hashlib.sha256(f"{self.prefix} {example.digest}".encode()).hexdigest()

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price.input + tokens_out * self.price.output) / 1e6


@dataclass
class Panel:
    """The recipe's teachers and rules. `local`: the names of the voters that need no asking."""

    label: LabelConfig
    prompt: Prompt
    members: list[Member]
    local: tuple[str, ...] = ()
    enough: int = field(init=False)

    def __post_init__(self) -> None:
        first = len(self.first) + len(self.local)
        self.enough = self.label.enough if self.label.enough is not None else first // 2 + 1
        if self.enough > first:
            raise InputError(f"label.enough: got {self.enough}, but {first} voters are asked first")

    @property
    def first(self) -> list[Member]:
        return [member for member in self.members if not member.config.reserve]

    @property
    def reserves(self) -> list[Member]:
        return [member for member in self.members if member.config.reserve]

    @property
    def here(self) -> list[LocalTeacher]:
        """The teachers that run on this machine."""
        return [member.teacher for member in self.members if isinstance(member.teacher, LocalTeacher)]

    def weight(self, name: str) -> float:
        return self.label.weights.get(name, 1.0)


def make_panel(label: LabelConfig, target: str, local: Sequence[str] = ()) -> Panel:
    """The panel of a recipe's section `label`; InputError for what cannot work, before anybody is asked.

    Args:
        target: the model that the teachers act as, where the section names none. local: names of the other voters.
    """
    check_label(label)
    prompt = make_prompt(label.template, label.role_play, label.target or target, label.habits)
    members = []
    for i, config in enumerate(label.teachers):
        at = f"label.teachers[{i}]"
        teacher = make_teacher(config, at)
        members.append(Member(teacher, config, at, sha256_json([teacher.identity, prompt.digest])))
    names = [*local, *(member.name for member in members)]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"label.teachers: {count} voters are called {name!r}; give each a name of its own")
    twins = {}
    for member in members:
        other = twins.setdefault(member.prefix, member)
        if other is not member:
            raise InputError(
                f"{member.at}: the same model, place and parameters as {other.at}, so its vote would be the same; "
                "give it parameters of its own, such as a seed"
            )
    check_weights(label, names)
    panel = Panel(label, prompt, members, tuple(local))
    _check_rules(panel, names)
    return panel


def make_teacher(config: TeacherConfig, at: str) -> Teacher:
    """The teacher that a recipe describes under the key `at`; InputError for what can be known before any call."""
    if config.base_url is None:
        return LocalTeacher(config, at)
    return EndpointTeacher(config, at)


def check_weights(label: LabelConfig, names: Sequence[str]) -> None:
    for name in label.weights:
        if name not in names:
            raise InputError(f"label.weights.{name}: no voter of that name; there are {', '.join(names)}")


def _check_rules(panel: Panel, names: list[str]) -> None:
    label = panel.label
    if label.ties == "ask" and not panel.reserves:
        raise InputError("label.ties: ask needs a teacher with reserve: true to ask at a tie, and there is none; "
                         "or: system1, system2, drop")  # fmt: skip
    if panel.reserves and label.ties != "ask":
        raise InputError(f"{panel.reserves[0].at}.reserve: true, but label.ties is {label.ties}, so it would never be "
                         "asked; allowed with label.ties: ask")  # fmt: skip
    reserves = {member.name for member in panel.reserves}
    total = sum(map(panel.weight, [name for name in names if name not in reserves]))
    if label.stop_early is not None and label.stop_early > total + 1e-9:
        raise InputError(f"label.stop_early: got {label.stop_early:g}, but all votes together weigh {total:g}")
    if label.budget.cost is not None and not any(member.config.price for member in panel.members):
        raise InputError(
            "label.budget.cost: no teacher has a price, so no cost can be known; give label.teachers[].price"
        )


class Rows(Protocol):
    """Rows that can be read more than once: a data set, a list."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


def examples(rows: Rows) -> Iterator[Example]:
    """The rows as teachers see them, one at a time."""
    for index, row in enumerate(rows):
        yield Example(index, str(row["id"]), *question_and_answer(row))


def missing(panel: Panel, rows: Rows, store: VoteStore | None) -> dict[str, int]:
    """By teacher, how many votes are not in the store."""
    counts = dict.fromkeys((member.name for member in panel.members), 0)
    for example in examples(rows):
        for member in panel.members:
            counts[member.name] += store is None or store.get(member.key(example)) is None
    return counts


def check_context(panel: Panel, rows: Rows, store: VoteStore | None, tokenizer: Any = None) -> None:
    """InputError for the first row that is not in the store and too long for a teacher whose context is known."""
    limited = [
        (member, member.teacher.context) for member in panel.members if member.teacher.context and not member.aside
    ]
    for example in examples(rows) if limited else ():
        tokens = count_tokens(panel.prompt.fill(example.question, example.answer), tokenizer)
        for member, context in limited:
            room = member.teacher.max_tokens
            if tokens + room > context and (store is None or store.get(member.key(example)) is None):
                raise InputError(
                    f"{member.at}.context: row {example.id} needs about {tokens} tokens and {room} for the reply, and "
                    f"{member.name} has {context}; leave such rows out (data.max_prompt_length), or choose a "
                    "teacher with a longer context"
                )


@dataclass
class Remaining:
    """What a teacher still has to be asked, at most: calls, estimated tokens and cost; and the votes already stored."""

    calls: int = 0
    stored: int = 0
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    cost: float = 0.0


def remaining(panel: Panel, rows: Rows, store: VoteStore | None, tokenizer: Any = None) -> dict[str, Remaining]:
    """By teacher, what is not in the store and what it may cost.

    Tokens are counted with the target's `tokenizer`, or estimated at 4 letters each; where an endpoint has counted
    tokens before, its mean is used.
    """
    by_teacher = {member.name: Remaining() for member in panel.members}
    means = {member.name: store.means(member.name) if store else None for member in panel.members}
    for example in examples(rows):
        prompt_tokens: int | None = None
        for member in panel.members:
            mine = by_teacher[member.name]
            if store is not None and store.get(member.key(example)) is not None:
                mine.stored += 1
                continue
            if prompt_tokens is None:
                prompt_tokens = count_tokens(panel.prompt.fill(example.question, example.answer), tokenizer)
            tokens_in, tokens_out = means[member.name] or (prompt_tokens, member.teacher.max_tokens)
            mine.calls += 1
            mine.tokens_in += tokens_in
            mine.tokens_out += tokens_out
            mine.cost += member.cost(tokens_in, tokens_out)
    return by_teacher


def count_tokens(text: str, tokenizer: Any = None) -> int:
    if tokenizer is None:
        return len(text) // LETTERS_PER_TOKEN + 1
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def table_of(panel: Panel, by_teacher: Mapping[str, Remaining], spent: tuple[int, float]) -> str:
    """What remains, as a table to print."""
    lines = [f"{'teacher':24} {'stored':>8} {'calls':>8} {'tokens in':>12} {'tokens out':>12} {'cost':>10}"]
    rows = [(member.name, by_teacher[member.name], member.config.price is not None) for member in panel.members]
    total = Remaining(*(sum(getattr(r, f) for _, r, _ in rows) for f in ("calls", "stored", "tokens_in", "tokens_out")),
                      cost=sum(r.cost for _, r, _ in rows))  # fmt: skip
    for name, r, priced in [*rows, ("all", total, any(priced for _, _, priced in rows))]:
        cost = f"{r.cost:.4f}" if priced else "no price"
        lines.append(f"{name[:24]:24} {r.stored:8} {r.calls:8} {r.tokens_in:12.0f} {r.tokens_out:12.0f} {cost:>10}")
    most = " at most: early stops and reserves ask fewer" if panel.label.stop_early or panel.reserves else ""
    lines.append(f"Calls remain{most}, repeats after failures not counted; tokens and cost are estimates.")
    budget = panel.label.budget
    if budget.calls is not None or budget.cost is not None:
        limits = [f"{spent[0]} of {budget.calls} calls"] if budget.calls is not None else []
        limits += [f"{spent[1]:.4f} of {budget.cost:g}"] if budget.cost is not None else []
        lines.append(f"Budget spent: {', '.join(limits)}.")
    return "\n".join(lines)


def empty_votes(panel: Panel, rows: int) -> dict[str, array]:
    """One byte a row for each teacher: 1, 2, UNASKED or UNANSWERED."""
    return {member.name: array("b", bytes(rows)) for member in panel.members}


def store_path(label: LabelConfig, folder: Path) -> Path:
    return Path(label.store).expanduser() if label.store else folder / "votes.sqlite"
