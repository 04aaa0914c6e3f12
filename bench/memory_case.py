"""One training case of `bench/memory.py`, in a process of its own: peak memory, tokens per second and losses.

    python -m bench.memory_case '{"way": "ours", "model": "smollm2-135m", "batch": 8, "length": 512}'

Prints one line of JSON. Rows are random tokens, every one `length` long, of which `prompt` are not trained on, so that
what is computed does not depend on a corpus. A way is "ours" (this project as a recipe sets it up), "trl" (TRL's
trainer on PEFT's layers, with their own defaults but for what the case sets) or "unsloth" (SFT alone, on a GPU: TRL's
trainer on Unsloth's model and layers with its own gradient checkpointing, as its notebooks set it up).
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if "unsloth" in os.environ.get("LORAPAR_BENCH_WAY", ""):
    import unsloth  # pyright: ignore[reportMissingImports] # noqa: F401 (it replaces what is imported after it)

import torch
from transformers import PreTrainedModel, TrainerCallback

import lorapar
from bench.training_cases import TARGETS, Case, draw_factors, load, with_adapter
from lorapar.adapter.layers import lora_parameters
from lorapar.memory.process import peak_memory_bytes, release_freed, reset_peak_memory, resident_bytes
from lorapar.model.load import load_tokenizer
from lorapar.recipe.sections import ModelConfig

if TYPE_CHECKING:
    from datasets import Dataset


def rows(case: Case, vocabulary: int) -> "Dataset":
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    made = torch.randint(8, vocabulary - 8, (case.batch * case.steps, case.length), generator=generator).tolist()
    mask = [[0] * case.prompt + [1] * (case.length - case.prompt)] * len(made)
    return Dataset.from_dict({"input_ids": made, "completion_mask": mask})


def settings(case: Case, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": case.batch, "max_steps": case.steps, "learning_rate": 1e-4,
        "weight_decay": 0.1, "bf16": case.dtype == "bfloat16", "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "use_cpu": case.device == "cpu", "lr_scheduler_type": "constant",
        "disable_tqdm": True, **case.trainer,
    }  # fmt: skip


def make_trainer(case: Case, model: PreTrainedModel, folder: str) -> Any:
    if case.way == "unsloth":
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        peft_model = FastLanguageModel.get_peft_model(
            model, r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
        )  # fmt: skip
        draw_factors(peft_model)
    else:
        peft_model = with_adapter(case, model)
    trainer = sft_trainer(case, peft_model, folder) if case.stage == "sft" else grpo_trainer(case, peft_model, folder)
    if case.way == "ours":
        scores = {name: torch.rand(tensor.shape) for name, tensor in lora_parameters(peft_model).items()}
        kind = "all" if case.active == 1.0 else "scores"
        # The sum of the highest share a of uniform scores is a (2 − a) of the whole.
        made = lorapar.partition(scores, scores, theta=case.active * (2 - case.active), selection=kind)
        trainer.partition, trainer.stage = made, case.stage
    return trainer


def sft_trainer(case: Case, peft_model: Any, folder: str) -> Any:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    from lorapar.training.sft import PartitionedSFTTrainer

    tokenizer = load_tokenizer(ModelConfig("smollm2-135m"))
    data = rows(case, min(peft_model.config.vocab_size, len(tokenizer)))
    made: Any = PartitionedSFTTrainer if case.way == "ours" else SFTTrainer
    config = SFTConfig(**settings(case, folder), max_length=None, activation_offloading=case.offloading)
    trainer = made(model=peft_model, args=config, train_dataset=data, processing_class=tokenizer)
    if case.way == "ours":
        trainer.micro_batch_tokens = case.micro_batch_tokens
    return trainer


def grpo_trainer(case: Case, peft_model: Any, folder: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    from lorapar.training.grpo import PartitionedGRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(place % 3) for place in range(len(completions))]

    tokenizer, completion = load_tokenizer(ModelConfig("smollm2-135m")), case.length - case.prompt
    data = Dataset.from_dict({"prompt": [" a" * case.prompt] * case.steps})
    config = GRPOConfig(**settings(case, folder), num_generations=case.batch, max_completion_length=completion,
                        generation_kwargs={"min_new_tokens": completion})  # fmt: skip
    made: Any = GRPOTrainer
    if case.way == "ours":
        made = functools.partial(PartitionedGRPOTrainer, activation_offloading=case.offloading)
    return made(model=peft_model, reward_funcs=[reward], args=config, train_dataset=data, processing_class=tokenizer)


class Clock(TrainerCallback):
    """Seconds of each step, by the clock and of the process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start[0])
        self.cpu_seconds.append(time.process_time() - self._start[1])


def measure(case: Case) -> dict[str, Any]:
    model = load(case)
    if case.device == "cuda":
        # Random weights are made whole and then quantised; a checkpoint is quantised as it is read.
        torch.cuda.empty_cache()
        if case.cap is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(case.cap / total)
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()  # weights that lie in a file are only in memory once they are read
    with tempfile.TemporaryDirectory() as folder:
        # Else what was freed before and not given back would serve, and hide what the steps need.
        release_freed()
        before = torch.cuda.memory_allocated() if case.device == "cuda" else resident_bytes()
        reset_peak_memory()
        trainer = make_trainer(case, model, folder)
        clock = Clock()
        trainer.add_callback(clock)
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return {**dataclasses.asdict(case), "out_of_memory": True}
        peak = peak_memory_bytes()
    # The first step warms up, unless it is the only one.
    late, late_cpu = clock.seconds[1:] or clock.seconds, clock.cpu_seconds[1:] or clock.cpu_seconds
    tokens = case.batch * case.length
    return {
        **dataclasses.asdict(case),
        "model_bytes": before,
        "peak_bytes_above_model": peak - before,
        "reserved_bytes": torch.cuda.max_memory_reserved() if case.device == "cuda" else None,
        "tokens_per_second": tokens * len(late) / sum(late),
        "tokens_per_cpu_second": tokens * len(late_cpu) / sum(late_cpu),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
