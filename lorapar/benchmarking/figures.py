"""The figures of a task or a group, and the check of those that code of a model's could have written."""

import json
import math
from collections.abc import Iterable
from typing import Any

from ..errors import StageFailed

# {"n": documents, "of": documents there are, "shots": ..., "version": ..., "subtasks": [...] (of a group),
# "higher_is_better": {metric: bool}, "figures": {"metric,filter": {"value": ..., "stderr": ...}}}. None stands for a
# figure that is no number, and for what lm_eval does not give.
Figures = dict[str, Any]


def number(value: Any) -> float | None:
    """A plain number; "N/A" and lists, which a metric may be too, are none."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def read_figures(text: str, names: Iterable[str]) -> dict[str, Figures]:
    """{name: Figures} from JSON that a process which ran a model's code has written.

    They are built anew from what they may hold: a number, a truth value or a word that can be shown, in its place.
    Raises StageFailed where one of the names is missing, or what is there is not of this kind.
    """
    try:
        found = json.loads(text)
        return {name: _rebuilt(found[name]) for name in names}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise StageFailed("the process that runs the model's code wrote no figures") from None


def _rebuilt(facts: Any) -> Figures:
    subtasks = {"subtasks": [_word(name) for name in facts["subtasks"]]} if "subtasks" in facts else {}
    version = facts["version"]
    if not (isinstance(version, str | int | float | None) and not isinstance(version, bool)):
        raise TypeError
    return {
        **{key: _count(facts[key]) for key in ("n", "of", "shots")},
        "version": _word(version) if isinstance(version, str) else number(version),
        **subtasks,
        "higher_is_better": {_word(metric): _truth(up) for metric, up in facts["higher_is_better"].items()},
        "figures": {
            _word(key): {part: _figure(figure[part]) for part in ("value", "stderr")}
            for key, figure in facts["figures"].items()
        },
    }


def _word(value: Any) -> str:
    if not (isinstance(value, str) and value.isprintable()):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _figure(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError
    return number(value)


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | None) or (value is not None and not 0 <= value < 1 << 53):
        raise TypeError
    return value
