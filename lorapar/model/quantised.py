"""The form in which the frozen base is held: `lora.base: nf4 | int8 | bf16`.

Unset, the base is what `model.dtype` says, as it stands in the checkpoint's own precision or the device's best one.
`nf4` and `int8` are bitsandbytes' forms (Dettmers et al. 2023, arXiv 2305.14314; 2022, arXiv 2208.07339), quantised
while the weights are read: about 0.52 and 1.0 bytes a weight of the linear layers, where bf16 takes 2. Embeddings,
norms and the output head stay in `model.dtype`, which is also what products are computed in.
"""

import importlib.util
from typing import Any

import torch

from ..errors import InputError, not_installed

QUANTISED = ("nf4", "int8")


def quantisation(base: str, dtype: torch.dtype, shard: bool = False) -> Any:
    """transformers' BitsAndBytesConfig of `base`, computing in `dtype`; InputError where bitsandbytes is missing.

    shard: 4-bit codes are held as numbers of `dtype`, as accelerate advises for FSDP2; with torch 2.13 uint8 works too.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"lora.base: {base} needs {not_installed('bitsandbytes, which', 'bnb')}")
    from transformers import BitsAndBytesConfig

    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shard else torch.uint8,
    )  # fmt: skip


def given_form(model_config: Any) -> str | None:
    """The form in which a checkpoint's own configuration says its weights are held, None where they are plain."""
    given = getattr(model_config, "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, dict) else given.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    return str(values.get("quant_method", "quantised"))


def works_here(base: str, device: torch.device) -> str:
    """One line for `lorapar doctor`: a small layer is quantised on `device`, and its product and gradient are taken."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"no: {not_installed('bitsandbytes', 'bnb')}"
    try:
        import bitsandbytes.nn.modules as bnb

        from lorapar_kernels.bnb_weights import FrozenProduct

        if base == "nf4":
            layer: Any = bnb.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
        else:
            layer = bnb.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        plain = layer.weight.detach().float().clone().to(device)
        layer = layer.to(device)
        x = torch.ones(2, 64, device=device, requires_grad=True)
        y: Any = FrozenProduct.apply(x, layer)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        error = float((gradient - plain.sum(0)).abs().max() / plain.abs().sum(0).max())
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error_:
        return f"no: {str(error_).splitlines()[0]}"
    return "yes" if error < 0.1 else f"no: a product is off by {error:.2g} of its size"
