"""What both stages add to a TRL trainer: the masked optimizer, checkpoints that know their partition, the final proof.

Rows and a partition → a TRL trainer whose optimizer is `PartitionedAdamW` → a trained adapter, verified bit for bit.
"""

import contextlib
import functools
import inspect
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import lorapar_kernels as lk

from ..adapter.attach import check_options, save_adapter, take_over_products, with_our_layers
from ..adapter.layers import ADAPTER, activate, lora_parameters, masked_layers, masks_by_parameter
from ..adapter.proof import Snapshot, check_adapters_equal, verify
from ..distributed import launch, processes
from ..distributed.exchange import GradientExchange
from ..errors import InputError
from ..files import read_json, why_not_whole, write_json
from ..memory.process import give_back_large_blocks
from ..partitioning.partition import Partition
from ..progress import TrainingProgress
from .best import keep_best
from .optimizer import PartitionedAdamW
from .watching import WATCHED, LossWatch

log = logging.getLogger("lorapar")
StageName = Literal["sft", "grpo"]
# Beside a stage's checkpoints, where there was a GPU to choose for: which product each kind of layer takes.
CHOICES = "product_choices.json"
CHECKPOINT_FILES = ("adapter_model.safetensors", "lorapar.json", "lorapar_partition.safetensors", "optimizer.pt",
                    "scheduler.pt", "trainer_state.json")  # fmt: skip
ENGINE = (
    "the trainer was given an engine of its own (FSDP, DeepSpeed), which would take the adapter apart; leave it out, "
    "and shard the base with lorapar.distributed.sharding.shard"
)
# Of each process of a launch.
RANDOM_STATE = "rng_state{}.pth"
PAPER = {
    "title": "LoRA-PAR: A Flexible Dual-System LoRA Partitioning Approach to Efficient LLM Fine-Tuning",
    "id": "2507.20999",
    "citation": """@inproceedings{huang2025lorapar,
    title     = {{LoRA-PAR: A Flexible Dual-System LoRA Partitioning Approach to Efficient LLM Fine-Tuning}},
    author    = {Huang, Yining and Li, Bin and Tang, Keke and Chen, Meilian},
    booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
    pages     = {13693--13704},
    year      = {2025}
}""",
}


@dataclass
class Trained:
    """What a stage did: the trainer's log, what `verify` counted, bytes of optimizer state, and rows left out."""

    history: list[dict[str, Any]]
    verified: dict[str, float]
    optimizer_state_bytes: int
    rows: int
    resumed_from: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    rollout_seconds: float = 0.0
    watched: dict[str, Any] | None = None  # what a `LossWatch` saw, and the step that it kept
    best: dict[str, Any] | None = None  # which checkpoint `load_best_model_at_end` kept


class PartitionedTrainer(Trainer):
    """A mixin ahead of a TRL trainer, which takes what that takes.

    A model given by name, or as a plain module, needs a `peft_config`: TRL makes the adapter, of our layers. What is
    trained is said by `partition`, to be set before `train()`; `lorapar.sft` and `lorapar.grpo` set it.
    Raises InputError for a model whose LoRA layers are not ours, and for an option that ours do not have.
    """

    partition: Partition | None = None
    stage: StageName
    longest_first: bool = False
    exchange: GradientExchange | None = None
    _sampler: Any = None
    watch: LossWatch | None = None
    # TRL's SFT trainer puts its off-loading here, and runs a training step within it.
    maybe_activation_offload_context: Any = contextlib.nullcontext()

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        launch.check()
        if launch.accelerate_shards():
            raise InputError(ENGINE)
        given = inspect.signature(super().__init__).bind(model, *args, **kwargs).arguments
        adapter = given.get("peft_config")
        if isinstance(adapter, PeftConfig):
            given["peft_config"] = with_our_layers(cast(LoraConfig, adapter))
        # Beside a 4-bit or 8-bit base TRL casts what is trained to bf16, where small steps round away (trl#7268).
        as_given = {} if adapter is not None or isinstance(model, str) else _trained(model)
        super().__init__(**given)
        made = cast(nn.Module, self.model)
        masked_layers(made)
        if adapter is not None:
            # TRL adds options of its own where it adds tokens.
            check_options(cast(LoraConfig, cast(PeftModel, made).peft_config[ADAPTER]))
            take_over_products(made)
            if getattr(made, "is_loaded_in_4bit", False) or getattr(made, "is_loaded_in_8bit", False):
                as_given = {parameter: parameter.data.float() for parameter in _trained(made)}
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(ENGINE)
        if self.args.world_size != processes.count():
            raise InputError(
                f"use_cpu: got {self.args.use_cpu}, so that the trainer takes this process for one of "
                f"{self.args.world_size}, and there are {processes.count()}; set use_cpu to whether they are on a CPU"
            )
        # It would log another number in the place of a loss that is not finite, and train on.
        self.args.logging_nan_inf_filter = False
        if self.args.gradient_checkpointing and self.args.device.type == "cpu":
            give_back_large_blocks()
        for parameter, data in as_given.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)

    def what_is_trained(self) -> Partition:
        """The partition; InputError where none was set."""
        if self.partition is None:
            raise InputError(
                "partition: none is set, so nothing says what to train; set trainer.partition, or train with "
                f"lorapar.{self.stage}"
            )
        return self.partition

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        # Built here, after the trainer has done all it does to the model, so that no parameter is replaced afterwards.
        if self.optimizer is None:
            self.activated()
            args = self.args
            self.optimizer = PartitionedAdamW(
                cast(Any, self.model),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return self.optimizer

    def activated(self) -> nn.Module:
        """The model, its masks set as the stage asks: the trainer may have replaced its parameters."""
        activate(cast(Any, self.model), self.what_is_trained(), self.stage)
        return cast(nn.Module, self.model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self.exchange = _exchange(self.activated()) if processes.count() > 1 else None
        # Without DDP, which would exchange every element's gradient: `exchange` does it.
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            self.accelerator.prepare_model = prepare

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.longest_first:
            self.longest_first = False
            model.train()
            self.rehearse(model)
        loss = self.backward_of_batch(model, *args, **kwargs)
        if self.exchange is not None and self.accelerator.sync_gradients:
            self.exchange.average()
        return loss

    def backward_of_batch(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's training step of one batch, which takes no step yet."""
        return super().training_step(model, *args, **kwargs)

    def rehearse(self, model: Any) -> None:
        """Take the stage's largest batch through forward and backward; see rehearsal.py."""
        raise NotImplementedError

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(self._sampler, LengthGroupedSampler):
            # One order of the rows for any number of processes.
            self._sampler.batch_size = batches_of(self.args)["batch"]
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self._sampler, LengthGroupedSampler):
            # It would draw an epoch's order from whatever random state training, or resuming, has come to.
            self._sampler.generator = torch.Generator().manual_seed(self.args.seed + kwargs["epoch"])
        # A run stopped after its last step goes on from a checkpoint of that step; transformers would take one more.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        if self.watch is not None and self.state.global_step == 0:
            self.watch.measure(self)
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # The last word before the optimizer writes.
        norm = super()._get_grad_norm(*args, **kwargs)
        where = f"step {self.state.global_step + 1} of {self.state.max_steps}"
        loss = float(self._tr_loss)
        if not math.isfinite(loss):
            raise self.diverged(where, f"the loss is {loss:g}")
        # The loss scale of fp16 makes an infinite gradient now and then, whose step is left out.
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            raise self.diverged(where, f"the norm of the gradients is {float(norm):g}")
        return norm

    def diverged(self, where: str, what: str) -> InputError:
        """The error that ends training on numbers that are not finite."""
        if self.state.global_step == 0:
            return InputError(
                f"model.name: {self.stage}: {where}: {what} before anything was trained; look at the model's weights "
                "and the rows for what is not finite, and use bfloat16 or float32 in place of float16 (model.dtype)"
            )
        args = self.args
        # At 0 gradients are not clipped.
        norm = f"below {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "above 0, such as 1"
        return InputError(
            f"{self.stage}.learning_rate: got {args.learning_rate:g}: {where}: {what} (learning rate there: "
            f"{self._get_learning_rate():g}), and nothing of it is kept; try a lower learning_rate, more warmup_steps, "
            f"or a max_grad_norm {norm}"
        )

    @torch.no_grad()
    def check_finite(self, ids: Sequence[int]) -> None:
        """InputError unless the model's logits of these tokens are finite: the last step's loss says nothing of what
        that step has written."""
        model = cast(nn.Module, self.model)
        training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            logits = model(input_ids=torch.tensor([ids], device=self.args.device), use_cache=False).logits
        model.train(training)
        if not bool(logits.isfinite().all()):
            raise self.diverged(f"after step {self.state.global_step}", "the model's logits are not finite")

    def some_tokens(self) -> list[int]:
        """A few tokens of the first row."""
        raise NotImplementedError

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if not _finite(lora_parameters(cast(nn.Module, self.model)).values()):
            raise self.diverged(f"after step {self.state.global_step}", "a weight of the adapter is not finite")
        # Machines that round otherwise are found out here, and not after the whole stage.
        check_adapters_equal(cast(nn.Module, self.model), self.stage)
        if self.watch is not None:
            self.watch.measure(self)
        super()._save_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        """`train` does it, from the checkpoints as they are then (best.py)."""

    def checkpoint_files(self, count: int) -> list[str]:
        """The files without which nothing can go on from a checkpoint of `count` processes as if it had not been
        stopped."""
        return [*CHECKPOINT_FILES, *of_each_process(RANDOM_STATE, count)]

    def why_not_by_others(self, checkpoint: Path, count: int) -> str | None:
        """Why no other number of processes can go on from a checkpoint of `count`; None where it can."""
        return None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.save_of_each(output_dir)
        # Before older checkpoints are removed: this one is whole when every process has written.
        processes.wait()

    def save_of_each(self, output_dir: str) -> None:
        """What each process keeps in a checkpoint beside its random numbers."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        count = None if checkpoint is None else made_by(Path(checkpoint))["processes"]
        if count in (None, self.args.world_size):
            super()._load_rng_state(checkpoint)
            return
        # Others in each process: of a group that lies in two of them no completion shall come twice.
        set_seed(self.args.seed + self.state.global_step + 1_000_003 * self.args.process_index)
        log.info("%s: random numbers (dropout, rollouts) are drawn anew: the checkpoint has those of %d processes",
                 self.stage, count)  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # Before the checkpoint is complete, so that a resumed run never uses other products.
        note_choices(Path(cast(str, self.args.output_dir)))
        folder = Path(output_dir or cast(str, self.args.output_dir))
        partition = self.what_is_trained()
        partition.save(folder / "lorapar_partition.safetensors")
        write_json(folder / "lorapar.json", {"stage": self.stage, "partition": partition.hash, **batches_of(self.args)})


def of_each_process(name: str, count: int) -> list[str]:
    """The files that so many processes write each, as transformers names them."""
    return [name.format(f"_{index}") for index in range(count)] if count > 1 else [name.format("")]


def batches_of(config: TrainingArguments) -> dict[str, int]:
    """What a checkpoint says of how it was made: the processes, the rows a step of all of them together, and GRPO's
    completions that are generated together."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    generated = getattr(config, "generation_batch_size", None)
    return {"processes": config.world_size, "batch": rows, **({"generated": generated} if generated else {})}


def made_by(checkpoint: Path) -> dict[str, Any]:
    """`batches_of` the configuration that a checkpoint was made with; of an earlier version's, None each."""
    facts = read_json(checkpoint / "lorapar.json")
    return {name: facts.get(name) for name in ("processes", "batch", "generated")}


def _exchange(model: nn.Module) -> GradientExchange:
    """What averages the gradients of an activated model over the processes of the launch."""
    parameters = lora_parameters(model)
    masks = {parameters[name]: mask for name, mask in masks_by_parameter(model).items() if mask is not None}
    # What DDP does at its start.
    processes.wait()
    for parameter in masks:
        torch.distributed.broadcast(parameter.data, 0)
    exchange = GradientExchange(masks)
    log.info("%d processes exchange %.2f MB a step: the gradients of %d active elements of %d", processes.count(),
             exchange.bytes / 1e6, exchange.elements, sum(parameter.numel() for parameter in masks))  # fmt: skip
    return exchange


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _trained(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    return {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}


def train(trainer: PartitionedTrainer, partition: Partition, stage: StageName, rows: int, resume: bool) -> Trained:
    """Run `trainer` from its last whole checkpoint (where `resume`) to its end and verify the model.

    Raises InputError where a checkpoint is of another partition and where a loss, a gradient or the trained model is
    not finite, `FrozenElementsChanged` where the proof fails.
    """
    trainer.partition, trainer.stage = partition, stage
    model = cast(PeftModel, trainer.model)
    activate(model, partition, stage)
    before = Snapshot.take(model)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingProgress(stage))
    # Each process has read them for itself, and a network file system may show one of them older files.
    for rank, seen in enumerate(processes.gather((partition.hash, rows))):
        if seen != (partition.hash, rows):
            raise InputError(f"{stage}: process {rank} has {seen[1]} rows and partition {seen[0][:12]}, process "
                             f"{processes.rank()} {rows} rows and partition {partition.hash[:12]}")  # fmt: skip
    output_dir = Path(cast(str, trainer.args.output_dir))
    watch = trainer.watch
    judged = None if watch is None else processes.from_main(watch.recorded)
    checkpoint = last_checkpoint(output_dir, trainer, partition, judged) if resume else None
    if watch is not None:
        watch.go_on_from(None if checkpoint is None else step_of(checkpoint))
    if resume:
        take_choices(output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        note_choices(output_dir)
    watched = None if watch is None else watch.keep(trainer)
    best = keep_best(trainer) if trainer.args.load_best_model_at_end else None
    trainer.check_finite(trainer.some_tokens())
    optimizer = cast(Any, trainer.optimizer)
    optimizer = cast(PartitionedAdamW, getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    return Trained(
        history=list(trainer.state.log_history),
        verified=verify(model, before, partition, stage),
        optimizer_state_bytes=optimizer.state_bytes(),
        rows=rows,
        resumed_from=checkpoint.name if checkpoint else None,
        watched=watched,
        best=best,
    )


def note_choices(output_dir: Path) -> None:
    """Write which products this process has chosen so far, where it has chosen any."""
    choices = lk.product_choices()
    if choices:
        write_json(output_dir / CHOICES, choices)


def take_choices(output_dir: Path) -> None:
    """Use the products that the stage used before it was stopped, so that it resumes with the same sums.

    A file that is not what `note_choices` wrote costs a line in the log: products are then timed again.
    """
    path = output_dir / CHOICES
    if not path.is_file():
        return
    try:
        lk.set_product_choices(read_json(path))
    except (InputError, ValueError) as error:
        log.warning("%s: passed over, products are timed again (%s)", path, error)


def step_of(checkpoint: Path) -> int:
    """N of a folder `checkpoint-N`."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(
    output_dir: Path, trainer: PartitionedTrainer, partition: Partition, judged: Collection[int] | None = None
) -> Path | None:
    """The newest `checkpoint-N` that was written whole, as the main process sees it; InputError where it belongs to
    another partition.

    judged: the steps whose loss is on file, where losses are watched: no other checkpoint is gone on from.
    """
    return processes.from_main(lambda: _last_checkpoint(output_dir, trainer, partition, judged))


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` there, the newest first."""
    there = [f for f in output_dir.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(there, key=step_of, reverse=True)


def _last_checkpoint(
    output_dir: Path, trainer: PartitionedTrainer, partition: Partition, judged: Collection[int] | None
) -> Path | None:
    here = trainer.args.world_size
    for folder in checkpoints_of(output_dir):
        if judged is not None and step_of(folder) not in judged:
            log.info("%s: its loss is not in %s, passed over", folder, WATCHED)
            continue
        # A kill in the middle of writing leaves files out, or half of one; transformers would start without them.
        faults = [fault for fault in (why_not_whole(folder / "lorapar.json"),) if fault]
        count = here if faults else made_by(folder)["processes"] or here
        faults += [fault for name in trainer.checkpoint_files(count) if (fault := why_not_whole(folder / name))]
        if faults:
            log.info("%s: not whole (%s), passed over", folder, faults[0])
            continue
        if not _finite(load_file(folder / "adapter_model.safetensors").values()):
            log.info("%s: its weights are not finite, passed over", folder)
            continue
        if count != here and (fault := trainer.why_not_by_others(folder, count)):
            log.info("%s: %s, passed over", folder, fault)
            continue
        facts = read_json(folder / "lorapar.json")
        if facts["partition"] != partition.hash:
            raise InputError(
                f"{folder}: made with partition {facts['partition'][:12]}, this run's is {partition.hash[:12]}; "
                "use another output_dir, or remove the checkpoints"
            )
        return folder
    return None


def save_stage(trainer: PartitionedTrainer, folder: Path, facts: dict[str, Any], trained: Trained) -> None:
    """Put the trained adapter, its partition and the training log into the stage's folder, each file whole."""
    model = cast(PeftModel, trainer.model)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter.", suffix=".tmp", dir=folder))
    try:
        save_adapter(model, temporary, **facts)
        trainer.what_is_trained().save(temporary / "lorapar_partition.safetensors")
        write_json(temporary / "log_history.json", trained.history)
        for path in temporary.iterdir():
            # TRL has written a model card with the training's own facts; PEFT's is a template.
            if path.name != "README.md" or not (folder / "README.md").exists():
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
