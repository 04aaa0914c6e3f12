"""Which rows are System 1 and which System 2: voters vote, the majority is the label.

A voter is any object with a `name` and `vote(rows) -> list[1 | 2 | None]`; here are those that need no network: a label
column that exists already, readable rules, and the probe of the target model. Teachers, models that are asked in words,
form a panel: `votes = ask(make_panel(...), rows, "votes.sqlite")`, and then `label(rows, voters, votes)`.
"""

from ..recipe.label import LabelConfig, TeacherConfig
from .asking import ask
from .panel import make_panel
from .rules import Operations, ReasoningSteps
from .voters import Column, Probe, make_voters
from .voting import Voter, label, votes_of

__all__ = ["Column", "LabelConfig", "Operations", "Probe", "ReasoningSteps", "TeacherConfig", "Voter", "ask", "label",
           "make_panel", "make_voters", "votes_of"]  # fmt: skip
