"""The evaluate stage of a run: `metrics.json` and `answers.jsonl`."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, cast

from ..adapter.attach import load_adapter
from ..data.labels import rows_of
from ..distributed import processes
from ..errors import InputError
from ..files import write_json, write_jsonl
from ..partitioning.partition import Partition
from ..recipe.sections import Recipe
from ..rewards import accuracy, check_answers, check_call
from ..stage import ADAPTED, LABELS, Facts, Run, Stage, partition_of, weights_of
from .evaluate import columns_of, evaluate, resolve_metric

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
    metric = resolve_metric(config.metric)
    judged_by: Any = {} if config.metric is None else {"metric": config.metric}
    mean = "accuracy" if metric is accuracy else "mean"
    model = load_adapter(run.load_model(), folder / first)
    for name in ("base", first, *later):
        if name in later:
            model = load_adapter(model.unload(), folder / name)
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            result = evaluate(
                model, run.tokenizer, rows, config.max_new_tokens, config.batch_size, f"evaluate {name}", **judged_by
            )
        answers += [{"model": name, **answer} for answer in result.pop("answers")]
        results[name] = result
        log.info("evaluate: %s: %s", name, {k: round(v, 4) for k, v in result[mean].items()})
    of_model = {key: {name: result[key] for name, result in results.items()} for key in results["base"]}
    if mean == "accuracy":
        # Which rows have an answer is the same for every model.
        of_model |= {"n": results["base"]["n"]}
        del of_model["interval_by"]
        if not any(of_model["none"].values()):
            del of_model["none"]
    if processes.is_main():
        write_jsonl(folder / "answers.jsonl", answers)
        partition = Partition.load(folder / partition_of(recipe, recipe.stages[-1])).summary()
        named = {} if mean == "accuracy" else {"metric": config.metric}
        write_json(folder / "metrics.json", {**named, **of_model, "partition": partition})
    processes.wait()
    return {name: round(result[mean]["all"], 4) if result[mean] else None for name, result in results.items()}


def check(run: Run) -> None:
    """Find the metric."""
    resolve_metric(run.recipe.evaluate.metric)


def check_rows(run: Run) -> None:
    """Say how many held-out rows cannot be judged; refuse a metric that could judge none."""
    labels, metric = run.labels(), run.recipe.evaluate.metric
    if "held_out" in labels["split"]:
        names = {metric or "accuracy": resolve_metric(metric)}
        rows = rows_of(labels, (1, 2), "held_out")
        check_call(resolve_metric(metric), columns_of(cast(Any, rows.select([0]))), "evaluate.metric")
        check_answers(names, rows, "evaluate.metric", "held-out rows", refuse=metric is not None)


def stage(recipe: Recipe) -> Stage:
    return Stage(
        "evaluate",
        run=evaluate_stage,
        sections=(*ADAPTED, "evaluate", "stages"),
        reads=(LABELS, partition_of(recipe, recipe.stages[-1]), *map(weights_of, recipe.stages)),
        writes=("metrics.json", "answers.jsonl"),
        check=check,
        check_rows=check_rows,
        together=True,
    )
