"""The LoRA layers of bitsandbytes' 4-bit and 8-bit bases; imported where bitsandbytes is installed.

What they compute is in `lorapar_kernels.bnb_weights`. Here: whether bitsandbytes dequantises a base rightly, and
merging, which goes by PEFT's way: it quantises base + delta anew and so costs accuracy; `unmerge` puts the very base
back.
"""

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any, cast

import bitsandbytes.functional as bnb_functional
import bitsandbytes.nn.modules as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from lorapar_kernels import bnb_weights
from lorapar_kernels.peft_layers_bnb import FastQuantised

from ..errors import InputError
from .layers import MaskedLayer

# What rounding explains of an element's error, as a share of the largest weight of its block: half the widest gap
# between two of the values (0.152 in NF4, 0.167 in FP4, 1/254 in 8 bits, where a block is a row), and rounding to bf16.
ROUNDING = {"nf4": 0.16, "fp4": 0.175, "int8": 0.006}
# What 8 bits for the blocks' largest weights add, as a share of the largest of all: half the widest gap is 0.007.
NESTED_ROUNDING = 0.01


def unexplained(weight: Tensor, restored: Tensor, kind: str, block: int) -> str | None:
    """Why `restored` cannot be `weight` quantised as `kind` in blocks of `block` elements; None where it can."""
    slack, worst = 0.0 if kind == "int8" else NESTED_ROUNDING * weight.abs().max().float(), 0.0
    # A piece at a time: beside a model that just fits, there is no room for several copies of its largest weight.
    size = block * max(1, (1 << 22) // block)
    for wide, ours in zip(weight.reshape(-1).split(size), restored.reshape(-1).split(size)):
        of_block = F.pad(wide.float().abs(), (0, -wide.numel() % block)).view(-1, block).amax(1)
        of_block = of_block.repeat_interleave(block)[: wide.numel()]
        excess = (ours.float() - wide.float()).abs() - slack
        worst = max(worst, float((excess / of_block.clamp(min=1e-30)).max()))
    if worst <= ROUNDING[kind]:
        return None
    version = importlib.metadata.version("bitsandbytes")
    return (
        f"lora.base: bitsandbytes {version} dequantises {kind} weights of {weight.shape[-1]} columns wrongly on "
        f"{weight.device.type}: off by {worst:.2g} of a block's largest weight, where rounding explains "
        f"{ROUNDING[kind]}; allowed here: {'bf16' if kind == 'int8' else 'int8 or bf16'}"
    )


@contextlib.contextmanager
def held_to_their_weights() -> Iterator[None]:
    """Hold every weight that bitsandbytes quantises in the block against what it dequantises to; InputError at the
    block's end where rounding does not explain the difference.

    bitsandbytes 0.50.2 takes a neighbouring block's scale on a CPU with AVX-512 where rows are a multiple of 16 wide
    and none of 64 (relative error 0.37 where 0.09 is right).
    """
    quantize_4bit, int8_vectorwise_quant = bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant
    faults: list[str] = []

    def held_4bit(A: Tensor, *arguments: Any, **options: Any) -> Any:
        codes, state = cast(Any, quantize_4bit(A, *arguments, **options))
        fault = unexplained(A, bnb_functional.dequantize_4bit(codes, state), state.quant_type, state.blocksize)
        faults.extend([] if fault is None else [fault])
        return codes, state

    def held_8bit(A: Tensor, *arguments: Any, **options: Any) -> Any:
        codes, scales, outliers = int8_vectorwise_quant(A, *arguments, **options)
        fault = unexplained(A, codes * (scales.unsqueeze(1) / 127.0), "int8", A.shape[-1])
        faults.extend([] if fault is None else [fault])
        return codes, scales, outliers

    # transformers reports what is raised while it converts a weight as an error of its own: raised after it.
    bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant = held_4bit, held_8bit
    try:
        yield
    finally:
        bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant = quantize_4bit, int8_vectorwise_quant
    if faults:
        raise InputError(faults[0])


@functools.cache
def _probe(kind: str, columns: int, block: int, nested: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """What `unexplained` says of 64 rows of normal weights that are quantised and dequantised."""
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    codes, state = bnb_functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    return unexplained(weight, bnb_functional.dequantize_4bit(codes, state), kind, block)


def check_four_bits(model: nn.Module) -> None:
    """InputError where a 4-bit weight of `model` cannot be dequantised: repacked by bitsandbytes, or of a width that it
    does wrongly. (8-bit weights we dequantise ourselves.)

    By a probe of the width, for a checkpoint that is quantised already, whose own weights are nowhere.
    """
    for name, module in model.named_modules():
        state = bnb_weights.quant_state(module) if isinstance(module, bnb.Linear4bit) else None
        if state is None or module.weight.device.type == "meta":
            continue
        if getattr(state, "packing_format_for_cpu", False):
            raise InputError(
                f"{name}: bitsandbytes repacked its 4-bit weight in an evaluation on this CPU, and rounded it; "
                "load the model anew and attach the adapter before it is evaluated"
            )
        fault = _probe(
            state.quant_type, state.shape[-1], state.blocksize, state.nested, state.dtype, module.weight.device
        )
        if fault is not None:
            raise InputError(fault)


def take_over(model: nn.Module) -> None:
    """Give every 4-bit and 8-bit layer of `model`, adapted or not, our product (`bnb_weights.take_over`)."""
    check_four_bits(model)
    for module in model.modules():
        bnb_weights.take_over(module)


class MaskedLinear4bit(MaskedLayer, FastQuantised, Linear4bit):
    """Of a `bnb.nn.Linear4bit` (NF4 or FP4)."""

    def set_aside(self) -> Any:
        # PEFT's merge puts another parameter in the place of this one.
        return cast(nn.Linear, self.get_base_layer()).weight

    def put_back(self, aside: Any) -> None:
        cast(nn.Linear, self.get_base_layer()).weight = aside


class MaskedLinear8bit(MaskedLayer, FastQuantised, Linear8bitLt):
    """Of a `bnb.nn.Linear8bitLt` (LLM.int8())."""

    def set_aside(self) -> Any:
        # bitsandbytes moves the quantised weight and its scales into `state` at the first forward.
        base = cast(Any, self.get_base_layer())
        return base.weight, base.state.CB, base.state.SCB

    def put_back(self, aside: Any) -> None:
        base = cast(Any, self.get_base_layer())
        base.weight, base.state.CB, base.state.SCB = aside


LAYERS: dict[type[nn.Module], type[MaskedLayer]] = {
    bnb.Linear4bit: MaskedLinear4bit,
    bnb.Linear8bitLt: MaskedLinear8bit,
}
