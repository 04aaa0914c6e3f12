"""Masks at one bit an element: row-major element i is bit i % 32 of int32 word i // 32; spare bits are 0.

A partition of a 7B's 17.9 M elements is 2.2 MB a mask on disk, where bytes are 17.9 MB. Logic on two masks of
one shape is torch's own on their words: a & b, a | b, a ^ b, a & ~b keep the spare bits 0 (~a alone does
not).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import native
from .backend import always, choose


def pack_mask_reference(mask: Tensor) -> Tensor:
    """Bool [...] -> int32 [ceil(n / 32)] by shifts; 32 distinct bits add up to their union."""
    flat = mask.reshape(-1).to(torch.int32)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 32)).view(-1, 32)
    return (rows << torch.arange(32, dtype=torch.int32, device=mask.device)).sum(1, dtype=torch.int32)


def unpack_mask_reference(words: Tensor, shape: torch.Size) -> Tensor:
    """Int32 words -> bool of `shape`; the shift's copies of the sign bit are masked off."""
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.view(-1)[: shape.numel()].to(torch.bool).view(shape)


def _pack_mask_native(mask: Tensor) -> Tensor:
    """The mask is contiguous."""
    words = torch.empty((mask.numel() + 31) // 32, dtype=torch.int32, device=mask.device)
    native.call("pack_mask", mask.device, mask.data_ptr(), mask.numel(), words.data_ptr())
    return words


def _unpack_mask_native(words: Tensor, shape: torch.Size) -> Tensor:
    """The words are contiguous and checked."""
    mask = torch.empty(shape, dtype=torch.bool, device=words.device)
    native.call("unpack_mask", words.device, words.data_ptr(), mask.numel(), mask.data_ptr())
    return mask


def _count_mask_native(words: Tensor, n: int) -> int:
    """The words are contiguous and checked."""
    count = torch.empty(1, dtype=torch.int64, device=words.device)
    native.call("count_mask", words.device, words.data_ptr(), n, count.data_ptr())
    return int(count)


def check_words(words: Tensor, n: int) -> None:
    """ValueError unless `words` are the words of a mask of n elements."""
    expected = (n + 31) // 32
    if words.dtype != torch.int32 or words.ndim != 1:
        raise ValueError(f"words must be a 1-D int32 tensor, got {words.dtype} of shape {list(words.shape)}")
    if words.numel() != expected:
        raise ValueError(f"words must be {expected} for {n} elements, got {words.numel()}")
    if n % 32 != 0:
        last = int(words[-1]) & 0xFFFFFFFF
        if last >> (n % 32) != 0:
            raise ValueError(
                f"the {32 - n % 32} spare bits of the last word must be 0 for {n} elements, got 0x{last:08x}"
            )


def _backend(op: str, device: torch.device) -> str:
    native_obstacle = partial(native.obstacle, device)
    # On CUDA the reference goes first: the native kernels await a measurement there. LORAPAR_BACKEND=native
    # takes them.
    if device.type == "cuda":
        return choose(op, {"reference": always, "native": native_obstacle})
    return choose(op, {"native": native_obstacle, "reference": always})


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of any shape as int32 words [ceil(n / 32)] on its device.

    Raises ValueError when the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, got {mask.dtype}")
    if _backend("pack_mask", mask.device) == "native":
        return _pack_mask_native(mask.contiguous())
    return pack_mask_reference(mask)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of `shape` that `pack_mask` made `words` of.

    Raises ValueError when words are not 1-D int32, not as many as the shape needs, or have a spare bit set.
    """
    size = torch.Size(shape)
    check_words(words, math.prod(size))
    if _backend("unpack_mask", words.device) == "native":
        return _unpack_mask_native(words.contiguous(), size)
    return unpack_mask_reference(words, size)


def count_mask(words: Tensor, n: int) -> int:
    """How many of the n elements are set, without unpacking where the native library serves.

    Raises ValueError as `unpack_mask` does.
    """
    check_words(words, n)
    if _backend("count_mask", words.device) == "native":
        return _count_mask_native(words.contiguous(), n)
    return int(unpack_mask_reference(words, torch.Size([n])).sum())
