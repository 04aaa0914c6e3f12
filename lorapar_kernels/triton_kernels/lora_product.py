"""../lora_product.py's fused way: a Triton product that carries its expand, for y and for dX.

    output          x Wᵀ + bias + scaling · S Bᵀ
    input_gradient  dX or 0, + dY W + keep ⊙ (dS A); keep is drawn from the seed (dropout.py)

The expand of rank r opens the accumulator that the product then adds to, so neither y nor dX is read again, and dX's
mask needs no x. What remains of the LoRA layer's traffic is x twice and dY once (bench/LOG.md). No atomics, one fixed
order of sums: deterministic.

bf16 and fp16 of rows of multiples of 16 elements go by tile descriptors, which the hardware fetches, in tiles of
128 × 256, where the device has the shared memory for it (compute capability 9.0 and 10.0); such rows elsewhere in tiles
of 128 × 128 by pointers; anything else, fp32 included, in small ones. Not tuned on a GPU.
"""

# Triton's annotations describe the language from outside and differ between its releases.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .dropout import keep_tile, kept_bits, threshold_of
from .launch import (
    BF16,
    COMMON_ROOM,
    DTYPES,
    FP16,
    FP32,
    Variant,
    cdiv,
    launch,
    meta,
    precision,
    recording,
    unit_rows,
)

# Bytes of shared memory for which the wide tiles are made: four stages of 48 KB.
WIDE_ROOM = 227 << 10
# Rows of tiles that go down together: 8 · 128 rows of x beside 8 columns of 256 of W are 12 MB of 4,096 bf16 each.
BAND = 8
# Fewer tiles than this leave multiprocessors of an H100 or H200 without one.
PROGRAMS = 132


# M counts tokens, as in lora_forward.py.
@triton.jit(do_not_specialize=["M", "threshold"])
def product_kernel(
    left_ptr, right_ptr, bias_ptr, thin_ptr, factor_ptr, seed_ptr, bits_ptr, out_ptr, M, N, K, rank,
    left_stride, right_stride, thin_stride, factor_stride, out_stride, threshold, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr,
    RIGHT_T: tl.constexpr, FACTOR_T: tl.constexpr, BIAS: tl.constexpr, ADDS: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] <- left [M, K] right + keep ⊙ scale · thin [M, rank] factor (+ bias [N]) (+ out).

    right [K, N] and factor [rank, N] lie in memory so, or the other way round where RIGHT_T and FACTOR_T. DESCRIBED:
    left_ptr and right_ptr are descriptors of tiles, which the hardware fetches. BITS: the mask is read, not drawn from
    the seed. A program makes one tile of out; BAND rows of tiles go down before the next column of them, so that
    programs at work together share what L2 holds.
    """
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (BAND * columns)
    place = tl.program_id(0) % (BAND * columns)
    height = tl.minimum(rows - band * BAND, BAND)
    m = (band * BAND + place % height) * BM
    n = (place // height) * BN
    i_m = m + tl.arange(0, BM).to(tl.int64)
    i_n = n + tl.arange(0, BN)
    m_m, m_n = i_m < M, i_n < N
    p_out = out_ptr + i_m[:, None] * out_stride + i_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]

    # The expand comes first: mask and scale apply to it alone, and the long sum goes on in the same accumulator.
    acc = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, rank, BR, num_stages=1):
        i_r = r + tl.arange(0, BR)
        m_r = i_r < rank
        b_thin = tl.load(
            thin_ptr + i_m[:, None] * thin_stride + i_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
        )
        b_factor = _tile(factor_ptr, r, n, rank, N, factor_stride, BR, BN, FACTOR_T, False)
        acc = tl.dot(b_thin, b_factor.to(b_thin.dtype), acc, input_precision=PRECISION)
    acc *= scale
    if DROPOUT:
        if BITS:
            keep = kept_bits(bits_ptr, i_m, n, M, N, BN)
        else:
            keep = keep_tile(tl.load(seed_ptr), i_m, n, N, threshold.to(tl.uint32), BN, ALIGNED)
        acc = tl.where(keep, acc, 0.0)
    if BIAS:
        acc += tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    for k in range(0, K, BK):
        b_left = _tile(left_ptr, m, k, M, K, left_stride, BM, BK, False, DESCRIBED)
        b_right = _tile(right_ptr, k, n, K, N, right_stride, BK, BN, RIGHT_T, DESCRIBED)
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION)
    if ADDS:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _tile(
    ptr, row, column, rows, columns, stride, H: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The tile [H, W] at (row, column) of a matrix [rows, columns], 0 outside it; T: its transpose lies in memory."""
    if DESCRIBED:
        tile = ptr.load([column, row]).T if T else ptr.load([row, column])
    else:
        i_row = row + tl.arange(0, H)
        i_column = column + tl.arange(0, W)
        if T:
            i_tile = i_column[None, :].to(tl.int64) * stride + i_row[:, None]
        else:
            i_tile = i_row[:, None].to(tl.int64) * stride + i_column[None, :]
        tile = tl.load(ptr + i_tile, mask=(i_row < rows)[:, None] & (i_column < columns)[None, :], other=0.0)
    return tile


@functools.cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a block can have; off CUDA devices, interpreted, as much as the kernel takes."""
    if device.type != "cuda":
        return WIDE_ROOM
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _lying(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix as it lies in memory, with unit column stride, and whether that is its transpose."""
    if matrix.stride(1) == 1:
        return matrix, False
    return (matrix.t(), True) if matrix.stride(0) == 1 else (matrix.contiguous(), False)


def _describable(matrix: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes and do not overlap, which tile descriptors take for granted."""
    size, stride = matrix.element_size(), matrix.stride(0)
    return matrix.data_ptr() % 16 == 0 and stride * size % 16 == 0 and stride >= matrix.shape[1]


def _tiles(M: int, N: int, rank: int, size: int, aligned: bool, room: int, adds: bool) -> dict[str, Any]:
    """Tiles and launch options; size: bytes an element of left and right."""
    if size == 4:
        return {"BM": 64 if aligned else 32, "BN": 64, "BK": 16, "BR": 16, "num_warps": 4, "num_stages": 2}
    BR = 16 if rank <= 16 else 32
    if not aligned:
        return {"BM": 64, "BN": 64, "BK": 32, "BR": BR, "num_warps": 8, "num_stages": 2}
    if room < WIDE_ROOM:
        return {"BM": 128, "BN": 128, "BK": 64, "BR": BR, "num_warps": 8, "num_stages": 3}
    # 256 columns of what is added to spill on sm_100.
    BN = 128 if adds or cdiv(M, 128) * cdiv(N, 256) < PROGRAMS else 256
    return {"BM": 128, "BN": BN, "BK": 64, "BR": BR, "num_warps": 8, "num_stages": 4}


def _product(
    left: Tensor, right: Tensor, bias: Tensor | None, thin: Tensor, factor: Tensor, scale: float,
    p: float, seed: Tensor | None, bits: Tensor | None, out: Tensor, adds: bool, room: int | None = None,
) -> None:  # fmt: skip
    """out [M, N] <- left [M, K] right [K, N] + keep ⊙ scale · thin [M, r or more] factor [r, N] + bias (+ out).

    left, thin and out have unit column stride; room: `_room` of left's device unless given.
    """
    (M, K), (rank, N) = left.shape, factor.shape
    room = _room(left.device) if room is None else room
    right, right_t = _lying(right)
    factor, factor_t = _lying(factor)
    # Triton tells multiples of 16 from other numbers: rows of 8·odd elements spill up to 1.5 kB in the large tiles.
    even = all(size % 16 == 0 for size in (N, left.stride(0), right.stride(0), out.stride(0)))
    aligned = even and _describable(left) and _describable(right)
    tiles = _tiles(M, N, rank, left.element_size(), aligned, room, adds)
    described = aligned and left.element_size() == 2 and room >= WIDE_ROOM
    BM, BN, BK = tiles["BM"], tiles["BN"], tiles["BK"]
    launch(
        product_kernel, (cdiv(M, BM) * cdiv(N, BN),),
        TensorDescriptor.from_tensor(left, [BM, BK]) if described else left,
        TensorDescriptor.from_tensor(right, [BN, BK] if right_t else [BK, BN]) if described else right,
        bias, thin, factor, None if bits is not None else seed, bits, out, M, N, K, rank,
        left.stride(0), right.stride(0), thin.stride(0), factor.stride(0), out.stride(0),
        threshold_of(p), float(scale),
        room=WIDE_ROOM if described else COMMON_ROOM, BAND=BAND, RIGHT_T=right_t, FACTOR_T=factor_t,
        BIAS=bias is not None, ADDS=adds, DROPOUT=threshold_of(p) > 0, BITS=bits is not None, ALIGNED=N % 8 == 0,
        DESCRIBED=described, PRECISION=precision(left), **tiles,
    )  # fmt: skip


def output(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scaling: float, y: Tensor) -> None:
    """y [T, out] <- x Wᵀ + bias + scaling · S Bᵀ; x [T, in], W [out, in], S [T, r or more], B [out, r]."""
    bias = None if bias is None else bias.contiguous()
    _product(unit_rows(x), weight.t(), bias, s, b.t(), scaling, 0.0, None, None, y, False)


def input_gradient(
    dx: Tensor | None, dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, p: float,
    bits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dX [T, in] = dY W + keep ⊙ (dS A), added to `dx` in place where that is given; dY [T, out], W [out, in],
    dS [T, r or more] with the factor 1 / (1 − p), A [r, in]. bits: keep as `shrink` wrote it, uint8 [T, in / 8]."""
    out = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device) if dx is None else dx
    _product(dy, weight, None, ds, a, 1.0, p, seed, bits, out, dx is not None)
    return out


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernel's variants, as the launchers launch them on tensors without memory (launch.py).

    `every`: dtypes, sizes, ranks, dropouts, biases and additions in all combinations; else each of them at least once.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_case(*case)
    return variants


# x's dtype, the adapter's, rank, tokens, columns in and out, forward, p (backward), bias (forward) or adds, room
REPRESENTATIVE = [
    (BF16, FP32, 16, 8192, 4096, True, 0.0, False, WIDE_ROOM),
    (BF16, FP32, 16, 8192, 4096, False, 0.05, False, WIDE_ROOM),
    (BF16, FP32, 16, 8192, 4096, False, 0.05, True, WIDE_ROOM),
    (BF16, BF16, 16, 8192, 4096, False, 0.0, True, WIDE_ROOM),
    (BF16, BF16, 64, 512, 4096, True, 0.0, True, WIDE_ROOM),
    (BF16, BF16, 256, 8192, 4096, False, 0.05, False, WIDE_ROOM),
    (FP16, FP32, 256, 8192, 4096, True, 0.0, True, WIDE_ROOM),
    (FP16, FP16, 16, 512, 4096, False, 0.0, False, WIDE_ROOM),
    (BF16, FP32, 16, 8192, 4096, True, 0.0, True, COMMON_ROOM),
    (BF16, FP32, 16, 8192, 4096, False, 0.05, True, COMMON_ROOM),
    (FP16, FP32, 64, 8192, 4096, False, 0.05, False, COMMON_ROOM),
    (BF16, FP32, 16, 8192, 61, True, 0.0, True, COMMON_ROOM),
    (BF16, FP32, 64, 8192, 61, False, 0.05, True, COMMON_ROOM),
    (BF16, FP32, 16, 8192, 4104, False, 0.05, True, WIDE_ROOM),
    (FP32, FP32, 16, 8192, 4096, True, 0.0, True, COMMON_ROOM),
    (FP32, FP32, 16, 8192, 61, True, 0.0, True, COMMON_ROOM),
    (FP32, FP32, 64, 8192, 4096, False, 0.05, True, COMMON_ROOM),
    (FP32, FP32, 16, 8192, 61, False, 0.05, True, COMMON_ROOM),
]


def _every_case():
    for (x, a), rank, tokens, columns, room in itertools.product(
        DTYPES, (8, 16, 64), (512, 8192), (61, 4096, 4104), (COMMON_ROOM, WIDE_ROOM)
    ):
        for more in (False, True):
            yield x, a, rank, tokens, columns, True, 0.0, more, room
            for p in (0.0, 0.05):
                yield x, a, rank, tokens, columns, False, p, more, room


def _launch_case(x_dtype, a_dtype, rank, tokens, columns, forward, p, more, room) -> None:
    left, weight = meta(tokens, columns, dtype=x_dtype), meta(columns, columns, dtype=x_dtype)
    thin, factor = meta(tokens, max(16, rank), dtype=x_dtype), meta(columns, rank, dtype=a_dtype)
    seed = meta(1, dtype=torch.int64) if p > 0.0 else None
    if forward:
        bias = meta(columns, dtype=x_dtype) if more else None
        _product(left, weight.t(), bias, thin, factor.t(), 2.0, 0.0, None, None, left, False, room)
    else:
        factor = meta(rank, columns, dtype=a_dtype)
        # Drawn, and read where the forward kept them.
        kept = meta(tokens, columns // 8, dtype=torch.uint8)
        can_keep = p > 0.0 and columns % 8 == 0 and left.element_size() == 2
        for bits in (None, kept) if can_keep else (None,):
            _product(left, weight, None, thin, factor, 1.0, p, seed, bits, left, more, room)
