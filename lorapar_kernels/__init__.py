"""Masked LoRA layers, importance scores, selection, and an optimizer for active elements: the backend alone.

Needs torch; Triton is imported when a Triton kernel is first used, and csrc's library when a native one is.
What runs is chosen per call by backend.py (`LORAPAR_BACKEND` forces it) and lora_product.py (`LORAPAR_PRODUCT`).
"""

from .accelerating import accelerate, restore
from .bitmask import MaskIndex, index_mask, pack_mask, unpack_mask
from .dropout import dropout_mask
from .importance import Examples, ScoreSums, importance, lora_add_scored, lora_linear_scored
from .lora_linear import lora_add, lora_linear, lora_linear_grouped
from .lora_product import product_choices, set_product_choices
from .masked_adamw import PreparedAdamW, masked_adamw
from .tiles import TiledMask, spread_tiles, tile_sums
from .top_mass import top_count, top_mass

__all__ = [
    "Examples",
    "MaskIndex",
    "PreparedAdamW",
    "ScoreSums",
    "TiledMask",
    "accelerate",
    "dropout_mask",
    "importance",
    "index_mask",
    "lora_add",
    "lora_add_scored",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_scored",
    "masked_adamw",
    "pack_mask",
    "product_choices",
    "restore",
    "set_product_choices",
    "spread_tiles",
    "tile_sums",
    "top_count",
    "top_mass",
    "unpack_mask",
]
