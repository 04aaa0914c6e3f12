"""A typed question as the recipe's rows put theirs."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import InputError

Turn = dict[str, str]


@dataclass
class Conversation:
    """What one model has been asked and has answered, and how the rows that it was trained on were put.

    Attributes:
        template, system_prompt: the recipe's `data.prompt` and `data.system_prompt`.
        is_chat: whether rows go through the chat template. Without one, each question stands alone, as rows did.
        turns: the questions as they were typed, and the model's answers.
    """

    template: str
    system_prompt: str | None
    is_chat: bool
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, question: str) -> str | list[Turn]:
        """The next prompt. As in a row of several turns, the template goes around the last question alone."""
        asked = around(self.template, question)
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        if self.is_chat:
            return [*system, *self.turns, {"role": "user", "content": asked}]
        return "\n\n".join(turn["content"] for turn in [*system, {"role": "user", "content": asked}])

    def add(self, question: str, answer: str) -> None:
        if self.is_chat:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def fields_of(template: str) -> tuple[str | None, list[str]]:
    """(the field of a prompt's template that a question fills, the fields that it has no words for).

    {prompt}, or else the only one; None: there is no such field, and the template is left out.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    names = list(dict.fromkeys(names))
    filled = "prompt" if "prompt" in names else names[0] if len(names) == 1 else None
    return filled, [name for name in names if name != filled]


def around(template: str, question: str) -> str:
    """The template with the question in it; fields that it has no words for are left empty.

    A question that is typed with the template's own words around it, as rows and a card show it, gets them once.
    """
    filled, others = fields_of(template)
    if filled is None:
        return question
    try:
        around_it = template.format(**{filled: "\0", **dict.fromkeys(others, "")}).strip().split("\0")
        if len(around_it) == 2:
            before, behind = around_it
            inside = question[len(before) : len(question) - len(behind)].strip()
            if inside and question.startswith(before) and question.endswith(behind):
                question = inside
        return template.format(**{filled: question, **dict.fromkeys(others, "")})
    except (ValueError, LookupError, AttributeError) as error:
        raise InputError(f"data.prompt: {template!r} cannot be filled with a typed question: {error}") from None


def notes(template: str, is_chat: bool) -> list[str]:
    """How a typed question is put, and what of the recipe's rows it cannot have, in sentences; [] where it is asked as
    it is typed, as they were."""
    filled, others = fields_of(template)
    named = ", ".join(f"{{{name}}}" for name in others)
    said = []
    if filled is None:
        why = f"it has no {{prompt}} but {named}" if others else "it has no field"
        said.append(f"data.prompt is left out, since {why}: questions are asked as they are typed")
    elif template != f"{{{filled}}}":
        said.append(f"a question is put into data.prompt: {template!r}")
    if filled is not None and others:
        said.append(f"data.prompt has columns besides the question, which are left empty: {named}")
    if not is_chat:
        said.append("the model was trained without a chat template: each question stands alone")
    return said


def checked(question: str, where: str) -> str:
    """The question without the space around it; InputError where nothing is left, or it is not text."""
    asked = question.strip()
    if not asked:
        raise InputError(f"{where}: the question is empty; give some text")
    found = next((letter for letter in asked if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
    if found is not None:
        raise InputError(f"{where}: the question holds U+{ord(found):04X}, which is no character; it must be UTF-8")
    return asked


def titles(stages: Sequence[str]) -> list[str]:
    """What the answers of the base and of each stage are headed."""
    return ["base", *(f"after {stage.upper()}" for stage in stages)]
