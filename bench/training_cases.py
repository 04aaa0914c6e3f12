"""What every comparison of training steps shares: the shapes, a case, the model it is run on, and its recipe.

Neither TRL nor datasets is imported here, so that a machine without them can run what needs only PEFT's layers and ours
(plain_training.py); memory_case.py adds the trainers.
"""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lorapar
from lorapar.model.load import load_model, load_tokenizer
from lorapar.recipe.reading import parse
from lorapar.recipe.sections import ModelConfig, Recipe

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
# What a rehearsal on a CPU takes in their place.
TINY = {"tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}}  # fmt: skip


@dataclass
class Case:
    """`length` tokens a row, `prompt` of them not trained on; `trainer`: keys of the trainer's configuration."""

    way: Literal["ours", "peft", "trl", "unsloth"] = "ours"
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


def shape_of(name: str) -> Any:
    """The configuration of a shape by its name."""
    return AutoConfig.for_model(**(SHAPES | TINY)[name], max_position_embeddings=1 << 20)


def load(case: Case) -> PreTrainedModel:
    """The case's model without adapters: random weights of a shape, made on the device, or a model by its name."""
    torch.manual_seed(0)
    if case.model not in SHAPES | TINY:
        return load_model(ModelConfig(case.model, dtype=case.dtype, device=case.device), case.base)  # type: ignore[arg-type]
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(
            shape_of(case.model), dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
        )
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
    """The linear layers but the head replaced by bitsandbytes' 4-bit ones, one at a time and where they are."""
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bnb.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None,
                compute_dtype=getattr(torch, case.dtype), quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = bnb.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight = weight.to(case.device)
            if module.bias is not None:
                layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
            model.set_submodule(name, layer)
            # named_modules() above keeps the plain layers; their weights go one by one.
            module.weight.data = module.weight.data.new_empty(0)
    model.is_loaded_in_4bit = True  # type: ignore[attr-defined]
    return model


def with_adapter(case: Case, model: PreTrainedModel) -> Any:
    """A PeftModel with our layers or PEFT's, and factors drawn from the paper's N(0, 0.01²)."""
    lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS,
                      task_type="CAUSAL_LM")  # fmt: skip
    attach: Any = functools.partial(lorapar.attach, start="paper") if case.way == "ours" else get_peft_model
    peft_model = attach(model, lora)
    draw_factors(peft_model)
    return peft_model


def draw_factors(peft_model: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in peft_model.named_parameters():
            if "lora_" in name:
                tensor.normal_(0.0, 0.01)


def folder_without_weights(model: str, folder: Path) -> Path:
    """A shape as a folder that `lorapar plan` takes: it reads the configuration, and no weight."""
    shape_of(model).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def recipe_of(case: Case, name: str) -> Recipe:
    """The recipe whose stage 1 is the case; `name`: of its model, or a folder that holds its configuration."""
    lora: dict[str, Any] = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": TARGETS}
    recipe = parse({
        "model": {"name": name, "dtype": case.dtype, "device": case.device}, "data": {"sources": ["none.jsonl"]},
        "start": "paper", "partition": {"selection": "all" if case.active == 1.0 else "scores"},
        "lora": lora | ({"base": case.base} if case.base else {}),
    })  # fmt: skip
    # To check a section `sft` against TRL's keys needs TRL, and so does a default of TRL's: every setting that the plan
    # asks for is here.
    recipe.sft.micro_batch_tokens = case.micro_batch_tokens
    recipe.sft.trainer = {
        "per_device_train_batch_size": case.batch, "max_length": case.length, "packing": False, "padding_free": False,
        "gradient_checkpointing": False, "activation_offloading": case.offloading, **case.trainer,
    }  # fmt: skip
    return recipe
