"""Voters that read the worked answer: rules by the number of its steps or of its arithmetic operations.

Anyone can check them by eye. They do not ask the model, so the labels, and with them the accuracy by system, do not
depend on what the model got right.
"""

import re
from typing import TYPE_CHECKING, Any

from ..data.answers import text_of
from ..data.finding import ANSWER_TAG, BOXED, HASHES, STATED
from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=\S)")
# An operator between two numbers. Up to four words of unit may follow the first number (8 large pies x 3, $6/day * 5),
# and then the operator needs space around it (not 5 well-known 3s); a bracket or currency may precede the second.
# Against the calculator marks of GSM8K's 7,473 training answers: 77 % agree exactly, 91 % within one.
OPERATION = re.compile(
    r"(?<=[\d)%])"
    r"(?:\s*(?:\*\*|[-+*/×÷·^−–xX])|(?:(?:\s*/\s*|\s+)[A-Za-z]+){1,4}\s+[-+*/×÷·−–xX]\s)"
    r"\s*[-−(]*\s*[$€£]?\s*(?=\.?\d)"
)


def reasoning_of(row: dict[str, Any]) -> str:
    r"""The completion up to its final answer (####, \boxed{}, <answer>, "answer is"); "" for a bare answer."""
    text = text_of(row["completion"]).strip()
    if text.casefold().rstrip(".") == str(row.get("answer") or "").strip().casefold().rstrip("."):
        return ""
    stated = [match.start() for sign in (ANSWER_TAG, HASHES, BOXED, STATED) for match in sign.finditer(text)]
    if stated:
        # The sentence that states the answer is no step: "So the answer is 5."
        begins = [match.end() for match in SENTENCE_END.finditer(text)] + [m.end() for m in re.finditer("\n", text)]
        cut = max((begin for begin in begins if begin <= max(stated)), default=0)
        text = text[:cut]
    return re.sub(r"</?(?:reasoning|think)>", "", text).strip()


def count_steps(row: dict[str, Any]) -> int:
    """The non-empty lines of the reasoning, or its sentences where it is a single line."""
    lines = [line for line in reasoning_of(row).splitlines() if line.strip()]
    return len(SENTENCE_END.split(lines[0].strip())) if len(lines) == 1 else len(lines)


def count_operations(row: dict[str, Any]) -> int:
    """The arithmetic operators between numbers in the worked answer, or in the question where the answer is bare."""
    text = reasoning_of(row)
    if not text:
        prompt = row["prompt"]
        text = prompt if isinstance(prompt, str) else text_of([turn for turn in prompt if turn["role"] == "user"][-1:])
    return len(OPERATION.findall(text))


def _check_threshold(name: str, threshold: Any) -> int:
    if not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 0:
        raise InputError(f"label.voters: threshold of {name} must be a whole number of at least 0, got {threshold!r}")
    return threshold


class ReasoningSteps:
    """System 1 if the worked answer has at most `threshold` steps before the final answer, else System 2.

    A step is a non-empty line, or a sentence where there is only one line. A bare answer has no steps and gets no vote.
    """

    name = "steps"

    def __init__(self, threshold: int = 1):
        self.threshold = _check_threshold(self.name, threshold)

    def vote(self, rows: "Dataset") -> list[int | None]:
        steps = [count_steps(row) for row in rows]  # pyright: ignore[reportArgumentType]
        return [None if count == 0 else 1 if count <= self.threshold else 2 for count in steps]


class Operations:
    """System 1 if there are at most `threshold` arithmetic operations (+ − × ÷ ^ between numbers), else System 2.

    They are counted in the worked answer, or in the question where the answer is bare.
    """

    name = "operations"

    def __init__(self, threshold: int = 1):
        self.threshold = _check_threshold(self.name, threshold)

    def vote(self, rows: "Dataset") -> list[int | None]:
        return [1 if count_operations(row) <= self.threshold else 2 for row in rows]  # pyright: ignore[reportArgumentType]
