"""Stage 1: SFT of one system's elements on that system's rows (paper section 3.4), on TRL's trainer."""

from collections.abc import Sequence
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from .data import encode
from .errors import InputError
from .partition import Partition
from .rehearsal import longest, rehearsing
from .training import PAPER, PartitionedTrainer, Trained, rows_of, train


class PartitionedSFTTrainer(PartitionedTrainer, SFTTrainer):
    """TRL's SFTTrainer that trains a partition's "sft" elements; takes what SFTTrainer takes."""

    _tag_names = ["trl", "sft", "lora-par"]  # noqa: RUF012 (TRL reads it off the class)
    _name = "LoRA-PAR SFT"
    _paper = PAPER

    def rehearse(self, model: Any) -> None:
        rows = cast(Dataset, self.train_dataset)
        lengths = [len(ids) for ids in rows["input_ids"]]
        chosen = longest(lengths, self.args.per_device_train_batch_size)
        what = f"{len(chosen)} rows of up to {lengths[chosen[0]]} tokens"
        with rehearsing(self, model, what), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self.data_collator([rows[place] for place in chosen]))
            self.accelerator.backward(self.compute_loss(model, inputs))


def sft(
    model: PeftModel,
    tokenizer: Any,
    dataset: Dataset,
    partition: Partition,
    config: SFTConfig,
    systems: Sequence[int] = (1,),
    resume: bool = False,
    longest_first: bool = True,
) -> tuple[PartitionedSFTTrainer, Trained]:
    """Train the partition's "sft" elements of `model` in place on the rows of `systems`.

    Args:
        model: out of `lorapar.attach` or `load_adapter`. dataset: rows with prompt and completion; where it has the
            columns `system` and `split`, only train rows of `systems` are used.
        config: TRL's own; its `output_dir` holds the checkpoints. resume: go on from the last whole checkpoint there.
        longest_first: take the longest rows once through forward and backward before the first step (rehearsal.py).

    Rows longer than `config.max_length` are left out and counted, not cut (TRL cuts them in silence).
    Returns the trainer and what it did; raises InputError, or FrozenElementsChanged where the proof at the end fails.
    """
    rows = rows_of(dataset, systems)
    lengths = [len(encode(rows[i], tokenizer)[0]) for i in range(len(rows))]
    fits = [i for i, n in enumerate(lengths) if config.max_length is None or n <= config.max_length]
    if not fits:
        raise InputError(f"sft.max_length: got {config.max_length}, shorter than every row ({min(lengths)} tokens)")
    examples = rows.select(fits).select_columns(["prompt", "completion"])
    trainer = PartitionedSFTTrainer(model=model, args=config, train_dataset=examples, processing_class=tokenizer)
    trainer.longest_first = longest_first
    trained = train(trainer, partition, "sft", len(examples), resume)
    trained.left_out = {"longer_than_max_length": len(rows) - len(fits)}
    return trainer, trained
