"""The dropout mask: the same bits as `dropout_mask_reference` (../dropout.py), which is the specification.

A program makes BLOCK Philox blocks of 8 elements and stores each as 8 neighbouring bytes. `keep_tile` is for other
kernels, which draw the mask where they need it.

What a draw costs on sm_90, counted in the shrink's loop (bench/LOG.md): 9 instructions an element. Each of Philox's
products, of 32 by 32 bits into 64, is one instruction; its keys come from a scalar seed, and stay in the uniform
registers; the draws are compared in place, and no Philox block's elements leave their thread.
"""

# Triton's annotations describe the language from outside and differ between its releases.
# pyright: reportGeneralTypeIssues=false

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


def threshold_of(p: float) -> int:
    """The draws below this one are dropped, as in ../dropout.py."""
    return round(p * 65536)


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
def _lanes(e0, e1, e2, e3, e4, e5, e6, e7):
    """Eight tensors [B] as one [B, 8], each thread's own: join puts its operands along a new last dimension."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), (e0.shape[0], 8))


@triton.jit
def _keep_block(seed, block, threshold):
    """Whether each of the 8 elements of each Philox block is kept: block int64 [B] -> 8 of int1 [B]."""
    w0, w1, w2, w3 = _draw_words(seed, block)
    k0, k1 = _halves_kept(w0, threshold)
    k2, k3 = _halves_kept(w1, threshold)
    k4, k5 = _halves_kept(w2, threshold)
    k6, k7 = _halves_kept(w3, threshold)
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def keep_lanes(seed, block, threshold):
    """Whether each of the 8 elements of each Philox block is kept: block int64 [B] -> int1 [B, 8].

    threshold: uint32, at least 1.
    """
    k0, k1, k2, k3, k4, k5, k6, k7 = _keep_block(seed, block, threshold)
    return _lanes(k0, k1, k2, k3, k4, k5, k6, k7)


@triton.jit
def _tile_blocks(i_row, first_column, columns, WIDTH: tl.constexpr):
    """The Philox blocks of a tile, int64 [H · WIDTH / 8]; columns and first_column are multiples of 8."""
    # Shifts, because a division would ask whether the numbers are negative.
    start = i_row * (columns >> 3) + (first_column >> 3)
    return tl.reshape(start[:, None] + tl.arange(0, WIDTH // 8)[None, :], (i_row.shape[0] * WIDTH // 8,))


@triton.jit
def keep_tile(seed, i_row, first_column, columns, threshold, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether each element of a tile of a row-major [rows, columns] matrix is kept.

    i_row int64 [H], the tile's columns are first_column..first_column + WIDTH -> int1 [H, WIDTH]; threshold: uint32, at
    least 1. ALIGNED: columns and first_column are multiples of 8, so that no Philox block crosses a row, and one call
    serves 8 elements.
    """
    if ALIGNED:
        block = _tile_blocks(i_row, first_column, columns, WIDTH)
        return tl.reshape(keep_lanes(seed, block, threshold), (i_row.shape[0], WIDTH))
    i_element = i_row[:, None] * columns + first_column + tl.arange(0, WIDTH)[None, :]
    w0, w1, w2, w3 = _draw_words(seed, i_element >> 3)
    lane = i_element.to(tl.int32) & 7
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    low, high = _halves_kept(word, threshold)
    return tl.where((lane & 1) == 0, low, high)


@triton.jit
def keep_and_store_tile(bits_ptr, seed, i_row, first_column, rows, columns, threshold, WIDTH: tl.constexpr):
    """`keep_tile` where ALIGNED, written as bits too: uint8 [rows, columns / 8], column c in bit c % 8.

    A block's byte is put together where the block is drawn, in one thread: from the finished tile it took 15
    instructions an element, most of them to bring the 8 back together.
    """
    block = _tile_blocks(i_row, first_column, columns, WIDTH)
    k0, k1, k2, k3, k4, k5, k6, k7 = _keep_block(seed, block, threshold)
    low = k0.to(tl.int32) | (k1.to(tl.int32) << 1) | (k2.to(tl.int32) << 2) | (k3.to(tl.int32) << 3)
    high = (k4.to(tl.int32) << 4) | (k5.to(tl.int32) << 5) | (k6.to(tl.int32) << 6) | (k7.to(tl.int32) << 7)
    i_byte = (first_column >> 3) + tl.arange(0, WIDTH // 8)
    inside = (i_row < rows)[:, None] & (i_byte < columns >> 3)[None, :]
    p_bits = bits_ptr + i_row[:, None] * (columns >> 3) + i_byte[None, :]
    tl.store(p_bits, tl.reshape(low | high, (i_row.shape[0], WIDTH // 8)).to(tl.uint8), mask=inside)
    return tl.reshape(_lanes(k0, k1, k2, k3, k4, k5, k6, k7), (i_row.shape[0], WIDTH))


@triton.jit
def kept_bits(bits_ptr, i_row, first_column, rows, columns, WIDTH: tl.constexpr):
    """The tile that `keep_and_store_tile` wrote: int1 [H, WIDTH], false outside the matrix."""
    height: tl.constexpr = i_row.shape[0]
    i_byte = (first_column >> 3) + tl.arange(0, WIDTH // 8)
    inside = (i_row < rows)[:, None] & (i_byte < columns >> 3)[None, :]
    b_bits = tl.load(bits_ptr + i_row[:, None] * (columns >> 3) + i_byte[None, :], mask=inside, other=0)
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
