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
from dataclasses import dataclass, field
from typing import Any, Literal

if "unsloth" in os.environ.get("LORAPAR_BENCH_WAY", ""):
    import unsloth  # pyright: ignore[reportMissingImports] # noqa: F401 (it replaces what is imported after it)

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import lorapar
from lorapar.adapter import lora_parameters
from lorapar.config import ModelConfig
from lorapar.grpo import PartitionedGRPOTrainer
from lorapar.memory import peak_memory_bytes, reset_peak_memory, resident_bytes
from lorapar.models import load_model, load_tokenizer
from lorapar.sft import PartitionedSFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Public configurations, given random weights: no hub is needed, and memory and time do not depend on the values.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3.1-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip


@dataclass
class Case:
    """`length` tokens a row, `prompt` of them not trained on; `trainer`: keys of the trainer's configuration."""

    way: Literal["ours", "trl", "unsloth"] = "ours"
    stage: Literal["sft", "grpo"] = "sft"
    model: str = "smollm2-135m"
    base: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 8
    length: int = 512
    prompt: int = 256
    rank: int = 8
    dropout: float = 0.0
    active: float = 0.4
    steps: int = 3
    cap: int | None = None
    micro_batch_tokens: int | None = None
    offloading: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


def load(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    if case.model not in SHAPES:
        return load_model(ModelConfig(case.model, dtype=case.dtype, device=case.device), case.base)  # type: ignore[arg-type]
    config = AutoConfig.for_model(**SHAPES[case.model], max_position_embeddings=1 << 20)
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
    if case.way == "unsloth":
        return of_unsloth(model, case)
    return quantised(model, case) if case.base else model


def of_unsloth(model: PreTrainedModel, case: Case) -> PreTrainedModel:
    """Unsloth reads a folder; the weights go through one, and off the GPU in between."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        model.cpu().save_pretrained(folder)
        load_tokenizer(ModelConfig("smollm2-135m")).save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        loaded, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=case.length, dtype=getattr(torch, case.dtype), load_in_4bit=case.base == "nf4",
            fix_tokenizer=False, use_exact_model_name=True,
        )  # fmt: skip
    return loaded


def quantised(model: PreTrainedModel, case: Case) -> PreTrainedModel:
    """The linear layers but the head replaced by bitsandbytes' 4-bit ones, a layer at a time."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(  # pyright: ignore[reportPrivateImportUsage]
                module.in_features, module.out_features, bias=module.bias is not None,
                                      compute_dtype=getattr(torch, case.dtype), quant_type="nf4")  # fmt: skip
            layer.load_state_dict({key: value.cpu() for key, value in module.state_dict().items()})
            model.set_submodule(name, layer.to(case.device))
            module.weight.data = torch.empty(0)
    model.is_loaded_in_4bit = True  # type: ignore[attr-defined]
    return model


def rows(case: Case, vocabulary: int) -> Dataset:
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
    lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS,
                      task_type="CAUSAL_LM")  # fmt: skip
    if case.way == "unsloth":
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        peft_model = FastLanguageModel.get_peft_model(
            model, r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
        )  # fmt: skip
    else:
        attach = get_peft_model if case.way == "trl" else functools.partial(lorapar.attach, start="paper")
        peft_model = attach(model, lora)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in peft_model.named_parameters():
            if "lora_" in name:
                tensor.normal_(0.0, 0.01)
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

    tokenizer = load_tokenizer(ModelConfig("smollm2-135m"))
    data = rows(case, min(peft_model.config.vocab_size, len(tokenizer)))
    made: Any = PartitionedSFTTrainer if case.way == "ours" else SFTTrainer
    config = SFTConfig(**settings(case, folder), max_length=None, activation_offloading=case.offloading)
    trainer = made(model=peft_model, args=config, train_dataset=data, processing_class=tokenizer)
    if case.way == "ours":
        trainer.micro_batch_tokens = case.micro_batch_tokens
    return trainer


def grpo_trainer(case: Case, peft_model: Any, folder: str) -> Any:
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

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
