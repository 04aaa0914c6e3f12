"""Stage 1: SFT of one system's elements on that system's rows (paper section 3.4), on TRL's trainer."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from ..data.labels import rows_of
from ..data.rows import without_arrows_nulls
from ..data.tokens import IGNORED, check_known
from ..data.turns import Turns, labelled
from ..distributed import processes
from ..errors import InputError, require
from ..memory.switches import default_micro_batch_tokens
from ..model.positions import positions_of
from ..partitioning.partition import Partition
from ..recipe.checks import check_trainer_keys, check_value
from ..recipe.sections import DataConfig, SFTStageConfig
from .answer_head import score_answers_alone
from .best import EarlyStopping, check_evaluation, evaluates
from .rehearsal import longest, rehearsing
from .trainer import PAPER, PartitionedTrainer, Trained, train

log = logging.getLogger("lorapar")
# transformers counts a step's tokens beforehand only for a model whose forward takes them (remote code may not, Gemma 4
# and Qwen2.5-VL say no); without that count each part's loss would be a mean of its own. So is the balancing loss of a
# mixture of experts.
NO_PARTS = ("this model's loss is a mean over the batch, not a sum that its parts make up; leave the key out, or null: "
            "the whole batch")  # fmt: skip


class PartitionedSFTTrainer(PartitionedTrainer, SFTTrainer):
    """TRL's SFTTrainer that trains a partition's "sft" elements; takes what SFTTrainer takes, by name or place."""

    _tag_names = ["trl", "sft", "lora-par"]  # noqa: RUF012 (TRL reads it off the class)
    _name = "LoRA-PAR SFT"
    _paper = PAPER

    stage = "sft"
    micro_batch_tokens: int | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        score_answers_alone(cast(Any, self.model).get_base_model(), None)

    def backward_of_batch(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """One batch, in parts where `micro_batch_tokens` is set: the same sums of losses and gradients."""
        parts = self.parts(inputs)
        if num_items_in_batch is None and len(parts) > 1:
            raise InputError(f"sft.micro_batch_tokens: got {self.micro_batch_tokens}, but {NO_PARTS}")
        return torch.stack([super(PartitionedSFTTrainer, self).backward_of_batch(model, part, num_items_in_batch)
                            for part in parts]).sum()  # fmt: skip

    def parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch in parts of at most `micro_batch_tokens`, as many in every process: TRL gathers its metrics after
        each, and the forwards of a sharded base are everybody's."""
        parts = micro_batches(inputs, self.micro_batch_tokens)
        if self.micro_batch_tokens is None or processes.count() == 1:
            return parts
        most = torch.tensor(len(parts), device=self.args.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return in_so_many(parts, int(most))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # It is the last batch of training that `dataloader_drop_last` leaves out; every row put aside is evaluated.
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropping

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Each pass over a data loader draws a number; training must go on as if nothing had been evaluated.
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics = super().evaluate(*args, **kwargs)
        if "eval_loss" in metrics:
            rows = len(cast(Dataset, self.eval_dataset))
            log.info("sft: step %d: eval_loss %.4f, %d rows", self.state.global_step, metrics["eval_loss"], rows)
        return metrics

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kw: Any):
        """One batch of an evaluation, in the parts that training takes: the mean over all its tokens."""
        parts = self.parts(inputs)
        if len(parts) == 1 or not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)
        counts = torch.tensor([int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts])
        losses: list[Tensor] = []
        for part in parts:
            losses.append(cast(Any, super().prediction_step(model, part, True, *args, **kw)[0]))
        weights = (counts / counts.sum()).to(losses[0].device)
        return (torch.stack(losses) * weights).sum(), None, None

    def some_tokens(self) -> list[int]:
        return cast(Dataset, self.train_dataset)[0]["input_ids"][:64]

    def rehearse(self, model: Any) -> None:
        rows = cast(Dataset, self.train_dataset)
        lengths = [len(ids) for ids in rows["input_ids"]]
        chosen = longest(lengths, self.args.per_device_train_batch_size)
        what = f"{len(chosen)} rows of up to {lengths[chosen[0]]} tokens"
        with rehearsing(self, model, what), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self.data_collator([rows[place] for place in chosen]))
            for part in self.parts(inputs):
                self.accelerator.backward(self.compute_loss(model, part))


def micro_batches(inputs: dict[str, Any], tokens: int | None) -> list[dict[str, Any]]:
    """The rows of a padded batch in order, in parts of at most `tokens` with their padding (a longer row is a part).

    A part is cut where its longest row ends. What is packed in one row, and None, is left whole.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if tokens is None or mask is None or len(ids) == 1 or not bool(mask[:, 0].all()):
        return [inputs]
    lengths = mask.sum(1).tolist()
    of_tokens = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (end + 1 - start) * max(lengths[start : end + 1]) > tokens:
            width = max(lengths[start:end])
            parts.append({n: v[start:end, :width] if n in of_tokens else v for n, v in inputs.items()})
            start = end
    return parts


def in_so_many(parts: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Those parts of a batch, the ones of most rows halved until there are `count`."""
    parts = list(parts)
    while len(parts) < count:
        rows = [len(part["input_ids"]) for part in parts]
        place = rows.index(max(rows))
        part = parts.pop(place)
        shape = part["input_ids"].shape
        middle = (shape[0] + 1) // 2
        for half in (slice(middle, None), slice(0, middle)):
            cut = {n: v[half] if isinstance(v, Tensor) and v.shape == shape else v for n, v in part.items()}
            parts.insert(place, cut)
    return parts


def examples_that_fit(
    rows: Dataset,
    tokenizer: Any,
    max_length: int | None,
    model: Any = None,
    whole: bool = False,
    turns: Turns = "last",
    what: str = "every row",
    say: str = "",
) -> Dataset:
    """`input_ids` and `labels` of the rows of at most `max_length` tokens, by the tokens that scoring takes.

    whole: the prompt's tokens carry a loss too; turns: else whose do (data/turns.py). what: the rows, for the error;
    say: what for, where the log is to say how many are left out. With a `model`, its positions are a limit too. Raises
    InputError where no row is as short as that, or a row holds a token that `model` lacks.
    """
    encoded = [labelled(rows[i], tokenizer, turns) for i in range(len(rows))]
    for i, (ids, _) in enumerate(encoded if model is not None else ()):
        check_known(ids, model, tokenizer, str(rows[i].get("id", i)))
    positions = None if model is None else positions_of(model.config)
    limit = min((n for n in (max_length, positions) if n is not None), default=None)
    fits = [(ids, labels) for ids, labels in encoded if limit is None or len(ids) <= limit]
    longer = len(encoded) - len(fits)
    if longer and say:
        longest = max(len(ids) for ids, _ in encoded)
        keep = f"sft.max_length: {limit} tokens; raise it to keep them"
        if limit != max_length:
            keep = f"the model's positions: {limit} tokens; no key changes that"
        log.warning("sft: %d of %d rows to %s on left out: longer than %s (the longest has %d)", longer, len(encoded),
                    say, keep, longest)  # fmt: skip
    if not fits:
        shortest = min(len(ids) for ids, _ in encoded)
        at = "sft.max_length: got" if limit == max_length else "model.name: its positions are"
        raise InputError(f"{at} {limit}, shorter than {what} ({shortest} tokens)")
    labels = [ids if whole else labels for ids, labels in fits]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in fits], "labels": labels})


def check_lengths(rows: Dataset, evaluated: Dataset | None, tokenizer: Any, config: SFTConfig, turns: Turns) -> None:
    """InputError where no row is as short as `max_length`, or too few are to fill a batch that may not be smaller."""
    fewest, limit = _fewest(config), math.inf if config.max_length is None else config.max_length
    for dataset, what, needed in ((rows, "every row", fewest), (evaluated, "every row put aside", 1)):
        short = 0
        for row in cast(Sequence[dict[str, Any]], dataset or ()):
            short += len(labelled(row, tokenizer, turns)[0]) <= limit
            if short == needed:
                break
        if dataset is not None and not short:
            examples_that_fit(dataset, tokenizer, config.max_length, turns=turns, what=what)
        elif dataset is rows and not config.packing:
            check_batch(short, config)


def _fewest(config: SFTConfig) -> int:
    """The rows without which there is no batch; packed, they are not known before."""
    dropping = config.dataloader_drop_last and not config.packing
    return config.per_device_train_batch_size * config.world_size if dropping else 1


def check_batch(rows: int, config: SFTConfig) -> None:
    """InputError where `dataloader_drop_last` would leave out every row."""
    size = config.per_device_train_batch_size * config.world_size
    require(not config.dataloader_drop_last or rows >= size, "sft.dataloader_drop_last", True,
            f"false, or a lower per_device_train_batch_size: {rows} rows do not fill one batch of {size}")  # fmt: skip


def sft(
    model: PeftModel,
    tokenizer: Any,
    dataset: Dataset,
    partition: Partition,
    config: SFTConfig,
    systems: Sequence[int] = (1,),
    resume: bool = False,
    longest_first: bool = True,
    micro_batch_tokens: int | Literal["auto"] | None = "auto",
    eval_dataset: Dataset | None = None,
    early_stopping_patience: int | None = None,
    turns: Turns = "last",
) -> tuple[PartitionedSFTTrainer, Trained]:
    """Train the partition's "sft" elements of `model` in place on the rows of `systems`.

    Args:
        model: out of `lorapar.attach` or `load_adapter`. dataset: rows with prompt and completion; where it has the
            columns `system` and `split`, only train rows of `systems` are used.
        config: TRL's own; its `output_dir` holds the checkpoints. Tokens are the tokenizer's: settings that would give
            SFT others (`eos_token`, `chat_template_path`, ...) are refused.
        resume: go on from the last whole checkpoint there.
        micro_batch_tokens: the part of a batch that goes through the model at once, None: all of it. The losses and
            gradients are the same; "auto": 512 on a CPU, where batches gain no time, None on a GPU.
        eval_dataset: rows that `config.eval_strategy` has evaluated while training goes on, all of them, whatever their
            system and split; none of them should be in `dataset`. With `load_best_model_at_end` the model ends as the
            checkpoint with the best `metric_for_best_model`; `Trained.best` says which.
        early_stopping_patience: stop once so many evaluations in a row were no better than the best one; None: do not.
        turns: whose tokens carry the loss of a conversation: "last", the completion's; "assistant", those of every turn
            of the assistant.
        longest_first: take the longest rows once through forward and backward before the first step (rehearsal.py).

    Rows longer than `config.max_length` or the model's positions are left out, not cut (TRL cuts them in silence); the
    log says how many, and `Trained.left_out`.
    Returns the trainer and what it did; raises InputError, or FrozenElementsChanged where the proof at the end fails.
    """
    check_trainer_keys("sft", vars(config))
    check_evaluation(lambda name: getattr(config, name), early_stopping_patience)
    check_value(SFTStageConfig, "early_stopping_patience", early_stopping_patience)
    check_value(DataConfig, "loss", turns)
    positions = positions_of(model.config)
    if config.packing and config.packing_strategy == "wrapped" and None not in (positions, config.max_length):
        # The other strategies begin the positions anew with each row.
        require(config.max_length <= positions, "sft.max_length", config.max_length,  # pyright: ignore[reportOperatorIssue]
                f"at most the model's {positions} positions with packing_strategy: wrapped")  # fmt: skip
    rows, whole = rows_of(dataset, systems), config.completion_only_loss is False
    require(turns == "last" or not whole, "sft.completion_only_loss", False, "nothing beside data.loss: assistant")
    examples = examples_that_fit(rows, tokenizer, config.max_length, model, whole, turns, say="train")
    evaluated = None
    if evaluates(config):
        if eval_dataset is None or not len(eval_dataset):
            raise InputError("eval_dataset: got no rows, expected those that sft.eval_strategy evaluates")
        evaluated = examples_that_fit(
            without_arrows_nulls(eval_dataset),
            tokenizer,
            config.max_length,
            model,
            whole,
            turns,
            "every row put aside",
            "evaluate",
        )
        log.info("sft: %d rows to train on, %d to evaluate", len(examples), len(evaluated))
    trainer = PartitionedSFTTrainer(
        model=model, args=config, train_dataset=examples, eval_dataset=evaluated, processing_class=tokenizer
    )
    check_batch(len(cast(Dataset, trainer.train_dataset)), config)
    trainer.longest_first = longest_first
    if early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(early_stopping_patience))
    adds_up = trainer.model_accepts_loss_kwargs and not trainer.aux_loss_enabled
    if micro_batch_tokens == "auto":
        device = next(model.parameters()).device.type
        micro_batch_tokens = default_micro_batch_tokens(device) if adds_up else None
    elif micro_batch_tokens is not None and not adds_up:
        raise InputError(f"sft.micro_batch_tokens: got {micro_batch_tokens}, but {NO_PARTS}")
    trainer.micro_batch_tokens = micro_batch_tokens
    trained = train(trainer, partition, "sft", len(examples), resume)
    trained.left_out = {"longer_than_max_length": len(rows) - len(examples)}
    return trainer, trained
