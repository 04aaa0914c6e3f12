"""The finished adapter as any PEFT installation loads it, and, where asked for, the model with the adapter merged in.

Both are loaded again with plain PEFT and plain transformers, and their logits held against ours: merged is not the
adapter (peft#2321), so what is written is what is checked.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from .adapter import save_adapter
from .artefacts import atomic_folder, read_json
from .errors import InputError

# Largest tolerated logit difference, in units of the logits' own standard deviation, by the precision that rounds them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class ExportDiffers(RuntimeError):
    """What was written does not compute what the trained model computes."""


def export(
    model: PeftModel, tokenizer: Any, folder: Path, merged: bool = False, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Write `folder`/adapter (plain PEFT) and, where `merged`, `folder`/merged (plain transformers).

    Args:
        model: the trained model with our layers. dtype: of the merged weights; None: the base's.

    Returns the largest logit differences, {"adapter": d, "merged": d}, in units of the logits' standard deviation.
    Raises ExportDiffers where one passes `TOLERANCE`.
    """
    base_dtype = next(p.dtype for n, p in model.named_parameters() if ".lora_" not in n)
    probe = _probe_tokens(model, tokenizer)
    ours = _logits(model, probe)
    differences = {}
    with atomic_folder(folder / "adapter") as temporary:
        save_adapter(model, temporary, stage="final")
        tokenizer.save_pretrained(temporary)
        config = read_json(temporary / "adapter_config.json")
        plain_base = _load_plain(config["base_model_name_or_path"], base_dtype)
        plain = PeftModel.from_pretrained(plain_base, str(temporary)).to(probe.device)
        differences["adapter"] = _check("adapter", ours, _logits(plain, probe), base_dtype)
    if merged:
        target = dtype or base_dtype
        with atomic_folder(folder / "merged") as temporary:
            # In fp32, so that the sum is rounded once, to the dtype that is written.
            whole = cast(Any, plain.to(torch.float32)).merge_and_unload(safe_merge=True).to(target)
            whole.save_pretrained(str(temporary), safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            back = _load_plain(str(temporary), target).to(probe.device)
            differences["merged"] = _check(
                "merged", ours, _logits(back, probe), max((target, base_dtype), key=_coarseness)
            )
    return differences


def _load_plain(name: str, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise InputError(f"model.name: the base {name!r} that the adapter names cannot be loaded ({error})") from None


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _probe_tokens(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(len(tokenizer), cast(Any, model).config.vocab_size)
    device = next(model.parameters()).device
    return torch.randint(vocabulary, (2, 24), generator=generator).to(device)


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.eval()
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    model.train(training)
    return logits


def _check(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> float:
    difference = float((ours - theirs).abs().max() / ours.std())
    if not difference <= TOLERANCE[dtype]:
        raise ExportDiffers(
            f"{what}: its logits differ from the trained model's by {difference:.3g} standard deviations, "
            f"more than the {TOLERANCE[dtype]} that {dtype} explains"
        )
    return difference
