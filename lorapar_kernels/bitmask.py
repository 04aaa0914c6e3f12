"""Masks at one bit an element: row-major element i is bit i % 32 of int32 word i // 32; spare bits are 0.

A partition of a 7B's 17.9 M elements is 2.2 MB a mask on disk, where bytes are 17.9 MB. `index_mask` counts the bits
set before every tile of 512 elements, so that an active element's place in a compact array is that count and a few
bits of its tile: `masked_adamw` finds its moments that way.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .backend import choose, no_obstacle

TILE = 512  # LORAPAR_TILE


class MaskIndex(NamedTuple):
    """A mask's words, and how many bits are set before each of its tiles.

    Attributes:
        words: int32 [ceil(n / 32)]. before: int64 [ceil(n / 512) + 1], the last entry counts them all.
        shape: of the mask. active: how many are set.
    """

    words: Tensor
    before: Tensor
    shape: torch.Size
    active: int


def pack_mask_reference(mask: Tensor) -> Tensor:
    """Bool [...] -> int32 [ceil(n / 32)] by shifts; 32 distinct bits add up to their union."""
    flat = mask.reshape(-1).to(torch.int32)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 32)).view(-1, 32)
    return (rows << torch.arange(32, dtype=torch.int32, device=mask.device)).sum(1, dtype=torch.int32)


def unpack_mask_reference(words: Tensor, shape: torch.Size) -> Tensor:
    """Int32 words -> bool of `shape`; the shift's copies of the sign bit are masked off."""
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.view(-1)[: shape.numel()].to(torch.bool).view(shape)


def index_mask_reference(words: Tensor, n: int) -> Tensor:
    """How many bits are set before each tile, and in all."""
    bits = torch.nn.functional.pad(unpack_mask_reference(words, torch.Size([n])), (0, -n % TILE))
    return torch.nn.functional.pad(bits.view(-1, TILE).sum(1).cumsum(0), (1, 0))


def check_words(words: Tensor, n: int) -> None:
    """ValueError unless `words` are as many as a mask of n elements has."""
    expected = (n + 31) // 32
    if words.dtype != torch.int32 or words.ndim != 1:
        raise ValueError(f"words must be a 1-D int32 tensor, got {words.dtype} of shape {list(words.shape)}")
    if words.numel() != expected:
        raise ValueError(f"words must be {expected} for {n} elements, got {words.numel()}")


def _check_spare_bits(words: Tensor, n: int) -> None:
    if n % 32 != 0:
        last = int(words[-1]) & 0xFFFFFFFF
        if last >> (n % 32) != 0:
            raise ValueError(
                f"the {32 - n % 32} spare bits of the last word must be 0 for {n} elements, got 0x{last:08x}"
            )


def _backend(op: str, device: torch.device) -> str:
    return choose(op, {"native": partial(native.obstacle, device), "reference": no_obstacle})


# Ops, so that torch.compile leaves them whole: the backend is chosen when they run.
@torch.library.custom_op("lorapar::pack_mask", mutates_args=())
def _pack_mask(mask: Tensor) -> Tensor:
    if _backend("pack_mask", mask.device) == "reference":
        return pack_mask_reference(mask)
    mask = mask.contiguous()
    words = torch.empty((mask.numel() + 31) // 32, dtype=torch.int32, device=mask.device)
    native.call("pack_mask", mask.device, mask.data_ptr(), mask.numel(), words.data_ptr())
    return words


@torch.library.custom_op("lorapar::unpack_mask", mutates_args=())
def _unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    # Here, where the op runs: torch.compile knows no values.
    _check_spare_bits(words, math.prod(shape))
    if _backend("unpack_mask", words.device) == "reference":
        return unpack_mask_reference(words, torch.Size(shape))
    words = words.contiguous()
    mask = torch.empty(list(shape), dtype=torch.bool, device=words.device)
    native.call("unpack_mask", words.device, words.data_ptr(), mask.numel(), mask.data_ptr())
    return mask


@torch.library.custom_op("lorapar::index_mask", mutates_args=())
def _index_mask(words: Tensor, n: int) -> Tensor:
    if _backend("index_mask", words.device) == "reference":
        return index_mask_reference(words, n)
    words = words.contiguous()
    before = torch.empty((n + TILE - 1) // TILE + 1, dtype=torch.int64, device=words.device)
    native.call("index_mask", words.device, words.data_ptr(), n, before.data_ptr())
    return before


@_pack_mask.register_fake
def _pack_mask_fake(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel() + 31) // 32, dtype=torch.int32)


@_unpack_mask.register_fake
def _unpack_mask_fake(words: Tensor, shape: Sequence[int]) -> Tensor:
    return words.new_empty(shape, dtype=torch.bool)


@_index_mask.register_fake
def _index_mask_fake(words: Tensor, n: int) -> Tensor:
    return words.new_empty((n + TILE - 1) // TILE + 1, dtype=torch.int64)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of any shape as int32 words [ceil(n / 32)] on its device.

    Raises ValueError when the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, got {mask.dtype}")
    return _pack_mask(mask)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of `shape` that `pack_mask` made `words` of.

    Raises ValueError when words are not 1-D int32, not as many as the shape needs, or have a spare bit set.
    """
    check_words(words, math.prod(shape))
    return _unpack_mask(words, list(shape))


def index_mask(mask: Tensor) -> MaskIndex:
    """A bool mask's words and index, on its device: what `masked_adamw` takes in the place of a mask it sees often.

    Raises ValueError when the mask is not bool.
    """
    words = pack_mask(mask)
    before = _index_mask(words, mask.numel())
    return MaskIndex(words, before, mask.shape, int(before[-1]))
