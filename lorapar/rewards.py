"""What a completion is worth: right or wrong, near or far, well formed or not.

A reward is a plain function of TRL's form, `f(prompts, completions, completion_ids=None, **columns)`, that
returns one float a completion, or None where it does not apply. `completions` holds strings or lists of
messages. An evaluation's metric is such a function too.
"""

import functools
import importlib
import inspect
import logging
import math
import numbers
import os
import re
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .data.answers import extract_answer, last_number, text_of, without_latex
from .data.answers import is_correct as is_correct
from .data.task_scores import JUDGED_BY, check_tasks, has_answer, is_number, is_right, of_task, score_by_task
from .errors import InputError, RewardFailed, suggestion

log = logging.getLogger("lorapar")

Reward = Callable[..., list[float | None]]
FP32_MAX = 3.4028234663852886e38
# How long the row is looked for that a failing reward function fails on.
SEARCH_SECONDS = 10.0


def _judged(name: str, completions: Sequence[Any], columns: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the completion's text, what of its row decides whether it is right) for each completion."""
    if "answer" not in columns:
        raise InputError(f"{name} needs a column 'answer'; the rows have {', '.join(sorted(columns))}")
    for place, completion in enumerate(completions):
        yield text_of(completion), {column: columns[column][place] for column in JUDGED_BY if column in columns}


def accuracy(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """1 for a right answer, else 0; None for a row that has no answer. Rows of a reasoning-gym task are judged by
    the task's own scorer, which may know several right answers."""
    judged = _judged("accuracy", completions, columns)
    return [float(is_right(text, row)) if has_answer(row) else None for text, row in judged]


def correct(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """2 for a right answer, else 0: the paper's weight beside its format rewards."""
    return [right if right is None else 2 * right for right in accuracy(prompts, completions, **columns)]


def closeness(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """1 for a right answer, else ½·exp(−|error| / 3), and 0 where either is no number."""

    def one(text: str, row: dict[str, Any]) -> float:
        if is_right(text, row):
            return 1.0
        if of_task(row) and not is_number(row):
            return 0.0
        found, wanted = last_number(without_latex(extract_answer(text))), last_number(without_latex(str(row["answer"])))
        if found is None or wanted is None:
            return 0.0
        # exp(−700) is 0 as a float already; a larger Fraction would not fit one.
        return 0.5 * math.exp(-min(float(min(abs(found[0] - wanted[0]), 10_000)) / 3, 700))

    return [one(text, row) if has_answer(row) else None for text, row in _judged("closeness", completions, columns)]


def task_score(prompts, completions, completion_ids=None, **columns) -> list[float | None]:
    """The score from 0 to 1 that the row's reasoning-gym task gives, with parts for partly right answers; None
    for rows of other sources."""
    return [
        score_by_task(text, row) if has_answer(row) else None
        for text, row in _judged("task_score", completions, columns)
    ]


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
    reward.__name__: reward
    for reward in (correct, integer, strict_format, soft_format, tags, accuracy, closeness, task_score)
}
# None for a row without an answer.
BY_ANSWER = (accuracy, correct, closeness, task_score)


def resolve_rewards(names: Sequence[str | Reward]) -> list[Reward]:
    """The functions that a recipe's `grpo.rewards` names: ours, or any `module:function` importable from
    here. A function stays what it is."""
    if not names:
        raise InputError(f"grpo.rewards: expected at least one, got none; allowed: {', '.join(REWARDS)}")
    return [resolve_reward(name) if isinstance(name, str) else name for name in names]


def resolve_reward(name: str, at: str = "grpo.rewards") -> Reward:
    """The function that the key `at` of a recipe names."""
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = suggestion(name, REWARDS)
        raise InputError(f"{at}: unknown {'metric' if 'metric' in at else 'reward'} {name!r}; {near} "
                         "(or module:function)")  # fmt: skip
    # A console script does not search the folder it is run from, and that is where a user's module is. Last,
    # so that no file there stands in for a library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise InputError(f"{at}: {name}: importing {module_name!r} failed: {error!r}") from error
    if not callable(getattr(module, function_name, None)):
        raise InputError(f"{at}: {name}: module {module_name!r} has no function {function_name!r}")
    return getattr(module, function_name)


def check_answers(names: Mapping[str, Reward], rows: Any, at: str, what: str, refuse: bool = True) -> None:
    """Say how many of a stage's rows have no answer, for which a reward by the answer is None.

    Args:
        names: the rewards by their names. rows: a data set. at: the recipe's key; what: the rows in words.
        refuse: whether rows of which none has an answer are refused.

    Raises InputError where they are, and where a reasoning-gym task's scorer does not take the
    answer of its own row.
    """
    by_answer = [name for name, reward in names.items() if reward in BY_ANSWER]
    if not by_answer:
        return
    kept = [name for name in ("id", *JUDGED_BY) if name in rows.column_names]
    judged = rows.select_columns(kept).to_list() if kept else [{}] * len(rows)
    check_tasks(judged)
    without = sum(not has_answer(row) for row in judged)
    give, remedy = "gives" if len(by_answer) == 1 else "give", "name the column with data.columns.answer"
    if any("source_dataset" in str(row.get("metadata")) for row in judged if not has_answer(row)):
        # Earlier versions left out reasoning-gym's answers of more than a line.
        remedy += ", or delete labels.jsonl to have the rows made again"
    if without == len(judged) and refuse:
        raise InputError(f"{at}: {' and '.join(by_answer)} {give} no value without an answer, and none of the "
                         f"{without} {what} has one; {remedy}, or take another function")  # fmt: skip
    if without:
        log.warning("%s: %d of %d %s have no answer; %s %s them None; %s",
                    at, without, len(judged), what, " and ".join(by_answer), give, remedy)  # fmt: skip


# A user's function, called


def check_call(reward: Reward, columns: Iterable[str], at: str) -> None:
    """InputError where the function cannot be called with the rows' columns, which it is given by name."""
    given = dict.fromkeys(["prompts", "completions", "completion_ids", *columns])
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        function = _function_of(reward)
        raise InputError(
            f"{at}: {function.__module__}:{function.__qualname__} does not take what it is given ({error}); it needs "
            f"**columns at its end, and may name any of {', '.join(given)} ({_place_of(None, reward)})"
        ) from None


class CheckedReward:
    """A reward function whose failures and odd values are said in one line, with the row.

    Calling it is calling the function (for one declared `async`, `AsyncCheckedReward`). What is neither finite nor None
    becomes None: the first such value of a function is said, all are counted in `not_finite`.

    Raises RewardFailed where the function raises, returns another number of values, or a value that is no number.
    """

    def __init__(self, reward: Reward, at: str):
        self.reward, self.at, self.not_finite = reward, at, 0
        function = _function_of(reward)
        self.name = f"{function.__module__}:{function.__qualname__}"
        # TRL names its log's columns by it.
        self.__name__ = getattr(reward, "__name__", function.__qualname__)

    def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            output = self.reward(**given)
        except InputError:
            raise
        except Exception as error:  # a user's function may fail in any way
            raise self._failure(error, given, self._row_that_fails(given)) from error
        return self._numbers(output, given)

    def _row_that_fails(self, given: dict[str, Any]) -> int | None:
        """The first completion that the function fails on when it is given nothing else; None where it is hard to
        say."""
        began = time.monotonic()
        for place in range(len(given["completions"])):
            if time.monotonic() - began > SEARCH_SECONDS:
                return None
            try:
                self.reward(**_alone(given, place))
            except Exception:
                return place
        return None

    def _failure(self, error: Exception, given: dict[str, Any], place: int | None) -> RewardFailed:
        where = self._row(given, place) if place is not None else f"a batch of {len(given['completions'])} completions"
        return RewardFailed(f"{self.at}: {self.name} failed on {where}: {type(error).__name__}: {error} "
                            f"({_place_of(error, self.reward)})")  # fmt: skip

    def _row(self, given: dict[str, Any], place: int) -> str:
        ids, text = given.get("id"), text_of(given["completions"][place])
        name = f"row {ids[place]}" if isinstance(ids, list) else f"completion {place + 1}"
        return f"{name}, whose completion begins {text[:60]!r}"

    def _numbers(self, output: Any, given: dict[str, Any]) -> list[float | None]:
        wanted = f"expected a list of {len(given['completions'])} numbers or None, one for each completion"
        if isinstance(output, str | bytes | Mapping) or not hasattr(output, "__iter__"):
            if inspect.iscoroutine(output):
                output.close()
            raise RewardFailed(f"{self.at}: {self.name} returned {type(output).__name__}, {wanted} "
                               f"({_place_of(None, self.reward)})")  # fmt: skip
        try:
            values = list(output)
        except TypeError:  # an array without a dimension
            values = [output]
        if len(values) != len(given["completions"]):
            raise RewardFailed(f"{self.at}: {self.name} returned {len(values)} values, {wanted} "
                               f"({_place_of(None, self.reward)})")  # fmt: skip
        return [self._number(value, given, place) for place, value in enumerate(values)]

    def _number(self, value: Any, given: dict[str, Any], place: int) -> float | None:
        if value is None:
            return None
        # Of numpy or torch, with no dimension.
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise RewardFailed(f"{self.at}: {self.name} returned {str(value)[:60]!r} ({type(value).__name__}) for "
                               f"{self._row(given, place)}; expected a number or None "
                               f"({_place_of(None, self.reward)})")  # fmt: skip
        # TRL keeps them in fp32, and a reward beyond it would make every weight nan.
        try:
            number = float(value)
        except OverflowError:  # an integer or a fraction beyond any float
            number = math.inf
        if not abs(number) <= FP32_MAX:
            if not self.not_finite:
                log.warning("%s: %s returned %s for %s; it counts as None, and so do later ones",
                            self.at, self.name, value, self._row(given, place))  # fmt: skip
            self.not_finite += 1
            return None
        return number


class AsyncCheckedReward(CheckedReward):
    """The same for an `async` function."""

    async def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            output = await cast(Any, self.reward(**given))
        except InputError:
            raise
        except Exception as error:  # a user's function may fail in any way
            raise self._failure(error, given, await self._row_that_fails(given)) from error
        return self._numbers(output, given)

    async def _row_that_fails(self, given: dict[str, Any]) -> int | None:
        began = time.monotonic()
        for place in range(len(given["completions"])):
            if time.monotonic() - began > SEARCH_SECONDS:
                return None
            try:
                await cast(Any, self.reward(**_alone(given, place)))
            except Exception:
                return place
        return None


def checked(reward: Reward, at: str = "grpo.rewards") -> CheckedReward:
    """A reward function, checked at every call; see `CheckedReward`."""
    if isinstance(reward, CheckedReward):
        return reward
    return (AsyncCheckedReward if is_async(reward) else CheckedReward)(reward, at)


def is_async(reward: Reward) -> bool:
    """Whether calling it returns a coroutine: a function, a partial one, or an object with such a `__call__`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))


def _function_of(reward: Any) -> Any:
    """What has the module, the name and the code of a reward function, partial or an object."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward if hasattr(reward, "__qualname__") else type(reward)


def _alone(given: dict[str, Any], place: int) -> dict[str, Any]:
    """The arguments of a call for one of its completions."""
    count = len(given["completions"])
    return {
        name: value[place : place + 1] if isinstance(value, list) and len(value) == count else value
        for name, value in given.items()
    }


def _place_of(error: Exception | None, reward: Reward) -> str:
    """file:line of the last frame of an error that is the user's own; else where the function begins."""
    frames = [frame for frame in traceback.extract_tb(error and error.__traceback__) if frame.filename != __file__]
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    if own or frames:
        last = (own or frames)[-1]
        return f"{Path(last.filename).name}:{last.lineno}"
    function = _function_of(reward)
    code = getattr(function, "__code__", None) or getattr(vars(function).get("__call__"), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else function.__module__
