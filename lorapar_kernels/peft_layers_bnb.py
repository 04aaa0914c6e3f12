"""PEFT's LoRA layers of bitsandbytes' 4-bit and 8-bit bases with this package's forward and backward; imports peft and
bitsandbytes, and is imported where both are installed.

The base's product is as in bnb_weights.py: made in one op with the adapter's, of the weight dequantised for it.
"""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from .peft_layers import FastLayer


class FastLinear4bit(FastLayer, Linear4bit):
    """Of a `bnb.nn.Linear4bit` (NF4 or FP4)."""


class FastLinear8bit(FastLayer, Linear8bitLt):
    """Of a `bnb.nn.Linear8bitLt` (LLM.int8()); computes with x as it is, see bnb_weights.py."""
