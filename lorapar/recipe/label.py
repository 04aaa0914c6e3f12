"""The recipe's section `label`: who votes, how votes become labels, and what asking may cost."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import InputError, require

# The request's own fields, which parameters must not overrule.
OUR_FIELDS = ("model", "messages", "stream", "n", "response_format", "tools", "tool_choice", "functions")


@dataclass
class PriceConfig:
    """Money per million tokens, in the currency that `label.budget.cost` is in."""

    input: float
    output: float


@dataclass
class TeacherConfig:
    """A teacher LLM behind `base_url`, an OpenAI-compatible endpoint; without one, a local transformers model.

    `api_key_env`: the name of the environment variable that holds the key. `parameters` go into the request as they
    are. `in_flight` calls at a time (a local model's batch), at most `per_minute`; a call has `timeout` seconds and a
    vote `attempts` calls, `backoff` seconds apart at first, then twice that, and so on. `context`: in tokens.
    `structured`: ask with a JSON schema, without, or as the endpoint takes it. `check_model`: refuse a model that the
    endpoint does not list. `reserve`: asked only to break a tie.
    """

    model: str
    name: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    price: PriceConfig | None = None
    in_flight: int = 8
    per_minute: float | None = None
    timeout: float = 60.0
    attempts: int = 8
    backoff: float = 0.5
    context: int | None = None
    structured: Literal["auto", "schema", "none"] = "auto"
    check_model: bool = True
    reserve: bool = False


@dataclass
class BudgetConfig:
    """The most calls and the most money that a store of votes may ever have cost; labelling stops there cleanly."""

    calls: int | None = None
    cost: float | None = None


@dataclass
class LabelConfig:
    """`column`: labels that exist already; otherwise `voters` and `teachers` vote and `ties` go by the rule named.

    `voters` are rules that need no network (["operations"] where there is neither voter nor teacher). Teachers play the
    `target` model (the recipe's, unless named here) with its `habits`, or judge the question as such (`role_play:
    false`), in the words of `template`, a file. `weights`: of voters by name, else 1. `stop_early`: ask no further once
    votes of this weight agree. `enough`: how many voters must be left when teachers fail (more than half). `reask`: how
    often a teacher is asked again for a reply that is no vote. `set_aside`: after so many failed calls in a row.
    `store`: the database of votes (votes.sqlite in the output folder). `corrections`: a CSV that a person has filled in
    (review.csv in the output folder, where it is there).
    """

    column: str | None = None
    voters: list[str | dict[str, Any]] | None = None
    ties: Literal["system1", "system2", "drop", "ask"] = "system2"
    teachers: list[TeacherConfig] = field(default_factory=list)
    role_play: bool = True
    target: str | None = None
    habits: str | None = None
    template: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    stop_early: float | None = None
    enough: int | None = None
    reask: int = 2
    set_aside: int = 12
    store: str | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    corrections: str | None = None

    def __post_init__(self) -> None:
        if self.voters is None:
            self.voters = [] if self.teachers else ["operations"]


def check_label(label: LabelConfig) -> None:
    """InputError for the first value out of its range."""
    require(label.stop_early is None or label.stop_early > 0, "label.stop_early", label.stop_early, "more than 0")
    require(label.column is None or not label.teachers, "label.column", label.column,
            "nothing beside label.teachers, or {name: column, column: ...} among label.voters")  # fmt: skip
    require(label.reask >= 0, "label.reask", label.reask, "at least 0")
    for at, count in (("set_aside", label.set_aside), ("enough", label.enough), ("budget.calls", label.budget.calls)):
        require(count is None or count >= 1, f"label.{at}", count, "at least 1")
    require(label.budget.cost is None or label.budget.cost > 0, "label.budget.cost", label.budget.cost, "more than 0")
    for name, weight in label.weights.items():
        require(weight > 0, f"label.weights.{name}", weight, "more than 0")
    for i, teacher in enumerate(label.teachers):
        at = f"label.teachers[{i}]"
        require(teacher.model != "", f"{at}.model", teacher.model, "the name of a model")
        for key in ("in_flight", "attempts"):
            require(getattr(teacher, key) >= 1, f"{at}.{key}", getattr(teacher, key), "at least 1")
        for key in ("per_minute", "timeout", "backoff", "context"):
            value = getattr(teacher, key)
            require(value is None or value > 0, f"{at}.{key}", value, "more than 0")
        price = teacher.price
        require(price is None or min(price.input, price.output) >= 0, f"{at}.price", price, "at least 0")
        _check_no_key(teacher, at)


def _check_no_key(teacher: TeacherConfig, at: str) -> None:
    """A recipe is copied into its output folder, so a key must not stand in it; what may be one is not repeated."""
    name = teacher.api_key_env
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise InputError(f"{at}.api_key_env: expected the name of an environment variable, of capital letters, digits "
                         "and _ (what is given is not shown: it may be a key)")  # fmt: skip
    for key in teacher.parameters:
        if key in OUR_FIELDS or re.search(r"key|authori[sz]ation|secret|password|header", key, re.IGNORECASE):
            raise InputError(f"{at}.parameters.{key}: not allowed; the request's own fields ({', '.join(OUR_FIELDS)}) "
                             "are set by us, and a key is named by api_key_env")  # fmt: skip
    if teacher.base_url is not None:
        parts = urlsplit(teacher.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise InputError(f"{at}.base_url: expected http(s)://host[:port]/path, without user, password or query")
