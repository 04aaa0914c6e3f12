"""The passes over x and dY that a LoRA layer adds to the frozen one (../lora_linear.py has the specification).

With S = drop(x) Aᵀ, dS = s · dY B and keep the dropout mask, scaled by 1 / (1 − p) where it is applied:

    shrink_kernel       S of up to 3 layers of one x (q, k, v), each with its own mask:  reads x once
    output_kernel       dS and dB = s · dYᵀ S:                                           reads dY once
    input_kernel        dx += Σ keep ⊙ (dS A) and dA = dSᵀ (keep ⊙ x), up to 3 layers:   reads x, reads and writes dx
    reduce_kernel       adds up the partial sums of the three in a fixed order, and masks

Layouts: x, dx [T, K], dY [T, N], A [r, K], B [N, r], row strides free; S and dS [T, R] contiguous, r padded to R = 16,
32, ... 256 (`padded_rank`); partial sums fp32. The mask is a function of (seed, element) as in dropout.py, so nothing
of x's size is kept for it. Sums always run in the same order: deterministic.

Trade-off: with cuBLAS's product the expand s · S Bᵀ is a second one onto its output (beta = 1), and dx is read and
written once more here. lora_product.py's product carries both; `input_gradients` without dx then makes dA alone.

Triton compiles a kernel again where an integer argument becomes 1 or a multiple of 16. That is switched off for what
differs between batches (numbers of tokens and parts, the dropout's threshold), so that no batch waits for the compiler
in the middle of training. Columns, ranks and strides stay specialised, since loads of 16 bytes depend on them.
"""

# Triton's annotations describe the language from outside and differ between its releases.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, store_bits
from .launch import BF16, DTYPES, FP16, FP32, Variant, cdiv, launch, meta, precision, recording, unit_rows

# More layers of one x than this take several launches: three accumulators of 64 ranks still fit in registers.
GROUP = 3
# Launch at least this many programs: two for each multiprocessor of an H100 or H200 (132). Not tuned on a GPU.
PROGRAMS = 264


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


def padded_rank(factors: Sequence[Tensor]) -> int:
    """The width of a kernel's S and dS: the next power of two, at least 16, what a matrix instruction takes."""
    return max(16, 1 << (max(a.shape[0] for a in factors) - 1).bit_length())


def _bits(mask: Tensor | None) -> Tensor | None:
    """The mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _shrink_tiles(x: Tensor, R: int, G: int, p: float) -> dict[str, int]:
    if _slow(x, p):
        return {"BT": 16, "BK": 32, "num_warps": 8 if R > 64 else 4, "num_stages": 2}
    wide = R * G > 64
    if wide and G == GROUP:
        # Three accumulators of 32 ranks: 32 × 64 spills up to 32 bytes on sm_80 and sm_90.
        return {"BT": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
    # Rows that are no multiple of 16 elements spill up to 252 bytes at 4 warps on sm_80; 64 columns of 256 ranks 224.
    warps = 8 if R * G > 32 or x.shape[1] % 16 != 0 else 4
    columns = 32 if R > 128 else 64
    return {"BT": 32 if wide else 64, "BK": columns, "num_warps": warps, "num_stages": 2 if wide else 3}


def _output_tiles(dy: Tensor, R: int) -> dict[str, int]:
    if dy.element_size() == 4:
        # 32 × 32 of 256 ranks spills 1,268 bytes on sm_90 with Triton 3.9, and 3.6 spills up to 360 at odd widths.
        small = R > 32
        columns = 16 if small and R != 128 else 32
        return {"BT": 16 if small else 32, "BN": columns, "num_warps": 8 if small else 4, "num_stages": 2}
    # Rows that are no multiple of 16 elements are loaded in narrower pieces, whose addresses take registers: 32 of them
    # spill 24 bytes at 128 ranks. Aligned, 64 rows of 128 ranks spill 128 bytes on sm_100.
    aligned = dy.shape[1] % 16 == 0
    warps, rows = 4 if aligned and R <= 32 else 8, 32 if R > 64 else 128 if aligned else 64
    if R == 128 and not aligned:
        rows = 16
    # 64 ranks beside 64 columns spill 16 bytes on sm_100 with Triton 3.9; fewer rows would double dB's partial sums.
    return {"BT": rows, "BN": 32 if R > 128 or R == 64 else 64, "num_warps": warps, "num_stages": 2}


def _input_tiles(x: Tensor, R: int, G: int, p: float) -> dict[str, int]:
    if _slow(x, p):
        # A bf16 tile as wide as R is 32 does not compile with Triton 3.6 ("PassManager::run failed").
        BK = 16 if x.element_size() == 2 and R == 32 else 32
        return {"BT": 16, "BK": BK, "num_warps": 4, "num_stages": 2}
    aligned = x.shape[1] % 16 == 0
    warps = 8 if R * G > 16 or not aligned else 4
    # On sm_100 64 rows of one layer of 64 ranks spill 16 bytes with Triton 3.9, of two layers of 16 ranks 24 with 3.6;
    # 64 columns of 128 ranks spill 60 on sm_80.
    rows = 32 if R * G > 64 or R == 64 or (R, G) == (16, 2) else 64
    columns = 32 if R > 64 or (R == 64 and not aligned) else 64
    return {"BT": rows, "BK": columns, "num_warps": warps, "num_stages": 2}


def _slow(x: Tensor, p: float) -> bool:
    """fp32, whose IEEE products run on the plain cores with both operands in registers, or a Philox call an element."""
    return x.element_size() == 4 or (p > 0.0 and x.shape[1] % 8 != 0)


def _group(x: Tensor, R: int, p: float) -> int:
    return 1 if _slow(x, p) or R > 64 or x.shape[1] % 16 != 0 else GROUP if R <= 32 else 2


def _unpipelined(masks: Sequence[Tensor | None]) -> dict[str, int]:
    """One stage where a mask decides whether a tile's product is made.

    In a pipelined loop Triton 3.6 lets a product under a condition read its tiles before their copies have arrived:
    racecheck on an H100 says so, and masked gradients were wrong in fp32, and in bf16 at rank 64.
    """
    return {} if all(mask is None for mask in masks) else {"num_stages": 1}


def _splits(tiles: int, steps: int) -> int:
    """How many parts `steps` iterations go into: tiles · parts reaches PROGRAMS, with at least four steps a part."""
    return max(1, min(cdiv(PROGRAMS, tiles), steps // 4))


def _dropout(p: float, columns: int) -> tuple[int, float, dict[str, bool]]:
    """Threshold, 1 / (1 - p), and the kernels' two switches."""
    return round(p * 65536), 1.0 / (1.0 - p), {"DROPOUT": p > 0.0, "ALIGNED": columns % 8 == 0}


def _reduce(partial: Tensor, out: Tensor, mask: Tensor | None, columns: int, scale: float) -> Tensor:
    """out [rows, columns] <- scale · Σ partial where mask is; partial [parts, ...] may have more rows."""
    n, block = out.numel(), 1024
    launch(
        reduce_kernel, (cdiv(n, block),),
        partial, mask, out, columns, n, partial.shape[0], partial.stride(0), partial.stride(1), float(scale),
        BLOCK=block, MASKED=mask is not None,
    )  # fmt: skip
    return out


def shrink(x: Tensor, factors: list[Tensor], p: float, seeds: list[Tensor | None]) -> list[Tensor]:
    """drop(x) Aᵀ [T, R] in x's dtype for each A [r, K] of `factors`, x [T, K] with unit column stride."""
    (T, K), out = x.shape, []
    threshold, scale, switches = _dropout(p, K)
    R = padded_rank(factors)
    group = _group(x, R, p)
    for start in range(0, len(factors), group):
        members, drawn = list(map(unit_rows, factors[start : start + group])), seeds[start : start + group]
        tiles = _shrink_tiles(x, R, len(members), p)
        rows, steps = cdiv(T, tiles["BT"]), cdiv(K, tiles["BK"])
        splits = _splits(rows, steps)
        k_split = cdiv(steps, splits) * tiles["BK"]
        splits = cdiv(K, k_split)
        kind = x.dtype if splits == 1 else torch.float32
        partial = [torch.empty((splits, T, R), dtype=kind, device=x.device) for _ in members]
        launch(
        shrink_kernel, (rows, splits),
            x, tuple(members), tuple(drawn), tuple(partial), T, K, x.stride(0), tuple(a.shape[0] for a in members),
            tuple(a.stride(0) for a in members), k_split, threshold, scale,
            G=len(members), R=R, PRECISION=precision(x), **switches, **tiles,
        )  # fmt: skip
        for part in partial:
            whole = part[0] if splits == 1 else _reduce(part, part.new_empty((T, R), dtype=x.dtype), None, R, 1.0)
            out.append(whole)
    return out


def shrink_fake(x: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Tensors as `shrink` returns them, without values."""
    return [x.new_empty((x.shape[0], padded_rank(factors))) for _ in factors]


def output_gradients(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, p: float, mask: Tensor | None, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS [T, R] = scaling / (1 - p) · dY B in dY's dtype, and dB [N, r] = scaling · dYᵀ S in B's, 0 outside `mask`."""
    (T, N), R = dy.shape, s.shape[1]
    tiles = _output_tiles(dy, R) | _unpipelined([mask])
    rows, steps = cdiv(T, tiles["BT"]), cdiv(N, tiles["BN"])
    n_split = cdiv(steps, _splits(rows, steps)) * tiles["BN"]
    splits = cdiv(N, n_split)
    ds_part = torch.empty((splits, T, R), dtype=dy.dtype if splits == 1 else torch.float32, device=dy.device)
    db_part = torch.empty((rows, N, R) if needs_b else (0,), dtype=torch.float32, device=dy.device)
    bits, factor = _bits(mask), unit_rows(b)
    launch(
        output_kernel, (rows, splits),
        dy, factor, s, bits, ds_part, db_part, T, N, b.shape[1], dy.stride(0), factor.stride(0), n_split,
        scaling / (1.0 - p), R=R, MASKED=mask is not None, NEEDS_B=needs_b, PRECISION=precision(dy), **tiles,
    )  # fmt: skip
    ds = ds_part[0] if splits == 1 else _reduce(ds_part, torch.empty_like(s), None, R, 1.0)
    db = _reduce(db_part, b.new_empty(b.shape), bits, b.shape[1], scaling) if needs_b else None
    return ds, db


def input_gradients(
    x: Tensor,
    dx: Tensor | None,
    factors: list[Tensor],
    dss: list[Tensor],
    p: float,
    seeds: list[Tensor | None],
    masks: list[Tensor | None],
    needs_a: list[bool],
    bits: list[Tensor] | None = None,
) -> list[Tensor | None]:
    """dx [T, K] += Σ keep ⊙ (dS A) in place, and each dA [r, K] = dSᵀ (keep ⊙ x) in A's dtype, 0 outside its mask.

    bits: where each layer's dropout mask is written, uint8 [T, K / 8], for p > 0, K a multiple of 8, and not in fp32.
    """
    (T, K), R = x.shape, dss[0].shape[1]
    threshold, _, switches = _dropout(p, K)
    active = [_bits(mask) for mask in masks]
    das = [a.new_empty(a.shape) if need else None for a, need in zip(factors, needs_a)]
    # A plain-core product holds all of its inner dimension in registers: fp32 ranks go 64 at a time, a launch each.
    width = min(R, 64) if x.element_size() == 4 else R
    pieces = [(g, slice(r, r + width)) for g, a in enumerate(factors) for r in range(0, a.shape[0], width)]
    group = _group(x, R, p)
    for start in range(0, len(pieces), group):
        here = pieces[start : start + group]
        members = tuple(unit_rows(factors[g][rows]) for g, rows in here)
        actives = tuple(mask if mask is None else mask[rows] for mask, rows in ((active[g], rows) for g, rows in here))
        wanted = tuple(needs_a[g] for g, _ in here)
        tiles = _input_tiles(x, width, len(here), p) | _unpipelined(actives)
        columns, steps = cdiv(K, tiles["BK"]), cdiv(T, tiles["BT"])
        t_split = cdiv(steps, _splits(columns, steps)) * tiles["BT"]
        splits = cdiv(T, t_split)
        sums = tuple(
            torch.empty((splits if need else 0, width, K), dtype=torch.float32, device=x.device) for need in wanted
        )
        launch(
            input_kernel, (columns, splits),
            x, x if dx is None else dx, members, tuple(dss[g][:, rows.start :] for g, rows in here),
            tuple(seeds[g] for g, _ in here), actives, sums,
            tuple(None if bits is None else bits[g] for g, _ in here),
            T, K, x.stride(0), K if dx is None else dx.stride(0), R,
            tuple(a.shape[0] for a in members), tuple(a.stride(0) for a in members), t_split, threshold,
            G=len(here), R=width, NEEDS_X=dx is not None, BITS=bits is not None, PRECISION=precision(x),
            MASKED=tuple(mask is not None for mask in actives), NEEDS_A=wanted, **switches, **tiles,
        )  # fmt: skip
        for (g, rows), part, mask in zip(here, sums, actives):
            da = das[g]
            if da is not None:
                _reduce(part, da[rows], mask, K, 1.0)
    return das


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernels' variants, as the launchers launch them on tensors without memory (launch.py).

    `every`: all dtypes, ranks, numbers of layers, dropouts, masks and wanted gradients in all combinations; else each
    value of each at least once, the widest ones together.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_all(*case)
    return variants


# x's dtype, the adapter's, rank, layers of one x, p, columns, masked, gradients wanted of (x, A and B)
REPRESENTATIVE = [
    (BF16, FP32, 16, 1, 0.05, 4096, False, (True, True)),
    (BF16, FP32, 16, 3, 0.05, 4096, True, (True, True)),
    (BF16, BF16, 32, 2, 0.0, 4096, True, (True, True)),
    (BF16, FP32, 32, 3, 0.05, 4096, False, (True, True)),
    (BF16, FP32, 32, 1, 0.05, 61, False, (True, True)),
    (BF16, FP32, 128, 1, 0.05, 61, False, (True, True)),
    (BF16, FP32, 128, 1, 0.05, 4096, False, (True, True)),
    (BF16, FP32, 64, 3, 0.05, 4096, True, (True, True)),
    (BF16, BF16, 128, 1, 0.05, 4096, True, (False, True)),
    (BF16, FP32, 256, 1, 0.05, 4096, True, (True, True)),
    (BF16, FP32, 256, 1, 0.0, 4104, False, (True, True)),
    (BF16, FP32, 32, 1, 0.05, 4104, True, (True, True)),
    (BF16, FP32, 16, 2, 0.05, 4096, False, (True, True)),
    (BF16, FP32, 128, 1, 0.05, 4096, True, (True, True)),
    (FP16, FP32, 8, 2, 0.05, 61, True, (True, True)),
    (BF16, FP32, 16, 1, 0.05, 4104, True, (True, True)),
    (FP16, FP16, 16, 1, 0.0, 4096, False, (True, False)),
    (FP32, FP32, 16, 3, 0.05, 4096, True, (True, True)),
    (FP32, FP32, 64, 3, 0.05, 61, True, (True, True)),
    (FP32, FP32, 256, 1, 0.05, 4096, True, (True, True)),
]


def _every_case():
    drops = [(0.0, 4096), (0.05, 4096), (0.05, 4104), (0.05, 61)]
    for rank in (16, 32, 64, 128, 256):
        for group in range(1, GROUP + 1):
            for (x, a), (p, columns), masked in itertools.product(DTYPES, drops, (False, True)):
                for wanted in ((True, True), (True, False), (False, True)):
                    yield x, a, rank, group, p, columns, masked, wanted


def _launch_all(x_dtype, a_dtype, rank, group, p, columns, masked, wanted, tokens=None) -> None:
    """One layer's passes, of so many tokens; None: so few that they are cut into partial sums, and so many that not."""
    needs_x, needs_factors = wanted
    for T in (512, 65536) if tokens is None else (tokens,):
        x = meta(T, columns, dtype=x_dtype)
        factors = [meta(rank, columns, dtype=a_dtype) for _ in range(group)]
        seeds = [meta(1, dtype=torch.int64) if p > 0 else None for _ in range(group)]
        masks = [meta(rank, columns, dtype=torch.bool) if masked else None for _ in range(group)]
        s = shrink(x, factors, p, seeds)
        mask_b = meta(columns, rank, dtype=torch.bool) if masked else None
        ds, _ = output_gradients(x, meta(columns, rank, dtype=a_dtype), s[0], 2.0, p, mask_b, needs_factors)
        input_gradients(x, x if needs_x else None, factors, [ds] * group, p, seeds, masks, [needs_factors] * group)
        # As beside a product that carries its expand.
        if needs_factors and p > 0.0 and columns % 8 == 0 and x.element_size() == 2:
            bits = [meta(T, columns // 8, dtype=torch.uint8)] * group
            input_gradients(x, None, factors, [ds] * group, p, seeds, masks, [True] * group, bits)
