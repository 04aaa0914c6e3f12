"""PEFT's LoRA layers of bitsandbytes' 4-bit and 8-bit bases with this package's forward and backward; imports peft and
bitsandbytes, and is imported where both are installed.

The base's product is as in bnb_weights.py: made in one op with the adapter's, of the weight dequantised for it.
"""

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor

from .bnb_weights import frozen_weight
from .peft_layers import FastLayer, Frozen, has_hooks


class FastQuantised(FastLayer):
    """A mixin ahead of PEFT's LoRA layers of bitsandbytes' bases."""

    def frozen(self, x: Tensor) -> Frozen | None:
        base: Any = self._modules["base_layer"]
        weight = None if has_hooks(base) else frozen_weight(base, x)
        if weight is None:
            return None
        bias = base._parameters["bias"]
        # bitsandbytes leaves a layer's bias in the checkpoint's dtype.
        return weight, None if bias is None else bias.to(x.dtype)


class FastLinear4bit(FastQuantised, Linear4bit):
    """Of a `bnb.nn.Linear4bit` (NF4 or FP4)."""


class FastLinear8bit(FastQuantised, Linear8bitLt):
    """Of a `bnb.nn.Linear8bitLt` (LLM.int8()); computes with x as it is, see bnb_weights.py."""
