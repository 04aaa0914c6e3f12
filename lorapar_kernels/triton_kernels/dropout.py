"""The dropout mask: the same bits as `dropout_mask_reference` (../dropout.py), which is the specification.

A program makes BLOCK Philox blocks of 8 elements and stores each as 8 neighbouring bytes. `keep_tile` is for other
kernels, which draw the mask where they need it.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Variant, cdiv, launch, meta, recording

# 256 Philox blocks = 2,048 elements a program: 8 bytes a lane and store at 4 warps with 2 blocks each.
BLOCK = 256
WARPS = 4
# ../dropout.py's, as the kernels read them.
ROUNDS = tl.constexpr(10)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_STEP_0, KEY_STEP_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def _multiply(multiplier: tl.constexpr, word):
    """The high and the low word of the product: one instruction, where tl.umulhi and `*` are two."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _draw_words(seed, block):
    """Philox4x32-10 of the counter (block low, block high, 0, 0), block int64; seed: a scalar, so its keys are too."""
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    # The first round, in which two words of the counter are 0.
    high0, low0 = _multiply(MULTIPLIER_0, block.to(tl.uint32))
    c0, c1, c2, c3 = (block >> 32).to(tl.uint32) ^ key0, low0 * 0, high0 ^ key1, low0
    for _ in tl.static_range(ROUNDS - 1):
        key0 += KEY_STEP_0
        key1 += KEY_STEP_1
        high0, low0 = _multiply(MULTIPLIER_0, c0)
        high1, low1 = _multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


@triton.jit
def _halves_kept(word, threshold):
    """Whether the draws in the low and in the high half of each word are kept: 1 <= threshold <= 65536.

    Both are compared in the high half, where the high one lies already; by "above one less", since 65536, which keeps
    none, has no room there. So has 0, which keeps all, in this way: launchers then draw nothing.
    """
    bound = (threshold << 16) - 1
    return (word << 16) > bound, word > bound


@triton.jit
def keep_lanes(seed, block, threshold):
    """Whether each of the 8 elements of each Philox block is kept: block int64 [B] -> int1 [B, 8].

    threshold: uint32, at least 1.
    """
    w0, w1, w2, w3 = _draw_words(seed, block)
    # join puts its two operands along a new last dimension: [B, word high bit, word low bit], then the halves
    # last.
    kept = _halves_kept(tl.join(tl.join(w0, w2), tl.join(w1, w3)), threshold)
    return tl.reshape(tl.join(kept[0], kept[1]), (block.shape[0], 8))


@triton.jit
def keep_tile(seed, i_row, first_column, columns, threshold, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether each element of a tile of a row-major [rows, columns] matrix is kept.

    i_row int64 [H], the tile's columns are first_column..first_column + WIDTH -> int1 [H, WIDTH]; threshold: uint32, at
    least 1. ALIGNED: columns and first_column are multiples of 8, so that no Philox block crosses a row, and one call
    serves 8 elements.
    """
    height: tl.constexpr = i_row.shape[0]
    if ALIGNED:
        # Shifts, because a division would ask whether the numbers are negative.
        start = i_row * (columns >> 3) + (first_column >> 3)
        block = start[:, None] + tl.arange(0, WIDTH // 8)[None, :]
        return tl.reshape(keep_lanes(seed, tl.reshape(block, (height * WIDTH // 8,)), threshold), (height, WIDTH))
    i_element = i_row[:, None] * columns + first_column + tl.arange(0, WIDTH)[None, :]
    block = i_element >> 3
    w0, w1, w2, w3 = _draw_words(seed, block)
    lane = i_element.to(tl.int32) & 7
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    low, high = _halves_kept(word, threshold)
    return tl.where((lane & 1) == 0, low, high)


@triton.jit
def store_bits(bits_ptr, keep, i_row, first_column, rows, columns, WIDTH: tl.constexpr):
    """Write a tile of the mask as bits, uint8 [rows, columns / 8], column c in bit c % 8; columns a multiple of 8."""
    height: tl.constexpr = i_row.shape[0]
    lanes = tl.reshape(keep.to(tl.int32), (height, WIDTH // 8, 8)) << tl.arange(0, 8)[None, None, :]
    i_byte = first_column // 8 + tl.arange(0, WIDTH // 8)
    inside = (i_row < rows)[:, None] & (i_byte < columns // 8)[None, :]
    p_bits = bits_ptr + i_row[:, None] * (columns // 8) + i_byte[None, :]
    tl.store(p_bits, tl.sum(lanes, 2).to(tl.uint8), mask=inside)


@triton.jit
def kept_bits(bits_ptr, i_row, first_column, rows, columns, WIDTH: tl.constexpr):
    """The tile that `store_bits` wrote: int1 [H, WIDTH], false outside the matrix."""
    height: tl.constexpr = i_row.shape[0]
    i_byte = first_column // 8 + tl.arange(0, WIDTH // 8)
    inside = (i_row < rows)[:, None] & (i_byte < columns // 8)[None, :]
    b_bits = tl.load(bits_ptr + i_row[:, None] * (columns // 8) + i_byte[None, :], mask=inside, other=0)
    lanes = (b_bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(lanes, (height, WIDTH)) != 0


# A batch's size makes no kernel of its own, and neither does p: neither is specialised on 1 or on multiples of 16.
@triton.jit(do_not_specialize=["blocks", "threshold"])
def _dropout_mask_kernel(seed_ptr, kept_ptr, blocks, threshold, BLOCK: tl.constexpr):
    """kept_ptr [blocks, 8] bytes; whole blocks, so that the 8 bytes of each are stored together."""
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = keep_lanes(tl.load(seed_ptr), block, threshold.to(tl.uint32))
    i_element = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(kept_ptr + i_element, kept.to(tl.uint8), mask=(block < blocks)[:, None])


# Under TRITON_INTERPRET=1 triton.jit makes an interpreted function, which is the only kind that takes CPU
# tensors.
INTERPRETED = not isinstance(_dropout_mask_kernel, triton.runtime.JITFunction)


def dropout_mask(seed: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    """The bool mask of `shape` on the seed's device; a draw below `threshold` is dropped."""
    if threshold == 0:
        return torch.ones(list(shape), dtype=torch.bool, device=seed.device)
    n = math.prod(shape)
    blocks = cdiv(n, 8)
    # Up to 7 bytes more than the mask has.
    kept = torch.empty(8 * blocks, dtype=torch.uint8, device=seed.device)
    if n > 0:
        grid = (cdiv(blocks, BLOCK),)
        launch(_dropout_mask_kernel, grid, seed, kept, blocks, threshold, BLOCK=BLOCK, num_warps=WARPS)
    return kept[:n].view(torch.bool).view(list(shape))


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernel's variants: few enough that `every` makes no difference."""
    del every
    seed = meta(1, dtype=torch.int64)
    with recording() as variants:
        # Numbers of blocks of 32 and of 64 bits.
        for shape in ((2048,), (2**34,)):
            dropout_mask(seed, shape, 3277)
    return variants
