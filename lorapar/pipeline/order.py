"""The order of the stages.

labels.jsonl → start/, scores.safetensors → partition.safetensors → sft/ → grpo/ → metrics.json → adapter/ → report
and with evaluate.tasks, after metrics.json: tasks.json
and with score.renew, between sft/ and grpo/: scores_renewed.safetensors, partition_renewed.safetensors
"""

from ..benchmarking import stage as benchmarking
from ..evaluating import stage as evaluating
from ..exporting import stage as exporting
from ..labeling import stage as labeling
from ..partitioning import stage as partitioning
from ..recipe.sections import Recipe
from ..renewing import stage as renewing
from ..reporting import stage as reporting
from ..scoring import stage as scoring
from ..stage import Stage
from ..training import stage as training


def stages_of(recipe: Recipe) -> list[Stage]:
    """The recipe's stages, in their order."""
    first, *second = (training.stage(recipe, name) for name in recipe.stages)
    return [
        labeling.stage(recipe),
        scoring.stage(recipe),
        partitioning.stage(recipe),
        first,
        *([renewing.stage(recipe)] if recipe.score.renew else []),
        *second,
        evaluating.stage(recipe),
        *([benchmarking.stage(recipe)] if recipe.evaluate.tasks else []),
        exporting.stage(recipe),
        reporting.stage(recipe),
    ]
