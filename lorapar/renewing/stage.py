"""The renew stage of a run: `scores_renewed.safetensors` and `partition_renewed.safetensors`, between two trainings."""

import logging

from transformers import set_seed

from ..adapter.attach import load_adapter
from ..data.labels import drawn
from ..distributed import processes
from ..partitioning.partition import Partition
from ..recipe.sections import Recipe
from ..scoring.score import score
from ..scoring.scores import Scores, facts_of, load_scores, save_scores
from ..scoring.sums import files_of, remove
from ..stage import (
    ADAPTED,
    LABELS,
    PARTITION,
    PARTITION_RENEWED,
    SCORES,
    SCORES_RENEWED,
    Facts,
    Run,
    Stage,
    tokens_learned,
    weights_of,
)
from .renew import SYSTEM_OF, renew

log = logging.getLogger("lorapar")
SUMS = "scoring-renewed.safetensors"  # the running sums, until the partition is there


def renew_stage(run: Run) -> Facts:
    """Score the second stage's system on the first stage's adapter, and divide the elements by that.

    The scores' file holds both systems', as the partition is made of them: the other system's are the first ones.
    """
    recipe, folder, config = run.recipe, run.folder, run.recipe.score
    first, second = recipe.stages
    system = SYSTEM_OF[second]
    set_seed(recipe.seed)
    model = load_adapter(run.load_model(), folder / first)
    scores = score(
        model, run.tokenizer, drawn(run.put_aside()[0], system, config.examples, recipe.seed), config.batch_size,
        config.method, config.max_length, recipe.seed, config.until_stable, recipe.partition.theta, folder / SUMS,
        turns=recipe.data.loss,
    )  # fmt: skip
    return processes.from_main(lambda: _write(run, scores))


def _write(run: Run, scores: Scores) -> Facts:
    """The stage's two files, made of the second stage's renewed scores; the facts for its record."""
    folder, (first, second) = run.folder, run.recipe.stages
    system = SYSTEM_OF[second]
    both = list(load_scores(folder / SCORES))
    both[system - 1] = scores
    made = renew(Partition.load(folder / PARTITION), *both, stage=second)
    save_scores(folder / SCORES_RENEWED, *both)
    made.save(folder / PARTITION_RENEWED)
    remove(folder / SUMS)
    summary = made.summary()
    kept = made.metadata["renewed"]["jaccard"]
    log.info("renew: Jaccard %.4f of System %d's kept set before %s and after it", kept, system, first)
    return {**facts_of(scores, system), "jaccard_renewed": kept, "jaccard": summary["jaccard"], **summary["fraction"]}


def discard(run: Run) -> None:
    """Remove the running sums of an attempt that had other inputs."""
    for sums in files_of(run.folder / SUMS):
        log.info("%s: made from other inputs, removed", sums)
        sums.unlink()


def stage(recipe: Recipe) -> Stage:
    # When scoring stops depends on θ only where it waits for the kept sets; all else of the section is in the file.
    stop = ("partition",) if recipe.score.until_stable is not None else ()
    return Stage(
        "renew",
        run=renew_stage,
        sections=(*ADAPTED, "score", "seed", *stop),
        reads=(LABELS, SCORES, PARTITION, weights_of(recipe.stages[0])),
        writes=(SCORES_RENEWED, PARTITION_RENEWED),
        inputs=tokens_learned,
        discard=discard,
        together=True,
    )
