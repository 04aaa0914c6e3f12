"""Each example's Gφ and (Gφ)², added to running sums; `add_example_products_reference` (../importance.py) specifies it.

One factor's G is a product over an example's tokens of something thin and something wide: for A of dS [tokens, r] and x
[tokens, in], for B of S [tokens, r] and dY [tokens, out]. So one kernel serves both, with the factor read by strides:
A is [r, in], B is [out, r] read across.

A program of `_example_products_kernel` owns a tile of the factor and a contiguous range of examples. It makes one
example's G in fp32 registers over that example's tokens, and at its end adds Gφ and (Gφ)² to two fp32 tiles; those go
out once, as partial sums. `_add_partial_sums_kernel` then adds the ranges' partial sums in their order to the running
sums. No atomics, and neither G nor a `.grad` is ever written: equal calls give equal bits.

Trade-off: the ranges fill the GPU where a factor has few tiles, and cost 8 bytes an element of one layer a range, for
the time of one call. (In a batch with no more examples than ranges, a partial sum is that of one example.) An example
is never cut, which would write parts of its G; where examples × tiles are fewer than the processors, tiles are narrow.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, Variant, cdiv, launch, meta, recording

# A tile of 16 × 64 and its three fp32 accumulators take 24 registers a thread at 4 warps; 32 × 64 take 48.
BLOCK_N = 64
# The least that the tensor cores multiply: four times the programs, for a batch of one or few examples.
NARROW_N = 16
# (tokens a step, warps) by the input's bits. 32 tokens are one K of the tensor cores' instructions twice over (bf16 has
# 16), and a short example wastes little. fp32 has no such instruction at full precision; with it 32 tokens, or 16 at 4
# warps, spill on sm_90.
STEP = {16: (32, 4), 32: (16, 8)}
# Elements a program of the second kernel: 1,024 take 191 registers.
BLOCK = 512
# Programs a multiprocessor should have to choose from: the loads of one then overlap with the products of another.
PROGRAMS_PER_SM = 4


# Counts differ from batch to batch: specialised on 1 and on multiples of 16, each would be three kernels.
@triton.jit(do_not_specialize=["n_examples"])
def _example_products_kernel(
    thin_ptr, wide_ptr, phi_ptr, offsets_ptr, partial_ptr, scale, n_examples, rank, width,
    stride_thin, stride_wide, stride_phi_r, stride_phi_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partial[range] = (Σ Gφ, Σ (Gφ)²) of the range's examples, each [rank, width]."""
    n_ranges = tl.num_programs(2)
    i_range = tl.program_id(2)
    i_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r, m_n = i_r < rank, i_n < width
    m_tile = m_r[:, None] & m_n[None, :]
    i_phi = i_r.to(tl.int64)[:, None] * stride_phi_r + i_n.to(tl.int64)[None, :] * stride_phi_n
    b_phi = tl.load(phi_ptr + i_phi, mask=m_tile, other=0.0).to(tl.float32) * scale
    b_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    b_sum_sq = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for i_example in range(i_range * n_examples // n_ranges, (i_range + 1) * n_examples // n_ranges):
        start = tl.load(offsets_ptr + i_example)
        end = tl.load(offsets_ptr + i_example + 1)
        b_g = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for i_token in range(start, end, BLOCK_T):
            i_t = i_token + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = i_t < end
            p_thin = thin_ptr + i_t[:, None] * stride_thin + i_r[None, :]
            p_wide = wide_ptr + i_t[:, None] * stride_wide + i_n[None, :]
            b_thin = tl.load(p_thin, mask=m_t[:, None] & m_r[None, :], other=0.0)
            b_wide = tl.load(p_wide, mask=m_t[:, None] & m_n[None, :], other=0.0)
            # fp32 stays fp32: TF32 would keep 10 bits of each factor.
            b_g = tl.dot(tl.trans(b_thin), b_wide, acc=b_g, input_precision="ieee")
        b_gphi = b_g * b_phi
        b_sum += b_gphi
        b_sum_sq += b_gphi * b_gphi
    # Laid out as the factor is, so that the second kernel needs no strides.
    p_partial = partial_ptr + i_range.to(tl.int64) * 2 * rank * width + i_phi
    tl.store(p_partial, b_sum, mask=m_tile)
    tl.store(p_partial + rank * width, b_sum_sq, mask=m_tile)


@triton.jit
def add_compensated(high, low, value):
    """(high, low) + value as an unevaluated pair, high the rounded total (Knuth's exact sum, then Dekker's)."""
    total = high + value
    of_value = total - high
    lost = (high - (total - of_value)) + (value - of_value)
    lost += low
    high = total + lost
    return high, lost - (high - total)


@triton.jit(do_not_specialize=["n_ranges"])
def _add_partial_sums_kernel(partial_ptr, sum_ptr, rest_ptr, sum_sq_ptr, rest_sq_ptr, n_ranges, elements,
                             BLOCK: tl.constexpr):  # fmt: skip
    """Add every range's partial sums, in order, to the two running sums and their rests."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < elements
    b_sum, b_rest = tl.load(sum_ptr + i, mask=m), tl.load(rest_ptr + i, mask=m)
    b_sum_sq, b_rest_sq = tl.load(sum_sq_ptr + i, mask=m), tl.load(rest_sq_ptr + i, mask=m)
    p_partial = partial_ptr + i
    for _ in range(n_ranges):
        b_partial, b_partial_sq = tl.load(p_partial, mask=m), tl.load(p_partial + elements, mask=m)
        b_sum, b_rest = add_compensated(b_sum, b_rest, b_partial)  # pyright: ignore[reportGeneralTypeIssues]
        b_sum_sq, b_rest_sq = add_compensated(b_sum_sq, b_rest_sq, b_partial_sq)
        p_partial += 2 * elements
    tl.store(sum_ptr + i, b_sum, mask=m)
    tl.store(rest_ptr + i, b_rest, mask=m)
    tl.store(sum_sq_ptr + i, b_sum_sq, mask=m)
    tl.store(rest_sq_ptr + i, b_rest_sq, mask=m)


# Under TRITON_INTERPRET=1 triton.jit makes an interpreted function, which is the only kind that takes CPU tensors.
INTERPRETED = not isinstance(_example_products_kernel, triton.runtime.JITFunction)


def block_r(rank: int) -> int:
    """Rows of a tile: a tensor core's least where the rank fits, else twice that."""
    return 16 if rank <= 16 else 32


def grid(n_examples: int, rank: int, width: int, processors: int) -> tuple[int, int, int, int]:
    """(columns of a tile, tiles across, tiles down, ranges of examples), so that tiles × ranges fill the processors.

    A range holds an example at least, so one short of examples gets narrower tiles.
    """
    down = cdiv(rank, block_r(rank))
    block_n = BLOCK_N if n_examples * down * cdiv(width, BLOCK_N) >= processors else NARROW_N
    across = cdiv(width, block_n)
    return block_n, across, down, min(n_examples, cdiv(PROGRAMS_PER_SM * processors, across * down))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def add_example_products(
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    thin: Tensor,
    wide: Tensor,
    phi: Tensor,
    across: bool,
    scale: float,
    offsets: Tensor,
) -> None:
    """Add Gφ and (Gφ)² of each example to (Σ, its rest, Σ of squares, its rest), fp32 of phi's shape, contiguous.

    thin [tokens, r], wide [tokens, n] and phi [r, n] ([n, r] where `across`), offsets int64 [N + 1] on their device;
    G = scale · thinᵀ wide.
    """
    thin, wide, phi = thin.contiguous(), wide.contiguous(), phi.contiguous()
    rank, width = thin.shape[1], wide.shape[1]
    strides = (1, rank) if across else (width, 1)
    n_examples = offsets.numel() - 1
    block_n, tiles_n, tiles_r, ranges = grid(n_examples, rank, width, _processors(thin.device))
    partial = torch.empty(ranges, 2, *phi.shape, dtype=torch.float32, device=thin.device)
    tokens, warps = STEP[8 * thin.element_size()]
    # Rows that do not begin at 16 bytes are loaded an element at a time, and their addresses spill at 4 warps.
    warps = warps if width % 16 == 0 else 8
    launch(
        _example_products_kernel, (tiles_n, tiles_r, ranges),
        thin, wide, phi, offsets, partial, float(scale), n_examples, rank, width, rank, width, *strides,
        BLOCK_R=block_r(rank), BLOCK_N=block_n, BLOCK_T=tokens, num_warps=warps,
    )  # fmt: skip
    launch(_add_partial_sums_kernel, (cdiv(phi.numel(), BLOCK),), partial, *sums, ranges, phi.numel(), BLOCK=BLOCK)


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernels' variants, as the launcher launches them on tensors without memory; `every` makes no difference."""
    del every
    with recording() as variants:
        # One example of a layer that is one tile wide takes the narrow tile.
        shapes = (65, 4096), (65, 61), (2, 64), (2, 61)
        for (dtype, factor), rank, (bounds, width) in itertools.product(DTYPES, (8, 64), shapes):
            for across in (False, True):
                phi = meta(width, rank, dtype=factor) if across else meta(rank, width, dtype=factor)
                sums = meta(*phi.shape), meta(*phi.shape), meta(*phi.shape), meta(*phi.shape)
                thin, wide = meta(4096, rank, dtype=dtype), meta(4096, width, dtype=dtype)
                add_example_products(sums, thin, wide, phi, across, 1.0, meta(bounds, dtype=torch.int64))
    return variants
