"""Stage 2: GRPO on the other system's elements and rows, from stage 1's result (paper section 3.4), on TRL's trainer.

With `beta` ≠ 0 the reference model is the adapter as it came, stage 1's result, which TRL copies to an adapter "ref".
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from .partition import Partition
from .training import PAPER, PartitionedTrainer, Trained, rows_of, train

log = logging.getLogger("lorapar")
# Ours, or the completion that GRPO makes itself; the rest reaches the rewards by name.
NOT_FOR_REWARDS = ("completion", "split", "votes", "agreement", "teachers")


class PartitionedGRPOTrainer(PartitionedTrainer, GRPOTrainer):
    """TRL's GRPOTrainer that trains a partition's "grpo" elements; takes what GRPOTrainer takes."""

    _tag_names = ["trl", "grpo", "lora-par"]  # noqa: RUF012 (TRL reads it off the class)
    _name = "LoRA-PAR GRPO"
    _paper = PAPER


def grpo(
    model: PeftModel,
    tokenizer: Any,
    dataset: Dataset,
    partition: Partition,
    config: GRPOConfig,
    rewards: Sequence[Callable[..., list[float | None]]],
    systems: Sequence[int] = (2,),
    resume: bool = False,
) -> tuple[PartitionedGRPOTrainer, Trained]:
    """Train the partition's "grpo" elements of `model` in place on the prompts of `systems`.

    Args:
        model: stage 1's result. dataset: rows with prompt and what the rewards read (`answer`, ...); where it has the
            columns `system` and `split`, only train rows of `systems` are used.
        config: TRL's own; its `output_dir` holds the checkpoints. resume: go on from the last whole checkpoint there.
        rewards: TRL reward functions, `f(prompts, completions, completion_ids, <columns>, **kw) -> list[float | None]`.

    Returns the trainer and what it did; raises InputError, or FrozenElementsChanged where the proof at the end fails.
    """
    rows = rows_of(dataset, systems)
    examples = rows.remove_columns([name for name in NOT_FOR_REWARDS if name in rows.column_names])
    trainer = PartitionedGRPOTrainer(
        model=model,
        reward_funcs=list(rewards),
        args=config,
        train_dataset=examples,
        processing_class=tokenizer,
    )
    reference = "the adapter as this stage received it" if config.beta else "none (beta is 0)"
    log.info("grpo: %d prompts, reference model: %s", len(examples), reference)
    return trainer, train(trainer, partition, "grpo", len(examples), resume)
