"""The kernel that lora_product_triton.py launches: a product that carries its expand."""

# Triton's annotations describe the language from outside and differ between its releases (3.9 has new ones): a range of
# its own is not iterable there, and False no constexpr.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from .triton_kernels.dropout import keep_tile, kept_bits


# M counts tokens, as in lora_passes_kernels.py.
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
    the seed. A program makes one tile of out; BAND
    rows of tiles go down before the next column of them, so that programs at work together share what L2 holds.
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
