"""The partition stage of a run: `partition.safetensors`."""

import dataclasses

from ..adapter.attach import saved_shapes
from ..files import read_json
from ..recipe.sections import Recipe
from ..scoring.scores import Scores, load_scores
from ..stage import PARTITION, SCORES, Facts, Run, Stage, weights_of
from .choose import partition


def partition_stage(run: Run) -> Facts:
    """Divide the elements by the scores; plain LoRA, which has none, by the start's shapes alone."""
    folder, config = run.folder, run.recipe.partition
    if config.selection == "all":
        shapes, rank = saved_shapes(folder / "start"), read_json(folder / "start" / "lorapar.json")["rank"]
        both = Scores(shapes, {"rank": rank}), Scores(shapes, {"rank": rank})
    else:
        both = load_scores(folder / SCORES)
    divided = partition(*both, **dataclasses.asdict(config), seed=run.recipe.seed)
    divided.save(folder / PARTITION)
    summary = divided.summary()
    return {"jaccard": summary["jaccard"], **summary["fraction"]}


def stage(recipe: Recipe) -> Stage:
    scored = recipe.partition.selection != "all"
    return Stage(
        "partition",
        run=partition_stage,
        sections=("partition", "seed"),
        reads=(SCORES if scored else weights_of("start"),),
        writes=(PARTITION,),
    )
