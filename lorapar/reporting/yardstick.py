"""What other seeds of the quickstart's recipe came to, beside a run of it: one run alone says little.

`quickstart.json` is written by `python -m bench.study --summary`: the recipe's keys that change a result, and the
figures of each arm.
"""

import json
from pathlib import Path
from typing import Any

from .artefacts import Artefacts
from .html import escaped, html_table

FIGURES = Path(__file__).with_name("quickstart.json")
ARMS = {
    "scores": "this recipe",
    "all": "plain LoRA (<code>partition.selection: all</code>)",
    "random": "as many elements at random (<code>partition.selection: random</code>)",
}


def yardstick(run: Artefacts) -> str:
    """A table of the study's figures; "" for a run of another recipe."""
    study = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else None
    if study is None or not run.recipe or not _holds(study["recipe"], run.recipe):
        return ""
    rows = []
    for arm, words in ARMS.items():
        if arm not in study["arms"]:
            continue
        figures = study["arms"][arm]
        cells = [f"<th>{words}</th><td>{figures['seeds']}</td>"]
        for system in ("system1", "system2"):
            for when in ("first", "last"):
                mean, low, high, least, most = (100 * value for value in figures[system][when])
                cells.append(
                    f"<td>{mean:.1f} %<small>{low:.1f}–{high:.1f}</small><small>{least:.0f} to {most:.0f}</small></td>"
                )
        rows.append("".join(cells))
    seeds = study["arms"]["scores"]["seeds"]
    heads = ["arm", "seeds", "System 1 after SFT", "after GRPO", "System 2 after SFT", "after GRPO"]
    return (
        f"<h3>A yardstick</h3><p>One run is one draw. {seeds} seeds of this recipe gave this (means, their "
        "95 % intervals over seeds and rows, and the lowest and the highest seed), on "
        f"{escaped(study['device'])} in {escaped(study['precision'])}.</p>{html_table(heads, rows)}"
    )


def _holds(wanted: Any, found: Any) -> bool:
    """Whether every key of the study's recipe has its value in the run's.

    A run's recipe is written as resolved: a key that it lacks is younger than the run, which had its default.
    """
    if not isinstance(wanted, dict):
        return wanted == found
    return isinstance(found, dict) and all(_holds(value, found[key]) for key, value in wanted.items() if key in found)
