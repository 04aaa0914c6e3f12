"""The LoRA layers of bitsandbytes' 4-bit and 8-bit bases; imported where bitsandbytes is installed.

The base's product is bitsandbytes' own, forward and backward; the adapter's share is added by `lora_add`. Merging goes
by PEFT's way, which quantises base + delta anew and so costs accuracy; `unmerge` puts the very base back.
"""

from typing import Any, cast

import bitsandbytes.nn.modules as bnb
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn

from .layers import MaskedLayer


class MaskedLinear4bit(MaskedLayer, Linear4bit):
    """Of a `bnb.nn.Linear4bit` (NF4 or FP4)."""

    def set_aside(self) -> Any:
        # PEFT's merge puts another parameter in the place of this one.
        return cast(nn.Linear, self.get_base_layer()).weight

    def put_back(self, aside: Any) -> None:
        cast(nn.Linear, self.get_base_layer()).weight = aside


class MaskedLinear8bit(MaskedLayer, Linear8bitLt):
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
