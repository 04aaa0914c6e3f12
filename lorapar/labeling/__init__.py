"""Which rows are System 1 and which System 2: voters vote, the majority is the label.

Here are the voters that need no network: a label column that exists already, readable rules, and the probe of
the target model. A voter is any object with a `name` and `vote(rows) -> list[1 | 2 | None]`.
"""

from .rules import Operations, ReasoningSteps
from .voters import Column, Probe, make_voters
from .voting import Teacher, label

__all__ = ["Column", "Operations", "Probe", "ReasoningSteps", "Teacher", "label", "make_voters"]
