"""Each stage as a function of recipe and output folder: load what it reads, call the method, write its artefact."""

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.integrations import get_available_reporting_integrations  # pyright: ignore[reportPrivateImportUsage]

from lorapar_kernels import backend

from .adapter.attach import attach, load_adapter, save_adapter
from .adapter.layers import lora_parameters
from .adapter.options import lora_config
from .data.labels import load_adapter_shapes, load_labels
from .data.rows import load_rows
from .errors import InputError
from .evaluating.evaluate import evaluate
from .exporting.export import export
from .files import atomic_folder, read_json, write_json, write_jsonl
from .labeling import Column, make_voters, votes_of
from .labeling import stage as teaching
from .labeling.voting import check_corrections, kept_and_dropped
from .memory.switches import check_switches, default_checkpointing
from .model.load import choose_device, load_model, load_tokenizer
from .model.quantised import QUANTISED, quantisation
from .partitioning.choose import partition
from .partitioning.partition import Partition
from .recipe.sections import Recipe
from .rewards import resolve_rewards
from .scoring.score import score
from .scoring.scores import Scores, load_scores, save_scores
from .training.trainer import rows_of, save_stage

log = logging.getLogger("lorapar")
Facts = dict[str, Any]
SCORING = "scoring-system{}.safetensors"  # a system's running sums, until scores.safetensors is there


def label_stage(recipe: Recipe, folder: Path) -> Facts:
    """Ask every voter about every row; teachers, where there are any, after those that cost nothing."""
    # First of all, so that a key that is not set or a template that cannot serve is refused before a model is loaded.
    panel = teaching.panel_of(recipe, _voter_names(recipe))
    corrections = teaching.corrections_of(recipe, folder)
    tokenizer = load_tokenizer(recipe.model)
    rows, counts = load_rows(recipe.data, tokenizer)
    for source, count in counts.items():
        log.info("label: %s: %s", source, ", ".join(f"{n} {what}" for what, n in count.items()))
    check_corrections(corrections, rows)
    votes, asked = _local_votes(recipe, rows, tokenizer), {}
    if panel is not None:
        given, asked = teaching.ask_panel(panel, rows, votes, folder, tokenizer)
        votes |= given
    labelled, dropped = kept_and_dropped(rows, [], votes, recipe.label.ties, recipe.label.weights, corrections)
    needed = {system for stage in recipe.stages for system in getattr(recipe, stage).systems}
    if recipe.partition.selection != "all":
        needed |= {1, 2}
    for system in sorted(needed):
        rows_of(labelled, [system], "train")
    teaching.write_dropped(folder, dropped)
    write_jsonl(folder / "labels.jsonl", labelled)
    split_system = list(zip(labelled["split"], labelled["system"]))
    return {
        "rows": len(labelled),
        **({"dropped": len(dropped)} if len(dropped) else {}),
        "sources": counts,
        **asked,
        **teaching.summary(labelled),
        **{f"{split}_system{s}": split_system.count((split, s)) for split in ("train", "held_out") for s in (1, 2)},
    }


def label_dry_run(recipe: Recipe, folder: Path) -> str:
    """What the teachers have still to be asked, as a table; nobody is asked and nothing is written."""
    panel = teaching.panel_of(recipe, _voter_names(recipe))
    if panel is None:
        return "No call remains: the recipe has no teachers."
    tokenizer = load_tokenizer(recipe.model)
    return teaching.what_remains(panel, load_rows(recipe.data, tokenizer)[0], folder, tokenizer)


def label_review(recipe: Recipe, folder: Path) -> Path:
    """Write the rows that the votes so far split on as a CSV for a person; nobody is asked."""
    panel = teaching.panel_of(recipe, _voter_names(recipe))
    tokenizer = load_tokenizer(recipe.model)
    rows, _ = load_rows(recipe.data, tokenizer)
    path, count = teaching.write_split(recipe, rows, _local_votes(recipe, rows, tokenizer), panel, folder)
    log.info("label: %d rows to review in %s; write 1 or 2 under corrected and run label again", count, path)
    return path


def _local_votes(recipe: Recipe, rows: Dataset, tokenizer: Any) -> dict[str, list[int | None]]:
    """The votes of the voters that need no network."""
    if recipe.label.column:
        voters = [Column(recipe.label.column)]
    else:
        probes = any(_voter_name(voter) == "probe" for voter in recipe.label.voters or [])
        voters = make_voters(recipe.label.voters or [], _model(recipe) if probes else None, tokenizer)
    return votes_of(voters, rows)


def score_stage(recipe: Recipe, folder: Path) -> Facts:
    """Attach, score both systems in this one model load (plain LoRA needs no scores), and write start and scores.

    Scoring writes nothing into the model, so the start is written last: one that cannot be scored replaces none.
    """
    set_seed(recipe.seed)
    tokenizer, labelled = load_tokenizer(recipe.model), load_labels(folder)
    model = attach(_model(recipe), lora_config(recipe), recipe.start, recipe.seed)
    config, both, facts = recipe.score, [], {}
    for system in (1, 2) if recipe.partition.selection != "all" else ():
        rows = rows_of(labelled, [system]).shuffle(seed=recipe.seed)
        rows = rows.select(range(min(config.examples or len(rows), len(rows))))
        made = score(
            model, tokenizer, rows, config.batch_size, config.method, config.max_length, recipe.seed,
            config.until_stable, recipe.partition.theta, folder / SCORING.format(system),
        )  # fmt: skip
        both.append(made)
        facts[f"examples_system{system}"] = made.metadata["examples"]
        if config.until_stable is not None:
            facts[f"stable_system{system}"] = made.metadata["stable"]
            facts[f"looks_system{system}"] = made.metadata["looks"]
    with atomic_folder(folder / "start") as temporary:
        save_adapter(model, temporary, start=recipe.start, stage="start")
    if not both:
        return {"scored": "nothing: partition.selection is all"}
    save_scores(folder / "scores.safetensors", *both)
    for system in (1, 2):
        (folder / SCORING.format(system)).unlink()
    return facts


def partition_stage(recipe: Recipe, folder: Path) -> Facts:
    config = recipe.partition
    if config.selection == "all":
        shapes = load_adapter_shapes(folder / "start")
        rank = read_json(folder / "start" / "lorapar.json")["rank"]
        both = Scores(shapes, {"rank": rank}), Scores(shapes, {"rank": rank})
    else:
        both = load_scores(folder / "scores.safetensors")
    made = partition(*both, **dataclasses.asdict(config), seed=recipe.seed)
    made.save(folder / "partition.safetensors")
    summary = made.summary()
    return {"jaccard": summary["jaccard"], **summary["fraction"]}


def sft_stage(recipe: Recipe, folder: Path) -> Facts:
    from .training.sft import sft

    set_seed(recipe.seed)
    config = _trainer_config(recipe, "sft", folder)
    model, tokenizer, made = _start_of_stage(recipe, folder, "sft")
    trainer, trained = sft(
        model, tokenizer, load_labels(folder), made, config, recipe.sft.systems, resume=True,
        longest_first=recipe.sft.longest_first, micro_batch_tokens=recipe.sft.micro_batch_tokens,
    )  # fmt: skip
    return _end_of_stage(recipe, folder, "sft", trainer, trained)


def grpo_stage(recipe: Recipe, folder: Path) -> Facts:
    from .training.grpo import grpo

    set_seed(recipe.seed)
    rewards = resolve_rewards(recipe.grpo.rewards)
    config = _trainer_config(recipe, "grpo", folder)
    model, tokenizer, made = _start_of_stage(recipe, folder, "grpo")
    trainer, trained = grpo(model, tokenizer, load_labels(folder), made, config, rewards, recipe.grpo.systems,
                            resume=True, longest_first=recipe.grpo.longest_first,
                            rollout_batch_size=recipe.grpo.rollout_batch_size,
                            logprob_tokens=recipe.grpo.logprob_tokens,
                            activation_offloading=recipe.grpo.activation_offloading)  # fmt: skip
    return _end_of_stage(recipe, folder, "grpo", trainer, trained)


def evaluate_stage(recipe: Recipe, folder: Path) -> Facts:
    """The base (adapter off) and the model after each stage, on the same held-out rows."""
    tokenizer, config = load_tokenizer(recipe.model), recipe.evaluate
    labelled = load_labels(folder)
    rows = [row for row in cast(Sequence[dict[str, Any]], labelled) if row["split"] == "held_out"]
    if config.limit is not None:
        rows = [row for s in (1, 2) for row in [r for r in rows if r["system"] == s][: config.limit]]
    if not rows:
        raise InputError("data.held_out: no row was held out, so nothing can be evaluated; hold some out")
    results, answers = {}, []
    for name in ("base", *recipe.stages):
        adapter = recipe.stages[0] if name == "base" else name
        model = load_adapter(_model(recipe), folder / adapter)
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            result = evaluate(model, tokenizer, rows, config.max_new_tokens, config.batch_size, f"evaluate {name}")
        answers += [{"model": name, **answer} for answer in result.pop("answers")]
        results[name] = result
        log.info("evaluate: %s: %s", name, {k: round(v, 4) for k, v in result["accuracy"].items()})
    made = Partition.load(folder / "partition.safetensors")
    write_jsonl(folder / "answers.jsonl", answers)
    write_json(
        folder / "metrics.json",
        {
            "accuracy": {name: result["accuracy"] for name, result in results.items()},
            "interval": {name: result["interval"] for name, result in results.items()},
            "n": results["base"]["n"],
            "partition": made.summary(),
        },
    )
    return {f"{name}": round(result["accuracy"]["all"], 4) for name, result in results.items()}


def export_stage(recipe: Recipe, folder: Path) -> Facts:
    tokenizer = load_tokenizer(recipe.model)
    model = load_adapter(_model(recipe), folder / recipe.stages[-1])
    dtype = None if recipe.export.dtype == "auto" else getattr(torch, recipe.export.dtype)
    differences = export(model, tokenizer, folder, recipe.export.merged, dtype, recipe.model.revision,
                         recipe.model.trust_remote_code)  # fmt: skip
    facts: Facts = {f"{what}_logit_difference": value for what, value in differences.items()}
    if recipe.export.merged:
        files = [file for file in sorted((folder / "merged").iterdir()) if file.is_file()]
        facts["bytes"] = {f"merged/{file.name}": file.stat().st_size for file in files}
    return facts


def report_stage(recipe: Recipe, folder: Path) -> Facts:
    from .reporting.report import report

    report(folder)
    return {}


def check_recipe(recipe: Recipe, folder: Path, only: str | None = None) -> None:
    """Build what the stages will be handed, so that a setting none of them takes is refused before any work is done.

    `only` "label" or "report": but for the trainers' settings, which a machine that does no more need not be able to
    follow (bf16).
    """
    from .training.grpo import check_engine

    try:
        backend.forced()
    except ValueError as error:
        raise InputError(str(error)) from None
    lora_config(recipe)
    if recipe.lora.get("base") in QUANTISED:
        quantisation(recipe.lora["base"], torch.float32)
    if recipe.label.column is None:
        make_voters([voter for voter in recipe.label.voters or [] if _voter_name(voter) != "probe"])
    if only in ("label", "report"):
        return
    if "sft" in recipe.stages:
        _trainer_config(recipe, "sft", folder)
    if "grpo" in recipe.stages:
        check_engine(_trainer_config(recipe, "grpo", folder), recipe.lora.get("base"))
        resolve_rewards(recipe.grpo.rewards)


def discard_checkpoints(recipe: Recipe, folder: Path, stage: str) -> None:
    """Remove what an unfinished stage has left, which belongs to inputs that are no longer the recipe's.

    Raises InputError, and removes nothing, where the recipe's rows would be refused by the stage itself.
    """
    checkpoints = list((folder / stage).glob("checkpoint-*"))
    if checkpoints:
        rows = rows_of(load_labels(folder), getattr(recipe, stage).systems)
        if stage == "sft":
            from .training.sft import rows_that_fit

            max_length = _trainer_config(recipe, stage, folder).max_length
            rows_that_fit(rows, load_tokenizer(recipe.model), max_length)
    if is_main_process():
        for checkpoint in checkpoints:
            log.info("%s: made from other inputs, removed", checkpoint)
            shutil.rmtree(checkpoint)
        for sums in folder.glob(SCORING.format("*")) if stage == "score" else ():
            log.info("%s: made from other inputs, removed", sums)
            sums.unlink()


def is_main_process() -> bool:
    return PartialState().is_main_process


def wait_for_everyone() -> None:
    PartialState().wait_for_everyone()


def _model(recipe: Recipe) -> PreTrainedModel:
    config = recipe.model
    if config.device is None and PartialState().num_processes > 1:
        config = dataclasses.replace(config, device=str(PartialState().device))
    return load_model(config, recipe.lora.get("base"))


def _voter_names(recipe: Recipe) -> list[str]:
    """The names that the recipe's voters vote under."""
    if recipe.label.column:
        return [f"column:{recipe.label.column}"]
    return [f"column:{voter.get('column')}" if isinstance(voter, dict) and voter.get("name") == "column"
            else str(_voter_name(voter)) for voter in recipe.label.voters or []]  # fmt: skip


def _voter_name(voter: str | dict[str, Any]) -> Any:
    return voter if isinstance(voter, str) else voter.get("name")


def _previous(recipe: Recipe, stage: str) -> str:
    position = recipe.stages.index(stage)  # type: ignore[arg-type]
    return recipe.stages[position - 1] if position else "start"


def _start_of_stage(recipe: Recipe, folder: Path, stage: str) -> tuple[Any, Any, Partition]:
    tokenizer = load_tokenizer(recipe.model)
    model = load_adapter(_model(recipe), folder / _previous(recipe, stage))
    return model, tokenizer, Partition.load(folder / "partition.safetensors")


def _end_of_stage(recipe: Recipe, folder: Path, stage: str, trainer: Any, trained: Any) -> Facts:
    if is_main_process():
        facts = {"stage": stage, "start": recipe.start, "partition": trainer.partition.hash,
                 "systems": getattr(recipe, stage).systems}  # fmt: skip
        save_stage(trainer, folder / stage, facts, trained)
    elements = sum(p.numel() for p in lora_parameters(trainer.model).values())
    return {
        "rows": trained.rows,
        "systems": getattr(recipe, stage).systems,
        "left_out": trained.left_out,
        "active": trained.verified["active"],
        "moved": trained.verified["moved"],
        "elements": elements,
        "optimizer_state_bytes": trained.optimizer_state_bytes,
        "resumed_from": trained.resumed_from,
        **({"rollout_seconds": round(trained.rollout_seconds, 3)} if stage == "grpo" else {}),
    }


def _trainer_config(recipe: Recipe, stage: str, folder: Path) -> Any:
    """The stage's section as TRL's SFTConfig or GRPOConfig."""
    import trl

    config_class = trl.SFTConfig if stage == "sft" else trl.GRPOConfig  # pyright: ignore[reportPrivateImportUsage]
    ours = {
        "output_dir": str(folder / stage),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # A bar for a person, a line a logging step for a file.
        "disable_tqdm": not sys.stderr.isatty(),
        "gradient_checkpointing": default_checkpointing(choose_device(recipe.model.device).type),
    }
    try:
        config = config_class(**(ours | getattr(recipe, stage).trainer))
    except (TypeError, ValueError) as error:
        raise InputError(f"{stage}: {error}") from error
    offloading = {"activation_offloading": recipe.grpo.activation_offloading} if stage == "grpo" else {}
    check_switches(vars(config) | offloading, stage, choose_device(recipe.model.device).type)
    available = get_available_reporting_integrations()
    for tracker in config.report_to or ():
        if tracker not in available:
            allowed = ", ".join(["none", *available])
            raise InputError(f"{stage}.report_to: {tracker!r} is not installed here; allowed: {allowed}")
    return config
