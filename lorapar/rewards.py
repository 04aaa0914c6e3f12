"""What a completion is worth: right or wrong, near or far, well formed or not.

A reward is a plain function of TRL's form, `f(prompts, completions, completion_ids=None, **columns)`, that
returns one float a completion, or None where it does not apply. `completions` holds strings or lists of
messages.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .data.answers import extract_answer, is_correct, last_number, text_of, without_latex
from .errors import InputError, suggestion

Reward = Callable[..., list[float | None]]


def _answers(name: str, columns: dict[str, Any]) -> list[str | None]:
    if "answer" not in columns:
        raise InputError(f"grpo.rewards: {name} needs a column 'answer'; the rows have {', '.join(sorted(columns))}")
    return columns["answer"]


def accuracy(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """1 for the right answer, else 0; None for a row that has no answer."""
    rights = zip(completions, _answers("accuracy", columns))
    return [float(is_correct(text_of(completion), answer)) if answer else None for completion, answer in rights]


def correct(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """2 for the right answer, else 0: the paper's weight beside its format rewards."""
    return [right if right is None else 2 * right for right in accuracy(prompts, completions, **columns)]


def closeness(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """1 for the right answer, else ½·exp(−|error| / 3), and 0 where either is no number."""

    def one(text: str, answer: str) -> float:
        if is_correct(text, answer):
            return 1.0
        found, wanted = last_number(without_latex(extract_answer(text))), last_number(without_latex(answer))
        if found is None or wanted is None:
            return 0.0
        # exp(−700) is 0 as a float already; a larger Fraction would not fit one.
        return 0.5 * math.exp(-min(float(min(abs(found[0] - wanted[0]), 10_000)) / 3, 700))

    rows = zip(completions, _answers("closeness", columns))
    return [one(text_of(completion), answer) if answer else None for completion, answer in rows]


def integer(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """½ where the answer stated is an integer and nothing else."""
    given = (extract_answer(text_of(completion)) for completion in completions)
    return [0.5 if re.fullmatch(r"[-+−]?(?:\d+|\d{1,3}(?:,\d{3})+)", text) else 0.0 for text in given]


STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


def strict_format(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """½ for <reasoning>, text, </reasoning>, <answer>, text, </answer>, each on lines of its own and nothing
    else."""
    return [0.5 if STRICT.fullmatch(text_of(completion)) else 0.0 for completion in completions]


def soft_format(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """½ for <reasoning>...</reasoning> and <answer>...</answer> in this order at the start, whatever the
    lines."""
    return [0.5 if SOFT.match(text_of(completion)) else 0.0 for completion in completions]


def tags(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """⅛ for each of the four tags that stands once and on a line of its own, less 0.001 a character after the
    last.

    The widely used demo that the paper's script follows takes the last penalty twice and may go below 0; here
    once, and never below 0.
    """

    def one(text: str) -> float:
        places = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
        score = 0.125 * sum(text.count(place) == 1 for place in places)
        after = text.rpartition("</answer>")[2] if "</answer>" in text else ""
        return max(0.0, score - 0.001 * len(after.strip()))

    return [one(text_of(completion)) for completion in completions]


REWARDS: dict[str, Reward] = {
    reward.__name__: reward for reward in (correct, integer, strict_format, soft_format, tags, accuracy, closeness)
}


def resolve_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions that a recipe's `grpo.rewards` names: ours, or any `module:function` importable from
    here."""
    if not names:
        raise InputError(f"grpo.rewards: expected at least one, got none; allowed: {', '.join(REWARDS)}")
    return [_resolve_reward(name) for name in names]


def _resolve_reward(name: str) -> Reward:
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = suggestion(name, REWARDS)
        raise InputError(f"grpo.rewards: unknown reward {name!r}; {near} (or module:function)")
    # A console script does not search the folder it is run from, and that is where a user's module is. Last,
    # so that no file there stands in for a library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise InputError(f"grpo.rewards: {name}: importing {module_name!r} failed: {error!r}") from error
    if not callable(getattr(module, function_name, None)):
        raise InputError(f"grpo.rewards: {name}: module {module_name!r} has no function {function_name!r}")
    return getattr(module, function_name)
