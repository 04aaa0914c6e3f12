"""Which rows are System 1 and which System 2: voters vote, the majority is the label.

A voter is any object with a `name` and `vote(rows) -> list[1 | 2 | None]`; `label(rows, voters)` takes it as it is.
Teachers, models that are asked in words, form a panel with votes of its own: `votes = ask(make_panel(...), rows,
"votes.sqlite")`, and then `label(rows, voters, votes)`.

Where a new voter goes:
- a rule over the worked answer: a class in rules.py, and its line in the table VOTERS of voters.py;
- a voter that looks at something else (the target model, a column): a class in voters.py, and its line in VOTERS there.
  A recipe lists it by its key in VOTERS, with its class's arguments as options; `asks_model = True` has the class get
  the target model and its tokenizer;
- a kind of teacher: a file beside local.py and endpoint.py with a class as teacher.py describes it, and a line in
  panel.make_teacher.
"""

from ..recipe.sections import LabelConfig, TeacherConfig
from .asking import ask
from .panel import make_panel
from .rules import Operations, ReasoningSteps
from .voters import Column, Probe, make_voters
from .voting import Voter, label, votes_of

__all__ = ["Column", "LabelConfig", "Operations", "Probe", "ReasoningSteps", "TeacherConfig", "Voter", "ask", "label",
           "make_panel", "make_voters", "votes_of"]  # fmt: skip
