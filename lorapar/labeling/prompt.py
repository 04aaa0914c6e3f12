"""The prompt that a teacher gets: a template file with {question} and {answer}, and {target}, {habits} for role-play.

The teacher acts as the target model (paper section 3.1); without role-play it judges the question itself. The wording
is ours, in `teacher.txt` and `teacher_plain.txt` beside this file; a recipe may name a file of its own.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_text, sha256_json

TEMPLATES = Path(__file__).parent
NEEDED = ("question", "answer")
ROLE = ("target", "habits")


@dataclass(frozen=True)
class Prompt:
    """A checked template with its role filled in; `fill` adds an example."""

    template: str
    target: str
    habits: str

    @property
    def digest(self) -> str:
        return sha256_json([self.template, self.target, self.habits])

    def fill(self, question: str, answer: str) -> str:
        return self.template.format(question=question, answer=answer, target=self.target, habits=self.habits)


def make_prompt(template: str | None, role_play: bool, target: str, habits: str | None) -> Prompt:
    """The template file `template`, or ours; InputError, naming the field, for one that cannot work."""
    path = (
        Path(template).expanduser() if template else TEMPLATES / ("teacher.txt" if role_play else "teacher_plain.txt")
    )
    text = read_text(path)
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise InputError(f"label.template: {path} is no template for str.format: {error}") from None
    allowed = (*NEEDED, *(ROLE if role_play else ()))
    for name in fields:
        if name not in allowed:
            raise InputError(f"label.template: {path} has the field {{{name}}}; allowed: {_braced(allowed)}")
    for name in (*NEEDED, *(ROLE[:1] if role_play else ())):
        if name not in fields:
            raise InputError(f"label.template: {path} lacks the field {{{name}}}; it needs "
                             f"{_braced((*NEEDED, *(ROLE[:1] if role_play else ())))}")  # fmt: skip
    if habits and "habits" not in fields:
        raise InputError(f"label.habits: given, but {path} has no field {{habits}}")
    # Habits only describe the role: without role-play they are part of neither the prompt nor a vote's key.
    sentence = f" Its habits: {habits.strip().rstrip('.')}." if habits else ""
    return Prompt(text.strip(), target if role_play else "", sentence)


def _braced(names: tuple[str, ...]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def question_and_answer(row: dict[str, Any]) -> tuple[str, str]:
    """A row's prompt and completion as text; a chat of several turns has the role before each."""
    return _plain(row["prompt"]), _plain(row["completion"])


def _plain(value: str | list[dict[str, Any]]) -> str:
    if isinstance(value, str):
        return value
    turns = [(str(turn["role"]), str(turn.get("content") or "")) for turn in value]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)
