"""The report stage of a run: `report.html` and `figures/`."""

from collections.abc import Iterable
from typing import Any, cast

from ..recipe.sections import Recipe
from ..stage import LABELS, PARTITION, PARTITION_RENEWED, SCORES, SCORES_RENEWED, Facts, Run, Stage


def report_stage(run: Run) -> Facts:
    from .report import report

    report(run.folder, list(cast(Iterable[dict[str, Any]], run.labels())))
    return {}


def stage(recipe: Recipe) -> Stage:
    renewed = (SCORES_RENEWED, PARTITION_RENEWED) if recipe.score.renew else ()
    # Labels alone are enough: they should be looked at before anything is trained on them.
    return Stage(
        "report",
        run=report_stage,
        reads=(LABELS,),
        writes=("report.html",),
        optional_reads=("metrics.json", "answers.jsonl", "votes.jsonl", "dropped.jsonl", SCORES, PARTITION, *renewed,
               "grpo/watched.json", *(f"{name}/log_history.json" for name in recipe.stages)),
    )  # fmt: skip
