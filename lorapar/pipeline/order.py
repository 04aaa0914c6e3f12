"""The order of the stages.

labels.jsonl → start/, scores.safetensors → partition.safetensors → sft/ → grpo/ → metrics.json → adapter/ → report
"""

from ..evaluating import stage as evaluating
from ..exporting import stage as exporting
from ..labeling import stage as labeling
from ..partitioning import stage as partitioning
from ..recipe.sections import Recipe
from ..reporting import stage as reporting
from ..scoring import stage as scoring
from ..stage import Stage
from ..training import stage as training


def stages_of(recipe: Recipe) -> list[Stage]:
    """The recipe's stages, in their order."""
    return [
        labeling.stage(recipe),
        scoring.stage(recipe),
        partitioning.stage(recipe),
        *(training.stage(recipe, name) for name in recipe.stages),
        evaluating.stage(recipe),
        exporting.stage(recipe),
        reporting.stage(recipe),
    ]
