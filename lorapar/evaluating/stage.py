"""The evaluate stage of a run: `metrics.json` and `answers.jsonl`."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, cast

from ..adapter.attach import load_adapter
from ..errors import InputError
from ..files import write_json, write_jsonl
from ..partitioning.partition import Partition
from ..recipe.sections import Recipe
from ..stage import ADAPTED, LABELS, Facts, Run, Stage, partition_of, weights_of
from .evaluate import evaluate

log = logging.getLogger("lorapar")


def evaluate_stage(run: Run) -> Facts:
    """Answer the same held-out rows with the base (adapter off) and after each stage, in one load of the model."""
    recipe, folder, config = run.recipe, run.folder, run.recipe.evaluate
    rows = [row for row in cast(Sequence[dict[str, Any]], run.labels()) if row["split"] == "held_out"]
    if config.limit is not None:
        rows = [row for s in (1, 2) for row in [r for r in rows if r["system"] == s][: config.limit]]
    if not rows:
        raise InputError("data.held_out: no row was held out, so nothing can be evaluated; hold some out")
    results, answers = {}, []
    first, *later = recipe.stages
    model = load_adapter(run.load_model(), folder / first)
    for name in ("base", first, *later):
        if name in later:
            model = load_adapter(model.unload(), folder / name)
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            result = evaluate(model, run.tokenizer, rows, config.max_new_tokens, config.batch_size, f"evaluate {name}")
        answers += [{"model": name, **answer} for answer in result.pop("answers")]
        results[name] = result
        log.info("evaluate: %s: %s", name, {k: round(v, 4) for k, v in result["accuracy"].items()})
    write_jsonl(folder / "answers.jsonl", answers)
    write_json(
        folder / "metrics.json",
        {
            "accuracy": {name: result["accuracy"] for name, result in results.items()},
            "interval": {name: result["interval"] for name, result in results.items()},
            "n": results["base"]["n"],
            "partition": Partition.load(folder / partition_of(recipe, recipe.stages[-1])).summary(),
        },
    )
    return {name: round(result["accuracy"]["all"], 4) for name, result in results.items()}


def stage(recipe: Recipe) -> Stage:
    return Stage(
        "evaluate",
        run=evaluate_stage,
        sections=(*ADAPTED, "evaluate", "stages"),
        reads=(LABELS, partition_of(recipe, recipe.stages[-1]), *map(weights_of, recipe.stages)),
        writes=("metrics.json", "answers.jsonl"),
    )
