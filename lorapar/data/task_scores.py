"""What a reasoning-gym task's own scorer says of a completion: many of its tasks have more than one right answer.

A row of such a task says in its columns which scorer that is and what the scorer reads: `task`, `metadata` (JSON text)
and, for some tasks with options, `task_config` (JSON text). Other rows are judged by `is_correct` alone.

The scorers are another package's code, run on whatever a model writes. Some hand the text to `eval`, or to sympy, which
evaluates it as Python; some repeat a move as often as a number in the text says; some give the full score to texts that
are no answer. So a text must first look like an answer of its task (`FORMS`, `_too_much`), the full score of some tasks
is checked again (`STRICTER`), and a scorer has `SECONDS` to answer. A text that a scorer fails on is worth 0.
"""

import contextlib
import ctypes
import functools
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import InputError, not_installed
from .answers import is_correct
from .finding import find, marked_answer, spoken

# The columns that a row's verdict depends on.
JUDGED_BY = ("answer", "task", "metadata", "task_config")
# Tasks without a single answer whose metadata names one that is right.
EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
# Tasks whose scorer reads the options that the row was made with.
BY_OPTIONS = ("arc_agi", "decimal_arithmetic", "polynomial_equations", "puzzle24", "rearc", "time_intervals",
              "word_ladder")  # fmt: skip
SECONDS = 5.0
# What some scorers print is caught by replacing sys.stdout, which all threads share.
ONE_AT_A_TIME = threading.Lock()

# What may be handed to a scorer that evaluates it, or that counts by it. Every repeat is possessive: no text makes
# the match itself slow.
_NUMBER = r"\d++(?:\.\d++)?+"
# Sums, products and quotients. The tasks have no powers.
_ARITHMETIC = rf"(?:{_NUMBER}|[-+()\s]|\*(?!\*)|/(?!/))++"
# Letters for variables, the functions that antiderivatives have, and small powers, none on top of another.
_FUNCTION = r"(?:exp|log|ln|sqrt|sin|cos|tan|asin|acos|atan)(?=\()"
_EXPONENT = r"\s*+(?:-?\d{1,2}(?![\d.])|[A-Za-z](?![A-Za-z(])|\(\s*+-?\d{1,2}(?:/\d{1,2})?+\s*+\))(?!\s*+\*\*)"
_ALGEBRA = rf"(?:{_NUMBER}|{_FUNCTION}|[A-Za-z](?![A-Za-z(])|[-+()\s]|\*\*{_EXPONENT}|\*(?!\*)|/(?!/))++"
# Boards and matrices in plain text: nothing in them can be called. Written as a Python list they would earn a part.
_BOARD = r"[\s\dA-Z_-]*+"
_MOVES = r"(?:\D|\d(?!\d))*+"
ALGEBRA = ("simple_integration", "intermediate_integration", "polynomial_multiplication")
FORMS = {
    task: re.compile(form)
    for form, tasks in {
        _ARITHMETIC: ("countdown", "puzzle24"),
        _ALGEBRA: ALGEBRA,
        _BOARD: ("binary_matrix", "spiral_matrix", "n_queens", "string_insertion"),
        _MOVES: ("rubiks_cube", "rush_hour"),
        # The scorer gives nan, which is at no distance from anything, the full score.
        r"[\d.,eEijIJ()+\s-]*+": ("complex_arithmetic",),
    }.items()
    for task in tasks
}


def score_by_task(completion: str, row: Mapping[str, Any]) -> float | None:
    """The score from 0 to 1 that the row's reasoning-gym task gives the completion; None for a row of no task.

    The scorer is given the answer that the completion states and, where it marks none, the whole completion after any
    thinking; the better score counts. A text that the scorer fails on, or that is no form of an answer, is worth 0.
    """
    metadata = _metadata(row)
    if metadata is None:
        return None
    return max(
        _score(text, row["task"], _config(row), _gold(row), metadata)
        for text in dict.fromkeys(_readings(spoken(completion).strip()))
    )


def is_right(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the completion gives a right answer to the row.

    Of a reasoning-gym task: the task's scorer gives it the full score, or the answer is a plain number or words, and
    `is_correct`. Of any other row: `is_correct` alone.
    """
    if _metadata(row) is None:
        return is_correct(completion, _gold(row))
    # An answer in another form than the scorer knows ("7.", "5 + 2 = 7") is right where nothing but the value counts.
    plain = is_number(row) or re.fullmatch(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*", _gold(row)) is not None
    return score_by_task(completion, row) == 1 or (plain and is_correct(completion, _gold(row)))


def is_number(row: Mapping[str, Any]) -> bool:
    """Whether the row's answer is a plain number, such as a board full of digits is not."""
    return re.fullmatch(r"[-+]?[\d,]*\.?\d+", _gold(row)) is not None


def of_task(row: Mapping[str, Any]) -> bool:
    """Whether the row is of a reasoning-gym task."""
    return _metadata(row) is not None


def has_answer(row: Mapping[str, Any]) -> bool:
    """Whether a completion of the row can be right at all."""
    return bool(_gold(row))


def check_tasks(rows: Iterable[Mapping[str, Any]]) -> None:
    """InputError where a task's scorer does not give its full score to the answer of the task's first row.

    What reasoning-gym generated may have been labelled by another version of it.
    """
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        metadata = _metadata(row)
        if metadata is not None and has_answer(row):
            first.setdefault((row["task"], _config(row)), row)
    for (task, config), row in first.items():
        gold, place = _gold(row), f"row {row.get('id', '(no id)')}"
        try:
            given = _call(task, config, gold, _entry(task, gold, _metadata(row) or {}))
        except InputError:
            raise
        except Exception as error:  # another package's code
            raise InputError(
                f"data.sources: reasoning_gym's scorer of {task} failed on the answer of {place} itself ({error!r}); "
                "was the row made by another version of reasoning-gym?"
            ) from error
        if given != 1:
            raise InputError(
                f"data.sources: reasoning_gym's scorer of {task} gives the answer of {place} itself {given:g}, "
                "expected 1; was the row made by another version of reasoning-gym?"
            )


# A row


def _metadata(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the task says of the row; None where the row is of no task, whatever a user's columns are called."""
    text, task = row.get("metadata"), row.get("task")
    if not isinstance(text, str) or not isinstance(task, str) or '"source_dataset"' not in text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("source_dataset") == task else None


def _config(row: Mapping[str, Any]) -> str:
    return row.get("task_config") or "{}"


def _gold(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    return "" if answer is None else str(answer).strip()


def _readings(said: str) -> list[str]:
    """What of a text may be the answer."""
    found, marked = find(said), marked_answer(said)
    stated = [*found.readings] if found else []
    if marked:
        return [*stated, marked]
    # A block of code at the end, or what follows the last line that ends in a colon.
    block = re.search(r"```[^\n`]*\n([^`]*)```$", said)
    return [*stated, block[1].strip() if block else re.split(r":[ \t*]*\n", said)[-1].strip(), said]


# The scorer


def _score(text: str, task: str, config: str, gold: str, metadata: dict[str, Any]) -> float:
    if not text or _too_much(text, task, gold):
        return 0.0
    if text == gold:
        return 1.0
    if task in FORMS and not FORMS[task].fullmatch(text):
        return 0.0
    try:
        with ONE_AT_A_TIME:
            given = within(SECONDS, lambda: _call(task, config, text, _entry(task, gold, metadata)))
            if given == 1 and task in STRICTER and not STRICTER[task](text, gold, metadata):
                given = 0.0
    except InputError:
        raise
    except Exception:  # another package's code on a model's text
        return 0.0
    return min(max(given, 0.0), 1.0) if math.isfinite(given) else 0.0


def _too_much(text: str, task: str, gold: str) -> bool:
    """Whether a text could only cost time: far longer than the answer, or with numbers too large to work with."""
    run = max((len(digits) for digits in re.findall(r"\d+", gold)), default=0)
    return (
        len(text) > max(1000, 10 * len(gold))
        or re.search(rf"\d{{{max(50, 2 * run)}}}|\d[eE][-+]?\d{{4}}", text) is not None
        or (task in ALGEBRA and _towering(text))
    )


def _towering(text: str) -> bool:
    """Whether an expression raises a power to a power, or takes exp of exp, often enough to outgrow the memory."""
    powers = (int(power) for power in re.findall(r"\)\s*\*\*\s*\(?\s*-?(\d{1,9})", text))
    open_calls: list[bool] = []
    for token in re.findall(r"exp\(|\(|\)", text):
        if token == ")":
            open_calls[-1:] = []
        else:
            open_calls.append(token == "exp(")
            if sum(open_calls) > 1:
                return True
    return math.prod(powers) > 100


def _entry(task: str, gold: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """A row as its task's scorer wants it; `metadata` may be changed by the scorer."""
    if task in ("arc_agi", "rearc"):
        # Boards are tuples there, and JSON has none.
        metadata = {**metadata, "output": tuple(tuple(line) for line in metadata["output"])}
    return {"answer": gold, "metadata": metadata}


def _call(task: str, config: str, text: str, entry: dict[str, Any]) -> float:
    scorer = _dataset(task, config).score_answer
    # Some print what is wrong with a text.
    with contextlib.redirect_stdout(io.StringIO()):
        return float(scorer(text, entry))


@functools.lru_cache(maxsize=64)
def _dataset(task: str, config: str) -> Any:
    """The task's data set, whose method the scorer is: some read its options, or its lists of words."""
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            f"data.sources: rows of {task} need {not_installed('reasoning-gym, which', 'quickstart')}"
        ) from None
    try:
        return reasoning_gym.create_dataset(task, **json.loads(config))
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"data.sources: reasoning_gym's {task} with config {config}: {error}") from error


def _same_words(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    return text.casefold().split() == gold.casefold().split()


def _same_letters(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    return "".join(text.casefold().split()) == "".join(gold.casefold().split())


def _same_numbers(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    ours, theirs = ([float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", part)] for part in (text, gold))
    return ours == theirs


def _about(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    from fractions import Fraction

    wanted = Fraction(gold)
    return abs(Fraction(text.replace(",", "")) - wanted) <= wanted / 100


def _uses_numbers(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    """24 exactly, of the row's own numbers: that is the task countdown."""
    entry = {"answer": gold, "metadata": {"numbers": metadata["numbers"], "target": 24}}
    return _call("countdown", "{}", text, entry) == 1


def _is_the_answer(text: str, gold: str, metadata: dict[str, Any]) -> bool:
    return is_correct(text, gold)


# Tasks whose scorer gives its full score to wrong answers too (reasoning-gym 0.1.25), and what must also hold.
STRICTER: dict[str, Callable[[str, str, dict[str, Any]], bool]] = {
    "coin_flip": _about,  # within 0.0001, of probabilities such as 0.00003
    "figlet_font": _same_letters,  # ten right letters are full marks, whatever the others are
    "game_of_life_halting": _is_the_answer,  # any text at all
    "gsm_symbolic": _is_the_answer,  # the first number in the text, without its sign
    "letter_jumble": _same_words,  # words after the right ones
    "number_sorting": _same_numbers,  # each number off by one, or nan
    "puzzle24": _uses_numbers,  # any four numbers, and 24.9 too
}


# Time


class OutOfTime(BaseException):
    """Raised inside the code that is out of time. No Exception: that code may catch those and go on."""


def within(seconds: float, call: Callable[[], float]) -> float:
    """What `call` returns; 0 where it takes longer. In any thread: the time-out is raised between two bytecodes."""
    lock, over = threading.Lock(), threading.Event()
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        wait = seconds
        # Again and again: a bare `except` in that code may have caught the last one.
        while not over.wait(wait):
            with lock:
                if not over.is_set():
                    raise_in(thread, ctypes.py_object(OutOfTime))
            wait = 0.2

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        try:
            watcher.start()
            return call()
        finally:
            with lock:
                over.set()
            # One that was raised and not yet delivered would strike whatever runs next.
            raise_in(thread, None)
    except OutOfTime:
        over.set()
        raise_in(thread, None)
        return 0.0
