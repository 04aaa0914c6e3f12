"""lora_product.py's fused way: a Triton product that carries its expand, for y and for dX.

    output          x Wᵀ + bias + scaling · S Bᵀ
    input_gradient  dX or 0, + dY W + keep ⊙ (dS A); keep is drawn from the seed (dropout.py)

The expand of rank r opens the accumulator that the product then adds to, so neither y nor dX is read again, and dX's
mask needs no x. What remains of the LoRA layer's traffic is x twice and dY once (bench/LOG.md). No atomics, one fixed
order of sums: deterministic.

bf16 and fp16 of rows of multiples of 16 elements go by tile descriptors, which the hardware fetches, in tiles of
128 × 256, where the device has the shared memory for it (compute capability 9.0 and 10.0); such rows elsewhere in tiles
of 128 × 128 by pointers; anything else, fp32 among it, in small ones. Untuned: no GPU was at hand.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..lora_passes import as_rows
from ..lora_product_kernel import product_kernel
from .launch import COMMON_ROOM, Variant, launch, recording
from .lora_passes import cdiv, precision

# Bytes of shared memory for which the wide tiles are made: four stages of 48 KB.
WIDE_ROOM = 227 << 10
# Rows of tiles that go down together: 8 · 128 rows of x beside 8 columns of 256 of W are 12 MB of 4,096 bf16 each.
BAND = 8
# Fewer tiles than this leave multiprocessors of an H100 or H200 without one.
PROGRAMS = 132


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
        round(p * 65536), float(scale),
        room=WIDE_ROOM if described else COMMON_ROOM, BAND=BAND, RIGHT_T=right_t, FACTOR_T=factor_t,
        BIAS=bias is not None, ADDS=adds, DROPOUT=p > 0.0, BITS=bits is not None, ALIGNED=N % 8 == 0,
        DESCRIBED=described, PRECISION=precision(left), **tiles,
    )  # fmt: skip


def output(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x Wᵀ + bias + scaling · S Bᵀ [..., out] in x's dtype; x [..., in], W [out, in], S [T, r or more], B [out, r]."""
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    _product(as_rows(x), weight.t(), bias, s, b.t(), scaling, 0.0, None, None, y.view(-1, y.shape[-1]), False)
    return y


def input_gradient(
    dx: Tensor | None, dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, p: float,
    bits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dX [T, in] = dY W + keep ⊙ (dS A), added to `dx` in place where that is given; dY [T, out], W [out, in],
    dS [T, r or more] with the factor 1 / (1 − p), A [r, in]. bits: keep as the passes' `input_gradients` wrote it."""
    out = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device) if dx is None else dx
    _product(dy, weight, None, ds, a, 1.0, p, seed, bits, out, dx is not None)
    return out


def room_for_bits(x: Tensor, p: float, layers: int) -> list[Tensor] | None:
    """Where dA's pass writes each layer's mask for dX's product to read, uint8 [T, in / 8] of x [T, in]; None where the
    product draws it again.

    A sixteenth of x, written and read once. Drawn in the product instead, the mask is made while the matrix cores wait:
    some 2,300 more instructions a thread before the loop (bench/LOG.md), where dA's pass waits for memory.
    """
    if p == 0.0 or x.shape[1] % 8 != 0 or x.element_size() == 4:
        return None
    return [torch.empty((x.shape[0], x.shape[1] // 8), dtype=torch.uint8, device=x.device) for _ in range(layers)]


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernel's variants, as the launchers launch them on tensors without memory (ahead_of_time.py).

    `every`: dtypes, sizes, ranks, dropouts, biases and additions in all combinations; else each of them at least once.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_case(*case)
    return variants


# x's dtype, the adapter's, rank, tokens, columns in and out, forward, p (backward), bias (forward) or adds, room
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
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
    dtypes = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
    for (x, a), rank, tokens, columns, room in itertools.product(
        dtypes, (8, 16, 64), (512, 8192), (61, 4096, 4104), (COMMON_ROOM, WIDE_ROOM)
    ):
        for more in (False, True):
            yield x, a, rank, tokens, columns, True, 0.0, more, room
            for p in (0.0, 0.05):
                yield x, a, rank, tokens, columns, False, p, more, room


def _launch_case(x_dtype, a_dtype, rank, tokens, columns, forward, p, more, room) -> None:
    def meta(*shape, dtype=x_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    left, weight = meta(tokens, columns), meta(columns, columns)
    thin, factor = meta(tokens, max(16, rank)), meta(columns, rank, dtype=a_dtype)
    seed = meta(1, dtype=torch.int64) if p > 0.0 else None
    if forward:
        bias = meta(columns) if more else None
        _product(left, weight.t(), bias, thin, factor.t(), 2.0, 0.0, None, None, left, False, room)
    else:
        factor = meta(rank, columns, dtype=a_dtype)
        for bits in {None, *(room_for_bits(left, p, 1) or [])}:
            _product(left, weight, None, thin, factor, 1.0, p, seed, bits, left, more, room)
