"""The training stages of a run: `sft/`, from the adapter in `start/`, then `grpo/`, from that of `sft/`."""

import copy
import logging
import re
import shutil
import sys
from typing import Any

import torch
from transformers import get_scheduler, set_seed
from transformers.integrations import get_available_reporting_integrations  # pyright: ignore[reportPrivateImportUsage]

from ..adapter.attach import load_adapter
from ..adapter.layers import lora_parameters
from ..data.labels import once_a_prompt, rows_of
from ..distributed import processes
from ..errors import InputError, require
from ..files import why_not_whole
from ..memory.switches import check_switches, checkpointing
from ..model.load import choose_device
from ..partitioning.partition import Partition
from ..recipe.sections import Recipe, StageConfig
from ..rewards import resolve_rewards
from ..stage import (
    ADAPTED,
    LABELS,
    Facts,
    Run,
    Stage,
    adapter_files,
    partition_of,
    tokens_learned,
    tokens_watched,
    weights_of,
)
from .best import check_evaluation
from .trainer import StageName, checkpoints_of, made_by, save_stage
from .watching import WATCHED, check_watching

log = logging.getLogger("lorapar")


def sft_stage(run: Run) -> Facts:
    from .sft import sft

    set_seed(run.recipe.seed)
    section, config = run.recipe.sft, trainer_config(run, "sft", going_on=True)
    model, tokenizer, partition = _to_train(run, "sft")
    rows, evaluated = run.rows_of_sft()
    trainer, trained = sft(
        model, tokenizer, rows, partition, config, section.systems, resume=True,
        longest_first=section.longest_first, micro_batch_tokens=section.micro_batch_tokens,
        eval_dataset=evaluated, early_stopping_patience=section.early_stopping_patience, turns=run.recipe.data.loss,
    )  # fmt: skip
    return _finish(run, "sft", trainer, trained)


def grpo_stage(run: Run) -> Facts:
    from .grpo import grpo

    set_seed(run.recipe.seed)
    section, rewards, config = (
        run.recipe.grpo,
        resolve_rewards(run.recipe.grpo.rewards),
        trainer_config(run, "grpo", going_on=True),
    )
    model, tokenizer, partition = _to_train(run, "grpo")
    rows, watched = run.put_aside()
    trainer, trained = grpo(
        model, tokenizer, rows, partition, config, rewards, section.systems, resume=True,
        longest_first=section.longest_first, rollout_batch_size=section.rollout_batch_size,
        logprob_tokens=section.logprob_tokens, activation_offloading=section.activation_offloading,
        watched=watched, watch_rise=section.watch_rise, watched_turns=run.recipe.data.loss,
    )  # fmt: skip
    return _finish(run, "grpo", trainer, trained)


def _to_train(run: Run, name: StageName) -> tuple[Any, Any, Partition]:
    """The model with the adapter of the stage before, a tokenizer that the trainer may change, and the partition."""
    tokenizer = copy.deepcopy(run.tokenizer)
    model = load_adapter(run.load_model(), run.folder / before(run.recipe, name))
    return model, tokenizer, Partition.load(run.folder / partition_of(run.recipe, name))


def before(recipe: Recipe, name: StageName) -> str:
    """The folder of the adapter that a training stage starts from."""
    position = recipe.stages.index(name)
    return recipe.stages[position - 1] if position else "start"


def _finish(run: Run, name: StageName, trainer: Any, trained: Any) -> Facts:
    systems = getattr(run.recipe, name).systems
    if processes.is_main():
        facts = {"stage": name, "start": run.recipe.start, "partition": trainer.partition.hash, "systems": systems}
        save_stage(trainer, run.folder / name, facts, trained)
    return {
        "rows": trained.rows,
        "systems": systems,
        "left_out": trained.left_out,
        "active": trained.verified["active"],
        "moved": trained.verified["moved"],
        "tensors": trained.verified["tensors"],
        "tensors_moved": trained.verified["tensors_moved"],
        "elements": sum(p.numel() for p in lora_parameters(trainer.model).values()),
        "optimizer_state_bytes": trained.optimizer_state_bytes,
        "resumed_from": trained.resumed_from,
        **({"rollout_seconds": round(trained.rollout_seconds, 3)} if name == "grpo" else {}),
        **({"watched": trained.watched} if trained.watched else {}),
        **({"best": trained.best} if trained.best else {}),
    }


def trainer_config(run: Run, name: StageName, going_on: bool = False) -> Any:
    """The stage's section as TRL's SFTConfig or GRPOConfig, with the batch of its checkpoints.

    going_on: every process of the launch makes it, to go on from one of them.
    """
    import trl

    recipe, device = run.recipe, choose_device(run.recipe.model.device).type
    config_class = trl.SFTConfig if name == "sft" else trl.GRPOConfig  # pyright: ignore[reportPrivateImportUsage]
    ours = {
        "output_dir": str(run.folder / name),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # A bar for a person, a line a logging step for a file.
        "disable_tqdm": not sys.stderr.isatty(),
        "gradient_checkpointing": checkpointing(getattr(recipe, name), device),
        # Without it, and without a GPU, transformers takes each process of a launch for the only one.
        "use_cpu": device == "cpu",
    }
    batch = _batch_as_before(run, name) if not going_on else processes.from_main(lambda: _batch_as_before(run, name))
    if going_on and "batch" in batch:
        raise InputError(
            f"{name}: {processes.count()} processes cannot share the batches of {batch['batch']} rows that it was "
            f"begun with; launch another number, or remove {run.folder / name}/checkpoint-*"
        )
    if going_on and batch:
        log.info("%s: begun in another number of processes, and gone on with in %d at the same rows a step: %s", name,
                 processes.count(), ", ".join(f"{key} {value}" for key, value in batch.items() if value))  # fmt: skip
    given = getattr(recipe, name).trainer | {key: value for key, value in batch.items() if key != "batch"}
    try:
        config = config_class(**(ours | given))
    except (TypeError, ValueError) as error:
        # transformers names its arguments as its own scripts take them.
        raise InputError(f"{name}: {re.sub('--(?=[a-z])', f'{name}.', str(error))}") from error
    _check_config(config, name, device)
    offloading = {"activation_offloading": recipe.grpo.activation_offloading} if name == "grpo" else {}
    check_switches(vars(config) | offloading, name, device)
    return config


def _batch_as_before(run: Run, name: StageName) -> dict[str, int | None]:
    """What has this launch take the batches that the stage's last checkpoint was made with, where that was another
    number of processes: a recipe's batch is one process's, and the steps that are left are of as many rows as before.

    {"batch": its rows} where so many processes cannot share it.
    """
    found = (made_by(path) for path in checkpoints_of(run.folder / name) if not why_not_whole(path / "lorapar.json"))
    made: dict[str, Any] = next(found, {"processes": None})
    count, section = processes.count(), getattr(run.recipe, name)
    if made["processes"] in (None, count):
        return {}
    rows, largest = made["batch"], section.setting("per_device_train_batch_size")
    sizes = [size for size in range(1, largest + 1) if rows % (size * count) == 0]
    if not sizes:
        return {"batch": rows}
    batch = {"per_device_train_batch_size": sizes[-1], "gradient_accumulation_steps": rows // (sizes[-1] * count)}
    return batch | (
        {"generation_batch_size": made["generated"], "steps_per_generation": None} if made["generated"] else {}
    )


def _check_config(config: Any, name: StageName, device: str) -> None:
    """InputError for settings that transformers would refuse, or overrule in silence, in the middle of a run."""
    require(device != "cpu" or not config.fp16, f"{name}.fp16", True, "false on a CPU, which trains in bf16 or fp32")
    on_cpu = config.use_cpu or not torch.cuda.is_available()
    require(
        on_cpu == (device == "cpu"), f"{name}.use_cpu", config.use_cpu, f"{device == 'cpu'}: the model is on {device}"
    )
    evaluates = str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no"
    saves = str(getattr(config.save_strategy, "value", config.save_strategy))
    best = config.metric_for_best_model is not None and evaluates
    require(best or saves != "best", f"{name}.save_strategy", saves, "steps, epoch or no, or eval_strategy and "
            "metric_for_best_model beside it")  # fmt: skip


def check_settings(section: StageConfig, name: StageName) -> None:
    """InputError for what the recipe asks of the trainer's libraries, and they have not; no device is looked for."""
    given = section.trainer
    check_switches(given, name, "cuda")
    trackers = given.get("report_to") or []
    available = ["none", "all", *get_available_reporting_integrations()]
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker not in available:
            raise InputError(f"{name}.report_to: {tracker!r} is not installed here; allowed: {', '.join(available)}")
    arguments = given.get("lr_scheduler_kwargs")
    if arguments is not None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(section.setting("lr_scheduler_type"), optimizer, 1, 2, arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}.lr_scheduler_kwargs: got {arguments!r}: {error}") from None


def check(run: Run, name: StageName) -> None:
    """Make the trainer's configuration, and find the rewards."""
    check_settings(getattr(run.recipe, name), name)
    if name == "sft":
        check_evaluation(run.recipe.sft.setting, run.recipe.sft.early_stopping_patience)
    config = trainer_config(run, name)
    if name == "grpo":
        from .grpo import check_engine, check_generation

        check_engine(config, run.recipe.lora.get("base"))
        check_generation(config, len(run.tokenizer))
        positions, new = run.positions, config.max_completion_length
        if positions is not None and new is not None:
            require(new < positions, "grpo.max_completion_length", new,
                    f"less than the model's {positions} positions, which a prompt takes some of")  # fmt: skip
        if run.recipe.grpo.watch_rows:
            check_watching(config)
        resolve_rewards(run.recipe.grpo.rewards)


def check_rows(run: Run, name: StageName) -> None:
    """That the rows are short enough and fill a batch, and that GRPO's prompts have what its rewards need."""
    section, config = getattr(run.recipe, name), trainer_config(run, name)
    if name == "grpo":
        from .grpo import check_prompts, check_rewards, with_room

        rows = rows_of(run.put_aside()[0], section.systems)
        check_rewards(rows, resolve_rewards(section.rewards))
        check_prompts(len(with_room(once_a_prompt(rows), run.tokenizer, config, run.positions, say=False)[0]), config)
    else:
        from .sft import check_lengths

        rows, evaluated = run.rows_of_sft()
        check_lengths(rows_of(rows, section.systems), evaluated, run.tokenizer, config, run.recipe.data.loss)


def discard(run: Run, name: StageName) -> None:
    """Remove the checkpoints of an attempt that had other inputs, and the losses that were watched.

    Raises InputError, and removes nothing, where the recipe's rows would be refused by the stage itself.
    """
    checkpoints = list((run.folder / name).glob("checkpoint-*"))
    losses = run.folder / name / WATCHED
    if not checkpoints and not losses.exists():
        return
    rows = rows_of(run.rows_of_sft()[0] if name == "sft" else run.put_aside()[0], getattr(run.recipe, name).systems)
    if name == "sft":
        from .sft import check_lengths

        check_lengths(rows, None, run.tokenizer, trainer_config(run, name), run.recipe.data.loss)
    for checkpoint in checkpoints:
        log.info("%s: made from other inputs, removed", checkpoint)
        shutil.rmtree(checkpoint)
    losses.unlink(missing_ok=True)


def stage(recipe: Recipe, name: StageName) -> Stage:
    return Stage(
        name,
        run=sft_stage if name == "sft" else grpo_stage,
        sections=(*ADAPTED, name, "seed"),
        reads=(LABELS, partition_of(recipe, name), weights_of(before(recipe, name))),
        writes=adapter_files(name),
        inputs=tokens_learned if name == "sft" else tokens_watched,
        check=lambda run: check(run, name),
        check_rows=lambda run: check_rows(run, name),
        discard=lambda run: discard(run, name),
        together=True,
        trains=True,
    )
