"""The score stage of a run: `start/` (the adapter as it is scored) and `scores.safetensors`."""

import logging

import torch
from transformers import set_seed

from ..adapter.attach import attach, save_adapter
from ..adapter.options import lora_config
from ..data.labels import drawn
from ..distributed import processes
from ..files import atomic_folder
from ..model.quantised import QUANTISED, quantisation
from ..recipe.sections import Recipe
from ..stage import ADAPTED, LABELS, SCORES, Facts, Run, Stage, adapter_files, no_inputs, tokens_learned
from .score import score
from .scores import facts_of, save_scores
from .sums import files_of, remove

log = logging.getLogger("lorapar")
# A system's running sums, until scores.safetensors is there; each process but the main one has its rank in the name.
SUMS = "scoring-system{}.safetensors"


def score_stage(run: Run) -> Facts:
    """Attach, score both systems in this one model load (plain LoRA needs no scores), and write start and scores.

    Scoring writes nothing into the model, so the start is written last: one that cannot be scored replaces none.
    """
    recipe, folder, config = run.recipe, run.folder, run.recipe.score
    set_seed(recipe.seed)
    labels, _ = run.put_aside()
    model = attach(run.load_model(), lora_config(recipe.lora), recipe.start, recipe.seed)
    both, facts = [], {}
    for system in (1, 2) if recipe.partition.selection != "all" else ():
        rows = drawn(labels, system, config.examples, recipe.seed)
        scores = score(
            model, run.tokenizer, rows, config.batch_size, config.method, config.max_length, recipe.seed,
            config.until_stable, recipe.partition.theta, folder / SUMS.format(system), turns=recipe.data.loss,
        )  # fmt: skip
        both.append(scores)
        facts |= facts_of(scores, system)
    if processes.is_main():
        with atomic_folder(folder / "start") as temporary:
            save_adapter(model, temporary, start=recipe.start, stage="start")
        if both:
            save_scores(folder / SCORES, *both)
            for system in (1, 2):
                remove(folder / SUMS.format(system))
    processes.wait()
    return facts if both else {"scored": "nothing: partition.selection is all"}


def check(run: Run) -> None:
    """Make PEFT's configuration and the base's form of quantisation, which refuse what they cannot take."""
    lora_config(run.recipe.lora)
    base = run.recipe.lora.get("base")
    if base in QUANTISED:
        quantisation(base, torch.float32)


def discard(run: Run) -> None:
    """Remove the running sums of an attempt that had other inputs."""
    for system in (1, 2):
        for sums in files_of(run.folder / SUMS.format(system)):
            log.info("%s: made from other inputs, removed", sums)
            sums.unlink()


def stage(recipe: Recipe) -> Stage:
    scored = recipe.partition.selection != "all"
    # When scoring stops depends on θ only where it waits for the kept sets.
    stop = ("partition",) if recipe.score.until_stable is not None else ()
    return Stage(
        "score",
        run=score_stage,
        sections=(*ADAPTED, "score", "seed", *stop),
        reads=(LABELS,),
        writes=(*adapter_files("start"), *([SCORES] if scored else [])),
        inputs=tokens_learned if scored else no_inputs,
        check=check,
        discard=discard,
        together=True,
    )
