"""The kernels that lora_passes_triton.py launches, which says what they do and with what layouts.

Triton compiles a kernel anew where an integer argument becomes 1 or a multiple of 16, unless told not to. Batches
differ in tokens, so that is switched off for numbers of tokens and of parts (and for the dropout's threshold), lest a
batch in the middle of training wait for the compiler. What is the same in every batch (columns, ranks, strides) is
specialised, since loads of 16 bytes depend on it; the lengths of splits are always multiples of a tile.
"""

# Triton's annotations describe the language from outside and differ between its releases (3.9 has new ones): a range of
# its own is not iterable there, and False no constexpr.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from .triton_kernels.dropout import keep_tile, store_bits


@triton.jit(do_not_specialize=["T", "threshold"])
def shrink_kernel(
    x_ptr, a_ptrs, seed_ptrs, s_ptrs, T, K, x_stride, ranks, a_strides, k_split, threshold, scale,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s_ptrs[g] [splits, T, R] <- scale · (keep_g ⊙ x) A_gᵀ over columns k_split · program_id(1) onwards."""
    i_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i_r = tl.arange(0, R)
    m_t = i_t < T
    first = tl.program_id(1) * k_split
    acc0 = tl.zeros((BT, R), tl.float32)
    acc1 = tl.zeros((BT, R), tl.float32)
    acc2 = tl.zeros((BT, R), tl.float32)
    for k in range(first, tl.minimum(first + k_split, K), BK):
        i_k = k + tl.arange(0, BK)
        m_k = i_k < K
        b_x = tl.load(x_ptr + i_t[:, None] * x_stride + i_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        for g in tl.static_range(G):
            m_a = (i_r < ranks[g])[None, :] & m_k[:, None]
            b_a = tl.load(a_ptrs[g] + i_r[None, :].to(tl.int64) * a_strides[g] + i_k[:, None], mask=m_a, other=0.0)
            b_kept = b_x
            if DROPOUT:
                keep = keep_tile(tl.load(seed_ptrs[g]), i_t, k, K, threshold.to(tl.uint32), BK, ALIGNED)
                b_kept = tl.where(keep, b_x, 0.0)
            product = tl.dot(b_kept, b_a.to(b_x.dtype), input_precision=PRECISION)
            if g == 0:
                acc0 += product
            elif g == 1:
                acc1 += product
            else:
                acc2 += product
    i_s = (tl.program_id(1).to(tl.int64) * T + i_t[:, None]) * R + i_r[None, :]
    for g in tl.static_range(G):
        acc = acc0
        if g == 1:
            acc = acc1
        if g == 2:
            acc = acc2
        tl.store(s_ptrs[g] + i_s, (acc * scale).to(s_ptrs[g].dtype.element_ty), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T"])
def output_kernel(
    dy_ptr, b_ptr, s_ptr, mask_ptr, ds_ptr, db_ptr, T, N, rank, dy_stride, b_stride, n_split, scale,
    R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, NEEDS_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BT rows of dY: ds_ptr [splits, T, R] <- scale · dY B, and db_ptr [T / BT, N, R] <- dYᵀ S over these rows.

    Where mask_ptr [N, rank] holds no active bit in a tile of dB, neither its product nor its store is made.
    """
    i_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i_r = tl.arange(0, R)
    m_t = i_t < T
    m_r = i_r < rank
    b_s = tl.load(s_ptr + i_t[:, None] * R + i_r[None, :], mask=m_t[:, None], other=0.0)
    acc = tl.zeros((BT, R), tl.float32)
    first = tl.program_id(1) * n_split
    for n in range(first, tl.minimum(first + n_split, N), BN):
        i_n = n + tl.arange(0, BN)
        m_n = i_n < N
        m_b = m_n[:, None] & m_r[None, :]
        b_dy = tl.load(dy_ptr + i_t[:, None] * dy_stride + i_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_b = tl.load(b_ptr + i_n[:, None].to(tl.int64) * b_stride + i_r[None, :], mask=m_b, other=0.0)
        acc += tl.dot(b_dy, b_b.to(b_dy.dtype), input_precision=PRECISION)
        if NEEDS_B:
            active = tl.full((), 1, tl.int32)
            if MASKED:
                i_bits = i_n[:, None].to(tl.int64) * rank + i_r[None, :]
                active = tl.max(tl.max(tl.load(mask_ptr + i_bits, mask=m_b, other=0).to(tl.int32), 1), 0)
            if active > 0:
                product = tl.dot(tl.trans(b_dy), b_s, input_precision=PRECISION)
                i_db = (tl.program_id(0).to(tl.int64) * N + i_n[:, None]) * R + i_r[None, :]
                tl.store(db_ptr + i_db, product, mask=m_n[:, None])
    i_ds = (tl.program_id(1).to(tl.int64) * T + i_t[:, None]) * R + i_r[None, :]
    tl.store(ds_ptr + i_ds, (acc * scale).to(ds_ptr.dtype.element_ty), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "threshold"])
def input_kernel(
    x_ptr, dx_ptr, a_ptrs, ds_ptrs, seed_ptrs, mask_ptrs, da_ptrs, bits_ptrs, T, K, x_stride, dx_stride, ds_stride,
    ranks, a_strides, t_split, threshold,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx += Σ_g keep_g ⊙ (dS_g A_g) in place, and da_ptrs[g] [splits, R, K] <- dS_gᵀ (keep_g ⊙ x).

    A program owns BK columns and the tokens t_split · program_id(1) onwards. MASKED[g], NEEDS_A[g]: layer g has a mask,
    wants dA. dS carries the factor 1 / (1 − p). Where a layer's mask has no active bit in the columns, no dA is made.
    BITS: the dropout masks are written down too, into bits_ptrs[g] as by `store_bits`.
    """
    k = tl.program_id(0) * BK
    i_k = k + tl.arange(0, BK)
    m_k = i_k < K
    i_r = tl.arange(0, R)
    first = tl.program_id(1).to(tl.int64) * t_split
    end = tl.minimum(first + t_split, T)
    wanted0 = _wanted(mask_ptrs[0], i_r, i_k, ranks[0], K, MASKED[0], NEEDS_A[0])
    wanted1 = tl.full((), 0, tl.int32)
    wanted2 = tl.full((), 0, tl.int32)
    if G > 1:
        wanted1 = _wanted(mask_ptrs[1], i_r, i_k, ranks[1], K, MASKED[1], NEEDS_A[1])
    if G > 2:
        wanted2 = _wanted(mask_ptrs[2], i_r, i_k, ranks[2], K, MASKED[2], NEEDS_A[2])
    any_wanted = wanted0 + wanted1 + wanted2
    any_work = any_wanted + 1 if NEEDS_X or BITS else any_wanted
    # As a bound: a scalar condition combined with a mask is no bool in the interpreter, which Triton 3.9 refuses.
    m_wanted = i_k < tl.where(any_wanted > 0, K, 0)
    acc0 = tl.zeros((R, BK), tl.float32)
    acc1 = tl.zeros((R, BK), tl.float32)
    acc2 = tl.zeros((R, BK), tl.float32)
    if any_work > 0:
        b_a0 = tl.zeros((R, BK), x_ptr.dtype.element_ty)
        b_a1 = b_a0
        b_a2 = b_a0
        if NEEDS_X:
            b_a0 = _factor(a_ptrs[0], i_r, i_k, ranks[0], K, a_strides[0]).to(b_a0.dtype)
            if G > 1:
                b_a1 = _factor(a_ptrs[1], i_r, i_k, ranks[1], K, a_strides[1]).to(b_a0.dtype)
            if G > 2:
                b_a2 = _factor(a_ptrs[2], i_r, i_k, ranks[2], K, a_strides[2]).to(b_a0.dtype)
        for t in range(first, end, BT):
            i_t = t + tl.arange(0, BT).to(tl.int64)
            m_t = i_t < end
            m_x = m_t[:, None] & m_k[None, :]
            m_read = m_t[:, None] & m_wanted[None, :]
            b_x = tl.load(x_ptr + i_t[:, None] * x_stride + i_k[None, :], mask=m_read, other=0.0)
            b_dx = tl.zeros((BT, BK), tl.float32)
            for g in tl.static_range(G):
                b_ds = tl.load(ds_ptrs[g] + i_t[:, None] * ds_stride + i_r[None, :], mask=m_t[:, None], other=0.0)
                b_kept = b_x
                if DROPOUT:
                    keep = keep_tile(tl.load(seed_ptrs[g]), i_t, k, K, threshold.to(tl.uint32), BK, ALIGNED)
                    b_kept = tl.where(keep, b_x, 0.0)
                    if BITS:
                        store_bits(bits_ptrs[g], keep, i_t, k, end, K, BK)
                if NEEDS_X:
                    b_a = b_a0
                    if g == 1:
                        b_a = b_a1
                    if g == 2:
                        b_a = b_a2
                    part = tl.dot(b_ds, b_a, input_precision=PRECISION)
                    if DROPOUT:
                        part = tl.where(keep, part, 0.0)
                    b_dx += part
                if NEEDS_A[g]:
                    if g == 0:
                        if wanted0 > 0:
                            acc0 += tl.dot(tl.trans(b_ds), b_kept, input_precision=PRECISION)
                    elif g == 1:
                        if wanted1 > 0:
                            acc1 += tl.dot(tl.trans(b_ds), b_kept, input_precision=PRECISION)
                    else:
                        if wanted2 > 0:
                            acc2 += tl.dot(tl.trans(b_ds), b_kept, input_precision=PRECISION)
            if NEEDS_X:
                p_dx = dx_ptr + i_t[:, None] * dx_stride + i_k[None, :]
                b_dx += tl.load(p_dx, mask=m_x, other=0.0).to(tl.float32)
                tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    i_da = (tl.program_id(1).to(tl.int64) * R + i_r[:, None]) * K + i_k[None, :]
    for g in tl.static_range(G):
        if NEEDS_A[g]:
            acc = acc0
            if g == 1:
                acc = acc1
            if g == 2:
                acc = acc2
            tl.store(da_ptrs[g] + i_da, acc, mask=m_k[None, :])


@triton.jit
def _factor(a_ptr, i_r, i_k, rank, K, a_stride):
    """A's columns i_k, [R, BK]; rows from its rank on are 0."""
    m_a = (i_r < rank)[:, None] & (i_k < K)[None, :]
    return tl.load(a_ptr + i_r[:, None].to(tl.int64) * a_stride + i_k[None, :], mask=m_a, other=0.0)


@triton.jit
def _wanted(mask_ptr, i_r, i_k, rank, K, MASKED: tl.constexpr, NEEDS: tl.constexpr):
    """Whether these columns of dA have an active bit (int32 scalar); 0 where no dA is wanted at all."""
    wanted = tl.full((), 0, tl.int32)
    if NEEDS:
        wanted = tl.full((), 1, tl.int32)
        if MASKED:
            m_bits = (i_r < rank)[:, None] & (i_k < K)[None, :]
            i_bits = i_r[:, None].to(tl.int64) * K + i_k[None, :]
            wanted = tl.max(tl.max(tl.load(mask_ptr + i_bits, mask=m_bits, other=0).to(tl.int32), 1), 0)
    return wanted


# n and part_stride are tokens times a padded rank where tokens are in them: multiples of 16 always.
@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(
    partial_ptr, mask_ptr, out_ptr, columns, n, parts, part_stride, row_stride, scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] <- scale · Σ_p partial[p, row, column] in the order of p, exactly 0 where the mask is."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = i < n
    if MASKED:
        wanted = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
    # A pointer that moves on: part times stride leaves 32 bits at a million tokens.
    p_partial = partial_ptr + (i // columns) * row_stride + i % columns
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(p_partial, mask=wanted, other=0.0)
        p_partial += part_stride
    tl.store(out_ptr + i, (total * scale).to(out_ptr.dtype.element_ty), mask=i < n)
