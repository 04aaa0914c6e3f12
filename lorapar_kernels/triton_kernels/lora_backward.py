"""What a LoRA layer adds to the frozen one's backward (../lora_linear.py has the specification).

With S = drop(x) Aᵀ of the forward, dS = scaling / (1 − p) · dY B and keep the dropout mask, for up to 3 layers of one x
(q, k, v; gate, up) a launch:

    output_kernel       parts of dS and of dB = scaling · dYᵀ S:                           reads each dY once
    input_kernel        dX = Σ keep ⊙ (dS A), and parts of dA = dSᵀ (keep ⊙ x):            reads x once, writes dX
    reduce_kernel       adds up the parts of the whole group in a fixed order, and masks

dX is what the base's products then add to (beta = 1). Layouts: x, dX [T, K], dY [T, N], A [r, K], B [N, r], row strides
free; S and dS [T, R] contiguous, r padded to R = 16, 32, ... 256; parts fp32. Sums always run in the same order:
deterministic.

Masks act on dA and dB alone. The reduction applies them, and reads a part only where its mask is active; so where no
element of a stripe (64 columns of A, 64 rows of B) is, its part is neither written nor read. A program in whose columns
nothing is active makes no product for them at all, and then input_kernel does not read x. That is asked once a
program, outside its loop: a product under a condition in a pipelined loop reads tiles before they arrive (Triton 3.6,
found by racecheck on an H100), and a loop that is not pipelined would cost more than the products that it leaves out.

How large the parts are. A program of output_kernel owns BN columns of dY and a range of tokens, holds its rows of B and
its sum of dB in registers, and goes down its tokens: dS comes in N / BN parts of T · R, dB in as many parts of N · R as
there are ranges. Of Y = 2 T N bytes (bf16, R = 16) that is 32 / BN for dS and 32 / (tokens of a range) for dB:

    T = 8192, BN = 256             programs                  dS      dB      of Y
    4096 → 4096, alone             16 · 16 ranges of 512     0.125   0.063   0.19
    q, k, v of 4096                48 · 5 ranges of 1,664    0.125   0.020   0.15
    gate, up of 11008              86 · 3 ranges of 2,752    0.125   0.012   0.14

each written and read once, through L2 for the most part. A program that owned 128 tokens and went along their columns
made 0.29 Y: 0.25 of dB, a part for each 128 tokens, and 0.04 of dS.

Triton compiles a kernel again where an integer argument becomes 1 or a multiple of 16. That is switched off for what
differs between batches (numbers of tokens and parts, the dropout's threshold), so that no batch waits for the compiler
in the middle of training. Columns, ranks and strides stay specialised, since loads of 16 bytes depend on them.
"""

# Triton's annotations describe the language from outside and differ between its releases.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false
# Whether an argument is None is decided when a kernel is compiled, the condition inside when it runs.
# ruff: noqa: SIM102

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, kept_bits, threshold_of
from .launch import BF16, DTYPES, FP16, FP32, Launch, Variant, cdiv, meta, precision, recording, unit_rows
from .lora_forward import GROUP, PLANS, PROGRAMS, dropout_switches, group_size, is_slow, padded_rank

# Columns of A, or rows of B, that one entry of a mask's stripes stands for (../tiles.py).
STRIPE = tl.constexpr(64)
# What one reduction launch adds up: dS and dB of three layers, and room for two more.
REDUCED = 8
# Elements that a program of the reduction makes, 4 a thread, and parts whose loads it has under way together.
BLOCK, AT_ONCE = 512, 8


class Mask(Protocol):
    """A factor's mask, as ../tiles.py's TiledMask has it.

    Attributes:
        stripes: uint8, 1 where a stripe of the factor has an active element; None where each has.
    """

    @property
    def stripes(self) -> Tensor | None: ...
    def as_words(self) -> Tensor: ...  # the mask as contiguous uint8


@triton.jit(do_not_specialize=["T", "t_split"])
def output_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, b0_ptr, b1_ptr, b2_ptr, s0_ptr, s1_ptr, s2_ptr,
    stripes0_ptr, stripes1_ptr, stripes2_ptr, ds0_ptr, ds1_ptr, ds2_ptr, db0_ptr, db1_ptr, db2_ptr,
    T, t_split, N0, N1, N2, rank0, rank1, rank2, dy_stride0, dy_stride1, dy_stride2, b_stride0, b_stride1, b_stride2,
    s_stride, R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds_ptr [N / BN, T, R] <- dY B over BN columns each; db_ptr [splits, N, R] <- dYᵀ S over t_split tokens each.

    A program has columns BN · program_id(0) and tokens t_split · program_id(1) onwards of layer program_id(2); layers
    that are not there are None. s_stride: elements between rows of S, and of the parts of dS and dB.
    """
    if tl.program_id(2) == 0:
        _output_columns(dy0_ptr, b0_ptr, s0_ptr, stripes0_ptr, ds0_ptr, db0_ptr, T, t_split, N0, rank0,
                        dy_stride0, b_stride0, s_stride, R, BT, BN, STAGES, PRECISION)  # fmt: skip
    if dy1_ptr is not None:
        if tl.program_id(2) == 1:
            _output_columns(dy1_ptr, b1_ptr, s1_ptr, stripes1_ptr, ds1_ptr, db1_ptr, T, t_split, N1, rank1,
                            dy_stride1, b_stride1, s_stride, R, BT, BN, STAGES, PRECISION)  # fmt: skip
    if dy2_ptr is not None:
        if tl.program_id(2) == 2:
            _output_columns(dy2_ptr, b2_ptr, s2_ptr, stripes2_ptr, ds2_ptr, db2_ptr, T, t_split, N2, rank2,
                            dy_stride2, b_stride2, s_stride, R, BT, BN, STAGES, PRECISION)  # fmt: skip


@triton.jit
def _output_columns(
    dy_ptr, b_ptr, s_ptr, stripes_ptr, ds_ptr, db_ptr, T, t_split, N, rank, dy_stride, b_stride, s_stride,
    R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer of output_kernel. db_ptr None: no dB is wanted."""
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    # A narrower layer than the group's widest has fewer columns of programs.
    if tl.program_id(0) * BN < N:
        m_b = (i_n < N)[:, None] & (tl.arange(0, R) < rank)[None, :]
        i_b = i_n[:, None].to(tl.int64) * b_stride + tl.arange(0, R)[None, :]
        b_b = tl.load(b_ptr + i_b, mask=m_b, other=0.0).to(dy_ptr.dtype.element_ty)
        if db_ptr is None:
            _output_loop(dy_ptr, b_b, s_ptr, ds_ptr, None, i_n, i_n < N, T, t_split, N, dy_stride, s_stride,
                         R, BT, STAGES, PRECISION)  # fmt: skip
        elif stripes_ptr is None:
            _output_loop(dy_ptr, b_b, s_ptr, ds_ptr, db_ptr, i_n, i_n < N, T, t_split, N, dy_stride, s_stride,
                         R, BT, STAGES, PRECISION)  # fmt: skip
        else:
            b_active = tl.load(stripes_ptr + i_n // STRIPE, mask=i_n < N, other=0).to(tl.int32)
            if tl.max(b_active, 0) > 0:
                _output_loop(dy_ptr, b_b, s_ptr, ds_ptr, db_ptr, i_n, b_active > 0, T, t_split, N, dy_stride, s_stride,
                             R, BT, STAGES, PRECISION)  # fmt: skip
            else:
                _output_loop(dy_ptr, b_b, s_ptr, ds_ptr, None, i_n, i_n < N, T, t_split, N, dy_stride, s_stride,
                             R, BT, STAGES, PRECISION)  # fmt: skip


@triton.jit
def _output_loop(
    dy_ptr, b_b, s_ptr, ds_ptr, db_ptr, i_n, m_db, T, t_split, N, dy_stride, s_stride,
    R: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Down the program's tokens. b_b [BN, R]: B's rows i_n; m_db [BN]: the rows of dB that are stored."""
    i_r = tl.arange(0, R)
    first = tl.program_id(1) * t_split
    acc = tl.zeros((R, b_b.shape[0]), tl.float32)
    # A loop of warp-group products alone has a buffer a stage, another one less.
    stages: tl.constexpr = STAGES if db_ptr is not None else 2
    for t in tl.range(first, tl.minimum(first + t_split, T), BT, num_stages=stages):
        i_t = t + tl.arange(0, BT).to(tl.int64)
        m_t = (i_t < T)[:, None]
        m_dy = m_t & (i_n < N)[None, :]
        b_dy = tl.load(dy_ptr + i_t[:, None] * dy_stride + i_n[None, :], mask=m_dy, other=0.0)
        i_ds = (tl.program_id(0).to(tl.int64) * T + i_t[:, None]) * s_stride + i_r[None, :]
        tl.store(ds_ptr + i_ds, tl.dot(b_dy, b_b, input_precision=PRECISION), mask=m_t)
        if db_ptr is not None:
            b_s = tl.load(s_ptr + i_t[:, None] * s_stride + i_r[None, :], mask=m_t, other=0.0)
            # dBᵀ, since Triton does not pipeline dY for compute capability 8 where its transpose is an operand too.
            acc += tl.dot(tl.trans(b_s), b_dy, input_precision=PRECISION)
    if db_ptr is not None:
        i_db = (tl.program_id(1).to(tl.int64) * N + i_n[:, None]) * s_stride + i_r[None, :]
        tl.store(db_ptr + i_db, tl.trans(acc), mask=m_db[:, None])


@triton.jit(do_not_specialize=["T", "t_split", "threshold"])
def input_kernel(
    x_ptr, dx_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr, seed0_ptr, seed1_ptr, seed2_ptr,
    bits0_ptr, bits1_ptr, bits2_ptr, stripes0_ptr, stripes1_ptr, stripes2_ptr, da0_ptr, da1_ptr, da2_ptr,
    T, t_split, K, x_stride, ds_stride, rank0, rank1, rank2, a_stride0, a_stride1, a_stride2, threshold,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, NEEDS_A: tl.constexpr, MASKED: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [T, K] <- Σ_g keep_g ⊙ (dS_g A_g) (+ dx: ADDS), and da_ptr [splits, R, K] <- dS_gᵀ (keep_g ⊙ x) of each layer.

    A program has columns BK · program_id(0) and tokens t_split · program_id(1) onwards of all G layers. keep is read
    where its bits are given, else drawn from the seed. dx_ptr None, da_ptr None: not wanted. NEEDS_A: some layer's dA
    is wanted; MASKED: each that is has stripes. ds_stride: elements between rows of dS, which
    carries the factor 1 / (1 − p).
    """
    i_k = tl.program_id(0) * BK + tl.arange(0, BK)
    b_active0 = _active(da0_ptr, stripes0_ptr, i_k, K)
    b_active1 = _active(da1_ptr, stripes1_ptr, i_k, K)
    b_active2 = _active(da2_ptr, stripes2_ptr, i_k, K)
    if MASKED:
        if tl.max(b_active0 + b_active1 + b_active2, 0) > 0:
            _input_loop(x_ptr, dx_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr,
                        seed0_ptr, seed1_ptr, seed2_ptr, bits0_ptr, bits1_ptr, bits2_ptr, da0_ptr, da1_ptr, da2_ptr,
                        b_active0, b_active1, b_active2, i_k, T, t_split, K, x_stride, ds_stride, rank0, rank1, rank2,
                        a_stride0, a_stride1, a_stride2, threshold, G, R, BT, BK, DROPOUT, ALIGNED, True, ADDS,
                        PRECISION)  # fmt: skip
        else:
            if dx_ptr is not None:
                _input_loop(x_ptr, dx_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr,
                            seed0_ptr, seed1_ptr, seed2_ptr, bits0_ptr, bits1_ptr, bits2_ptr, None, None, None,
                            b_active0, b_active1, b_active2, i_k, T, t_split, K, x_stride, ds_stride,
                            rank0, rank1, rank2, a_stride0, a_stride1, a_stride2, threshold, G, R, BT, BK, DROPOUT,
                            ALIGNED, False, ADDS, PRECISION)  # fmt: skip
    else:
        _input_loop(x_ptr, dx_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr,
                    seed0_ptr, seed1_ptr, seed2_ptr, bits0_ptr, bits1_ptr, bits2_ptr, da0_ptr, da1_ptr, da2_ptr,
                    b_active0, b_active1, b_active2, i_k, T, t_split, K, x_stride, ds_stride, rank0, rank1, rank2,
                    a_stride0, a_stride1, a_stride2, threshold, G, R, BT, BK, DROPOUT, ALIGNED, NEEDS_A, ADDS,
                    PRECISION)  # fmt: skip


@triton.jit
def _active(da_ptr, stripes_ptr, i_k, K):
    """int32, 1 for the columns i_k whose parts of dA are wanted."""
    if da_ptr is None:
        active = tl.zeros(i_k.shape, tl.int32)
    elif stripes_ptr is None:
        active = (i_k < K).to(tl.int32)
    else:
        active = tl.load(stripes_ptr + i_k // STRIPE, mask=i_k < K, other=0).to(tl.int32)
    return active


@triton.jit
def _input_loop(
    x_ptr, dx_ptr, a0_ptr, a1_ptr, a2_ptr, ds0_ptr, ds1_ptr, ds2_ptr, seed0_ptr, seed1_ptr, seed2_ptr,
    bits0_ptr, bits1_ptr, bits2_ptr, da0_ptr, da1_ptr, da2_ptr, b_active0, b_active1, b_active2, i_k,
    T, t_split, K, x_stride, ds_stride, rank0, rank1, rank2, a_stride0, a_stride1, a_stride2, threshold,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, NEEDS_A: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Down the program's tokens; without NEEDS_A x is not read."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    NEEDS_X: tl.constexpr = dx_ptr is not None  # pyright: ignore[reportAssignmentType]
    # Before the loop, which the compiler would stage A's tiles for.
    b_a0 = _factor(a0_ptr, i_k, rank0, K, a_stride0, R, NEEDS_X, kind)
    b_a1 = _factor(a1_ptr, i_k, rank1, K, a_stride1, R, NEEDS_X and G > 1, kind)
    b_a2 = _factor(a2_ptr, i_k, rank2, K, a_stride2, R, NEEDS_X and G > 2, kind)
    seed0, seed1, seed2 = _seed(seed0_ptr), _seed(seed1_ptr), _seed(seed2_ptr)
    acc0 = tl.zeros((R, BK), tl.float32)
    acc1 = tl.zeros((R, BK), tl.float32)
    acc2 = tl.zeros((R, BK), tl.float32)
    first = tl.program_id(1) * t_split
    for t in range(first, tl.minimum(first + t_split, T), BT):
        i_t = t + tl.arange(0, BT).to(tl.int64)
        m_x = (i_t < T)[:, None] & (i_k < K)[None, :]
        b_x = tl.zeros((BT, BK), kind)
        if NEEDS_A:
            b_x = tl.load(x_ptr + i_t[:, None] * x_stride + i_k[None, :], mask=m_x, other=0.0)
        b_dx = tl.zeros((BT, BK), tl.float32)
        b_dx, acc0 = _add_layer(b_dx, acc0, b_x, b_a0, ds0_ptr, seed0, bits0_ptr, da0_ptr, i_t, T, K, ds_stride,
                                threshold, R, BK, DROPOUT, ALIGNED, NEEDS_X, PRECISION)  # fmt: skip
        if G > 1:
            b_dx, acc1 = _add_layer(b_dx, acc1, b_x, b_a1, ds1_ptr, seed1, bits1_ptr, da1_ptr, i_t, T, K, ds_stride,
                                    threshold, R, BK, DROPOUT, ALIGNED, NEEDS_X, PRECISION)  # fmt: skip
        if G > 2:
            b_dx, acc2 = _add_layer(b_dx, acc2, b_x, b_a2, ds2_ptr, seed2, bits2_ptr, da2_ptr, i_t, T, K, ds_stride,
                                    threshold, R, BK, DROPOUT, ALIGNED, NEEDS_X, PRECISION)  # fmt: skip
        if NEEDS_X:
            p_dx = dx_ptr + i_t[:, None] * K + i_k[None, :]
            if ADDS:
                b_dx += tl.load(p_dx, mask=m_x, other=0.0).to(tl.float32)
            tl.store(p_dx, b_dx.to(kind), mask=m_x)
    _store_part(da0_ptr, acc0, b_active0, i_k, K, R)
    _store_part(da1_ptr, acc1, b_active1, i_k, K, R)
    _store_part(da2_ptr, acc2, b_active2, i_k, K, R)


@triton.jit
def _factor(a_ptr, i_k, rank, K, a_stride, R: tl.constexpr, WANTED: tl.constexpr, kind: tl.constexpr):
    """A's columns i_k, [R, BK]; rows from its rank on are 0."""
    b_a = tl.zeros((R, i_k.shape[0]), kind)
    if WANTED:
        i_r = tl.arange(0, R)
        m_a = (i_r < rank)[:, None] & (i_k < K)[None, :]
        b_a = tl.load(a_ptr + i_r[:, None].to(tl.int64) * a_stride + i_k[None, :], mask=m_a, other=0.0).to(kind)
    return b_a


@triton.jit
def _seed(seed_ptr):
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def _kept(bits_ptr, i_t, k, T, K, BK: tl.constexpr):
    """Columns k to k + BK of a mask that lies as bits in bytes, or in words of 32, which alone Triton pipelines."""
    if bits_ptr.dtype.element_ty == tl.int32:
        i_word = k // 32 + tl.arange(0, BK // 32)
        inside = (i_t < T)[:, None] & (i_word < K // 32)[None, :]
        b_words = tl.load(bits_ptr + i_t[:, None] * (K // 32) + i_word[None, :], mask=inside, other=0)
        lanes = (b_words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = tl.reshape(lanes, (i_t.shape[0], BK)) != 0
    else:
        keep = kept_bits(bits_ptr, i_t, k, T, K, BK)
    return keep


@triton.jit
def _add_layer(
    b_dx, acc, b_x, b_a, ds_ptr, seed, bits_ptr, da_ptr, i_t, T, K, ds_stride, threshold,
    R: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, NEEDS_X: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer's share of a tile: b_dx [BT, BK] + keep ⊙ (dS A), and acc [R, BK] + dSᵀ (keep ⊙ x)."""
    i_r = tl.arange(0, R)
    k = tl.program_id(0) * BK
    m_t = (i_t < T)[:, None]
    b_ds = tl.load(ds_ptr + i_t[:, None] * ds_stride + i_r[None, :], mask=m_t, other=0.0)
    keep, b_kept = m_t, b_x
    if DROPOUT:
        if bits_ptr is not None:
            keep = _kept(bits_ptr, i_t, k, T, K, BK)
        else:
            keep = keep_tile(seed, i_t, k, K, threshold.to(tl.uint32), BK, ALIGNED)
        b_kept = tl.where(keep, b_x, 0.0)
    if NEEDS_X:
        part = tl.dot(b_ds, b_a, input_precision=PRECISION)
        if DROPOUT:
            part = tl.where(keep, part, 0.0)
        b_dx += part
    if da_ptr is not None:
        acc += tl.dot(tl.trans(b_ds), b_kept, input_precision=PRECISION)
    return b_dx, acc


@triton.jit
def _store_part(da_ptr, acc, b_active, i_k, K, R: tl.constexpr):
    if da_ptr is not None:
        i_da = (tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)[:, None]) * K + i_k[None, :]
        tl.store(da_ptr + i_da, acc, mask=(b_active > 0)[None, :])


@triton.jit(do_not_specialize=[f"{name}{i}" for name in ("parts", "stride", "n", "width", "columns") for i in range(8)])
def reduce_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7, m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, o4, o5, o6, o7,
    parts0, parts1, parts2, parts3, parts4, parts5, parts6, parts7,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7, n0, n1, n2, n3, n4, n5, n6, n7,
    width0, width1, width2, width3, width4, width5, width6, width7,
    columns0, columns1, columns2, columns3, columns4, columns5, columns6, columns7,
    scale0, scale1, scale2, scale3, scale4, scale5, scale6, scale7, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of the outputs program_id(1), program_id(0)'s BLOCK elements: o <- scale · Σ p in the order of its parts.

    Pointers p of parts, m of masks (or None) and o of outputs, p None where there is no more; `_add_parts` has the
    integers.
    """
    i = tl.program_id(1)
    if i == 0:
        _add_parts(p0, m0, o0, parts0, stride0, n0, width0, columns0, scale0, BLOCK, AT_ONCE)
    if p1 is not None:
        if i == 1:
            _add_parts(p1, m1, o1, parts1, stride1, n1, width1, columns1, scale1, BLOCK, AT_ONCE)
    if p2 is not None:
        if i == 2:
            _add_parts(p2, m2, o2, parts2, stride2, n2, width2, columns2, scale2, BLOCK, AT_ONCE)
    if p3 is not None:
        if i == 3:
            _add_parts(p3, m3, o3, parts3, stride3, n3, width3, columns3, scale3, BLOCK, AT_ONCE)
    if p4 is not None:
        if i == 4:
            _add_parts(p4, m4, o4, parts4, stride4, n4, width4, columns4, scale4, BLOCK, AT_ONCE)
    if p5 is not None:
        if i == 5:
            _add_parts(p5, m5, o5, parts5, stride5, n5, width5, columns5, scale5, BLOCK, AT_ONCE)
    if p6 is not None:
        if i == 6:
            _add_parts(p6, m6, o6, parts6, stride6, n6, width6, columns6, scale6, BLOCK, AT_ONCE)
    if p7 is not None:
        if i == 7:
            _add_parts(p7, m7, o7, parts7, stride7, n7, width7, columns7, scale7, BLOCK, AT_ONCE)


@triton.jit
def _add_parts(
    part_ptr, mask_ptr, out_ptr, parts, stride, n, width, columns, scale, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """One output. n: elements of a part that its rows take; stride: between parts, in units of 16 elements, so that the
    compiler knows that each begins where a load of 16 bytes can. Rows of parts have `width` elements, of the output
    `columns`; None where both are the same."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < n:
        i = first + tl.arange(0, BLOCK)
        i_out, m_out = i, i < n
        if width is not None:
            i_out = i // width * columns + i % width
            m_out = m_out & (i % width < columns)
        # A part has a multiple of 16 elements, so reading on to one stays inside it.
        bound = (n + 15) // 16 * 16
        b_mask = tl.full((BLOCK,), 1, tl.int32)
        if mask_ptr is not None:
            b_mask = tl.load(mask_ptr + i_out, mask=m_out, other=0).to(tl.int32)
        part_stride = stride.to(tl.int64) * 16
        p_part = part_ptr + i
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, parts, AT_ONCE):
            for j in tl.static_range(AT_ONCE):
                # As a bound: a scalar condition combined with a mask is no bool in the interpreter, which Triton 3.9
                # refuses.
                m_part = i < tl.where(part + j < parts, bound, 0)
                if mask_ptr is not None:
                    m_part = b_mask > tl.where(part + j < parts, 0, 1)
                total += tl.load(p_part + j * part_stride, mask=m_part, other=0.0).to(tl.float32)
            p_part += AT_ONCE * part_stride
        total = tl.where(b_mask > 0, total * scale, 0.0)
        tl.store(out_ptr + i_out, total.to(out_ptr.dtype.element_ty), mask=m_out)


def _places(entries: Sequence[tuple[Any, ...]], size: int) -> list[Any]:
    """A kernel's places for `size` layers or outputs: their first arguments, their second ones, ...; None where none is
    left."""
    rest = (None,) * (size - len(entries))
    return [place for each in zip(*entries) for place in (*each, *rest)]


def _filled(tensors: Sequence[Sequence[Any]], here: slice, size: int) -> list[Any]:
    """`_places` of the entries `here`, of their first arguments, their second ones, ..."""
    rest = (None,) * (size - here.stop + here.start)
    return [place for each in tensors for place in (*each[here], *rest)]


class _Plan(NamedTuple):
    """One launch, but for its tensors.

    Attributes:
        here: which of the layers, their pieces, or the outputs it serves.
        numbers: the kernel's last arguments.
    """

    launch: Launch
    grid: tuple[int, ...]
    here: slice
    numbers: tuple[Any, ...]


@functools.cache
def _steps_a_range(blocks: int, steps: int, at_work: int) -> int:
    """How many of `steps` down the tokens one program goes, of `blocks` columns of programs, so that all end soonest.

    at_work: programs that run together, on all multiprocessors; more take another round. A program's first loads and
    its part of the sum cost about as much as two steps. Of equals the longest, which leaves the fewest parts.
    """
    lengths = sorted({cdiv(steps, ranges) for ranges in range(1, min(steps, 64) + 1)}, reverse=True)
    return min(lengths, key=lambda length: cdiv(blocks * cdiv(steps, length), at_work) * (length + 2))


@functools.cache
def _output_tiles(size: int, aligned: bool, R: int) -> dict[str, int]:
    if size == 4:
        return {"BT": 16 if R > 32 else 32, "BN": 32, "num_warps": 4, "num_stages": 2}
    if R > 32:
        # 64 rows of dY spill up to 120 bytes on sm_80 and sm_100.
        return {"BT": 32, "BN": 128 if R == 64 else 64, "num_warps": 8, "num_stages": 3 if aligned and R == 64 else 2}
    if not aligned:
        # Rows that are no multiple of 16 elements are loaded in narrower pieces, whose addresses take registers.
        return {"BT": 32, "BN": 128, "num_warps": 8, "num_stages": 3}
    # Two tiles of dY of 32 KB under way: three do not fit beside B and S.
    return {"BT": 64, "BN": 256, "num_warps": 4 if R == 16 else 8, "num_stages": 3 if R == 16 else 2}


@functools.cache
def _input_tiles(size: int, columns: int, R: int, G: int, p: float) -> dict[str, int]:
    if is_slow(size, columns, p):
        # A bf16 tile as wide as R is 32 does not compile with Triton 3.6 ("PassManager::run failed").
        BK = 16 if size == 2 and R == 32 else 32
        return {"BT": 16, "BK": BK, "num_warps": 4, "num_stages": 2}
    if columns % 16 != 0:
        return {"BT": 32, "BK": 64 if R <= 32 else 32, "num_warps": 8, "num_stages": 3 if R <= 32 else 2}
    if R * G == 16:
        # At most 128 registers a thread, so four programs a multiprocessor, each with three tiles of x of 4 KB on their
        # way. 128 columns at 8 warps spill 8 bytes on sm_80.
        return {"BT": 32, "BK": 64, "num_warps": 4, "num_stages": 4}
    if R <= 32:
        # Wide, because each program reads dS anew: 96 bytes a token of q, k, v at rank 16, beside 256 of x. Three
        # layers of 32 ranks have no registers for it.
        return {"BT": 32, "BK": 64 if R * G > 64 else 128, "num_warps": 8, "num_stages": 4 if R * G != 64 else 3}
    # Two layers of 64 ranks spill up to 56 bytes at 64 columns on sm_80.
    narrow = R > 128 or (R, G) == (64, 2)
    return {"BT": 32, "BK": 32 if narrow else 64, "num_warps": 8, "num_stages": 3 if R * G == 64 else 2}


@functools.cache
def _output_launch(size: int, aligned: bool, R: int, how: str, *key: Any) -> Launch:
    """One Launch for each set of these and of what else `key` tells apart."""
    del key
    tiles = _output_tiles(size, aligned, R)
    return Launch(output_kernel, R=R, PRECISION=how, STAGES=tiles["num_stages"], **tiles)


@functools.cache
def _input_launch(
    size: int, K: int, R: int, G: int, p: float, how: str, needs_a: bool, masked: bool, adds: bool, *key: Any
) -> Launch:
    """One Launch for each set of these and of what else `key` tells apart."""
    del key
    switches = {"NEEDS_A": needs_a, "MASKED": masked, "ADDS": adds, **dropout_switches(p, K)}
    return Launch(input_kernel, G=G, R=R, PRECISION=how, **switches, **_input_tiles(size, K, R, G, p))


@functools.cache
def _reduce_launch(*key: Any) -> Launch:
    """One Launch for each `key`: the outputs' dtypes, their parts', which have masks, which rows of another width."""
    del key
    return Launch(reduce_kernel, BLOCK=BLOCK, AT_ONCE=AT_ONCE, num_warps=4)


@functools.lru_cache(PLANS)
def _plan_reduce(outs: tuple[tuple[Any, ...], ...]) -> list[_Plan]:
    """outs: of each its parts' shape and dtype, its own shape and dtype, whether it has a mask, and its scale."""
    plans = []
    for start in range(0, len(outs), REDUCED):
        here = slice(start, min(start + REDUCED, len(outs)))
        members, kinds, n = [], [], 0
        for parts, height, width, part_dtype, rows, columns, dtype, masked, scale in outs[here]:
            same = width == columns
            members.append((parts, height * width // 16, rows * width, *((None, None) if same else (width, columns)),
                            scale))  # fmt: skip
            kinds.append((part_dtype, masked, dtype, same))
            n = max(n, rows * width)
        numbers = tuple(_places(members, REDUCED))
        plans.append(_Plan(_reduce_launch(*kinds), (max(1, cdiv(n, BLOCK)), len(members)), here, numbers))
    return plans


def reduce(
    parts: Sequence[Tensor], outs: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Sequence[float]
) -> None:
    """Each out [rows, columns] <- scale · Σ parts in their order, 0 outside its mask; one launch for up to 8 outs.

    parts: contiguous [n, rows or more, columns or more], one of the two a multiple of 16 (a padded rank); read only
    where the mask is active. outs: contiguous. masks: contiguous uint8 of out's shape, or None.
    """
    kinds = [
        (*part.shape, part.dtype, *out.shape, out.dtype, mask is not None, float(scale))
        for part, out, mask, scale in zip(parts, outs, masks, scales)
    ]
    _add_up(_plan_reduce(tuple(kinds)), parts, outs, masks)


def _add_up(
    plans: list[_Plan], parts: Sequence[Tensor], outs: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    for plan in plans:
        plan.launch(plan.grid, *_filled((parts, masks, outs), plan.here, REDUCED), *plan.numbers)


class _OutputPlan(NamedTuple):
    """What `output_gradients` launches, but for its tensors.

    Attributes:
        width: ranks that a launch of the pass over dY takes; None: all.
        ds, db: shapes of each layer's parts; None where it needs no dB.
        passes, sums: over dY; of each dS, and then of each dB that is needed.
    """

    width: int | None
    ds: list[tuple[int, int, int]]
    db: list[tuple[int, int, int] | None]
    passes: list[_Plan]
    sums: list[_Plan]


@functools.lru_cache(PLANS)
def _plan_output(
    T: int, R: int, dtype: torch.dtype, how: str, p: float, layers: tuple[tuple[Any, ...], ...]
) -> _OutputPlan:
    """layers: of each dY's columns and stride; B's rank, stride and dtype; whether dB is needed, has empty stripes, has
    a mask; and its scaling."""
    # 256 ranks of one layer spill 17 kB on sm_80.
    width = _width(dtype.itemsize, R, 128)
    widths, strides, *_ = zip(*layers)
    aligned = all(size % 16 == 0 for size in (*widths, *strides))
    tiles = _output_tiles(dtype.itemsize, aligned, width)
    blocks, steps = [cdiv(N, tiles["BN"]) for N in widths], cdiv(T, tiles["BT"])
    t_split = _steps_a_range(sum(blocks), steps, PROGRAMS) * tiles["BT"]
    splits = cdiv(T, t_split)
    passes, pieces = [], [(r, *layer) for layer in layers for r in range(0, R, width)]
    for start in range(0, len(pieces), GROUP):
        here = slice(start, min(start + GROUP, len(pieces)))
        members = pieces[here]
        integers = [(N, max(0, min(rank - r, width)), stride, b_stride) for r, N, stride, rank, b_stride, *_ in members]
        kinds = [(b_dtype, striped, need) for *_, b_dtype, need, striped, _, _ in members]
        launch = _output_launch(dtype.itemsize, aligned, width, how, dtype, R, *integers, *kinds)
        grid = (max(1, *blocks), splits, len(members))
        passes.append(_Plan(launch, grid, here, (T, t_split, *_places(integers, GROUP), R)))
    ds = [(n, T, R) for n in blocks]
    db = [(splits, N, R) if need else None for N, _, _, _, _, need, *_ in layers]
    outs = [(n, T, R, FP32, T, R, dtype, False, layer[-1] / (1.0 - p)) for n, layer in zip(blocks, layers)]
    for N, _, rank, _, b_dtype, need, _, masked, scaling in layers:
        if need:
            outs.append((splits, N, R, FP32, N, rank, b_dtype, masked, scaling))
    return _OutputPlan(width if width < R else None, ds, db, passes, _plan_reduce(tuple(outs)))


def plan_output(
    dys: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    R: int,
    scalings: Sequence[float],
    p: float,
    masks: Sequence[Mask | None],
    needs_b: Sequence[bool],
) -> _OutputPlan:
    """How `run_output` launches what `output_gradients` computes of tensors like these; B with unit column stride."""
    # A scaling as a float: an integer would be compiled for, 1 as a constant of the kernel.
    of_layers = [
        (dy.shape[1], dy.stride(0), b.shape[1], b.stride(0), b.dtype, need,
         need and mask is not None and mask.stripes is not None, mask is not None, float(scaling))
        for dy, b, need, mask, scaling in zip(dys, lora_bs, needs_b, masks, scalings)
    ]  # fmt: skip
    return _plan_output(dys[0].shape[0], R, dys[0].dtype, precision(dys[0]), p, tuple(of_layers))


def run_output(
    plan: _OutputPlan,
    dys: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    columns: Sequence[Tensor],
    masks: Sequence[Mask | None],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`output_gradients`, by a plan that was made for tensors of these shapes, strides and dtypes."""
    one_dy = dys[0]
    ds_parts = [one_dy.new_empty(shape, dtype=FP32) for shape in plan.ds]
    db_parts = [None if shape is None else one_dy.new_empty(shape, dtype=FP32) for shape in plan.db]
    stripes = [None if mask is None or part is None else mask.stripes for mask, part in zip(masks, db_parts)]
    tensors: Sequence[Sequence[Any]] = (dys, lora_bs, columns, stripes, ds_parts, db_parts)
    if plan.width is not None:
        R, width = columns[0].shape[1], plan.width
        tensors = list(zip(*(_cut(of_layer, r, width) for of_layer in zip(*tensors) for r in range(0, R, width))))
    for one in plan.passes:
        one.launch(one.grid, *_filled(tensors, one.here, GROUP), *one.numbers)
    dss = [s.new_empty(s.shape) for s in columns]
    dbs = [None if part is None else b.new_empty(b.shape) for b, part in zip(lora_bs, db_parts)]
    parts, outs, active = ds_parts, [*dss], [None] * len(dss)
    for part, db, mask in zip(db_parts, dbs, masks):
        if part is not None:
            parts.append(part)
            outs.append(db)
            active.append(None if mask is None else mask.as_words())
    _add_up(plan.sums, parts, outs, active)
    return dss, dbs


def output_gradients(
    dys: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    columns: Sequence[Tensor],
    scalings: Sequence[float],
    p: float,
    masks: Sequence[Mask | None],
    needs_b: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """dS [T, R] = scaling / (1 − p) · dY B in dY's dtype, dB [N, r] = scaling · dYᵀ S in B's, of each layer of a group.

    dys: [T, N], unit column stride, T ≥ 1. columns: S [T, R] in dY's dtype, contiguous, with the factor 1 / (1 − p).
    dB is 0 outside its mask, and None where `needs_b` is False. Two launches for up to three layers.
    """
    lora_bs = [unit_rows(b) for b in lora_bs]
    plan = plan_output(dys, lora_bs, columns[0].shape[1], scalings, p, masks, needs_b)
    return run_output(plan, dys, lora_bs, columns, masks)


def _cut(layer: tuple[Any, ...], r: int, width: int) -> tuple[Any, ...]:
    """The layer's ranks r to r + width: of its B, S and parts."""
    dy, b, s, stripes, ds, db = layer
    ranks = slice(r, r + width)
    return dy, b[:, ranks], s[:, ranks], stripes, ds[:, :, ranks], None if db is None else db[:, :, ranks]


class _InputPlan(NamedTuple):
    """What `input_gradients` launches, but for its tensors.

    Attributes:
        pieces: of layers, which and their ranks, where not every layer is one piece.
        passes, sums: over x; of each piece of a dA.
        part: by pass, the shape of a piece's parts.
    """

    pieces: list[tuple[int, slice]] | None
    passes: list[_Plan]
    part: list[tuple[int, int, int]]
    sums: list[_Plan]


@functools.lru_cache(PLANS)
def _plan_input(
    T: int, K: int, stride: int, R: int, dtype: torch.dtype, how: str, p: float, reads_bits: bool, needs_x: bool,
    layers: tuple[tuple[Any, ...], ...],
) -> _InputPlan:  # fmt: skip
    """layers: of each A's rank, stride and dtype; whether dA is needed, has empty stripes, has a mask."""
    size = dtype.itemsize
    width, group = _width(size, R, 256), group_size(size, K, R, p)
    pieces = [
        (g, slice(r, r + width), min(rank - r, width), *rest)
        for g, (rank, *rest) in enumerate(layers)
        if needs_x or rest[2]
        for r in range(0, rank, width)
    ]
    passes, shapes, outs = [], [], []
    for start in range(0, len(pieces), group):
        here = slice(start, min(start + group, len(pieces)))
        members = pieces[here]
        tiles = _input_tiles(size, K, width, len(members), p)
        blocks, steps = cdiv(K, tiles["BK"]), cdiv(T, tiles["BT"])
        # One program of 8 warps fills a multiprocessor's registers; of 4 warps, which take fewer each, four do.
        t_split = _steps_a_range(blocks, steps, PROGRAMS // 2 * (4 if tiles["num_warps"] == 4 else 1)) * tiles["BT"]
        splits = cdiv(T, t_split)
        integers = [(rank, a_stride) for _, _, rank, a_stride, *_ in members]
        kinds = [(a_dtype, need and striped, need) for _, _, _, _, a_dtype, need, striped, _ in members]
        wanted = [striped for *_, need, striped, _ in members if need]
        launch = _input_launch(
            size, K, width, len(members), p, how, len(wanted) > 0, len(wanted) > 0 and all(wanted), start > 0,
            dtype, needs_x, reads_bits, stride, R, *integers, *kinds,
        )  # fmt: skip
        numbers = (T, t_split, K, stride, R, *_places(integers, GROUP), threshold_of(p))
        passes.append(_Plan(launch, (blocks, splits), here, numbers))
        shapes.append((splits, width, K))
        for _, _, rank, _, a_dtype, need, _, masked in members:
            if need:
                outs.append((splits, width, K, FP32, rank, K, a_dtype, masked, 1.0))
    whole = len(pieces) == len(layers) and width == R
    which = None if whole else [(g, ranks) for g, ranks, *_ in pieces]
    return _InputPlan(which, passes, shapes, _plan_reduce(tuple(outs)))


def plan_input(
    x: Tensor,
    factors: Sequence[Tensor],
    R: int,
    p: float,
    reads_bits: bool,
    masks: Sequence[Mask | None],
    needs_a: Sequence[bool],
    needs_x: bool,
) -> _InputPlan:
    """How `run_input` launches what `input_gradients` computes of tensors like these; A with unit column stride."""
    of_layers = [
        (a.shape[0], a.stride(0), a.dtype, need, mask is not None and mask.stripes is not None, mask is not None)
        for a, need, mask in zip(factors, needs_a, masks)
    ]
    T, K = x.shape
    return _plan_input(T, K, x.stride(0), R, x.dtype, precision(x), p, reads_bits, needs_x, tuple(of_layers))


def run_input(
    plan: _InputPlan,
    x: Tensor,
    factors: Sequence[Tensor],
    dss: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    masks: Sequence[Mask | None],
    needs_a: Sequence[bool],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`input_gradients`, by a plan that was made for tensors of these shapes, strides and dtypes."""
    dx = x.new_empty(x.shape) if needs_x else None
    das = [a.new_empty(a.shape) if need else None for a, need in zip(factors, needs_a)]
    no_tensors = (None,) * len(factors)
    if bits:
        seeds = no_tensors
        if x.shape[1] % 32 == 0:
            bits = [words.view(torch.int32) for words in bits]
    stripes = [None if mask is None or not need else mask.stripes for mask, need in zip(masks, needs_a)]
    active: Sequence[Tensor | None] = [None if mask is None else mask.as_words() for mask in masks]
    tensors = [factors, dss, seeds, bits or no_tensors, stripes, das]
    if plan.pieces is not None:
        if not plan.pieces:
            return dx, das
        *tensors, active = zip(*(_piece(g, ranks, [*tensors, active]) for g, ranks in plan.pieces))
    outs, parts = tensors.pop(), []
    for one, shape in zip(plan.passes, plan.part):
        made = [None if da is None else x.new_empty(shape, dtype=FP32) for da in outs[one.here]]
        one.launch(
            one.grid, x, dx, *_filled(tensors, one.here, GROUP), *made, *(None,) * (GROUP - len(made)), *one.numbers
        )
        parts += made
    if plan.sums:
        wanted = [(part, da, words) for part, da, words in zip(parts, outs, active) if part is not None]
        _add_up(plan.sums, *zip(*wanted))
    return dx, das


def input_gradients(
    x: Tensor,
    factors: Sequence[Tensor],
    dss: Sequence[Tensor],
    p: float,
    seeds: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    masks: Sequence[Mask | None],
    needs_a: Sequence[bool],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX [T, K] = Σ keep ⊙ (dS A) in x's dtype, and each dA [r, K] = dSᵀ (keep ⊙ x) in A's, of each layer of a group.

    x: [T, K], unit column stride, T ≥ 1. dss: dS [T, R] in x's dtype, contiguous, with the factor 1 / (1 − p).
    bits: each layer's dropout mask as `shrink` wrote it, or [], where it is drawn from the seed. dA is 0 outside its
    mask, and None where `needs_a` is False. Two launches for q, k and v up to rank 32; one where no dA is wanted.
    """
    factors = [unit_rows(a) for a in factors]
    plan = plan_input(x, factors, dss[0].shape[1], p, len(bits) > 0, masks, needs_a, needs_x)
    return run_input(plan, x, factors, dss, seeds, bits, masks, needs_a, needs_x)


def _piece(g: int, ranks: slice, tensors: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Some ranks of a layer: rows of its A, dA and mask, columns of its dS."""
    a, ds, seed, bits, stripes, da, words = (of_layers[g] for of_layers in tensors)
    da, words = (None if entry is None else entry[ranks] for entry in (da, words))
    return a[ranks], ds[:, ranks], seed, bits, stripes, da, words


def _width(size: int, R: int, most: int) -> int:
    """How many ranks of R a launch takes: at most `most`, in fp32 64, since a plain-core product holds all of its inner
    dimension in registers."""
    return min(R, 64 if size == 4 else most)


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernels' variants, as the launchers launch them on tensors without memory (launch.py).

    `every`: all dtypes, ranks, numbers of layers, dropouts, masks and wanted gradients in all combinations; else each
    value of each at least once, the widest ones together.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_all(*case)
    return variants


# x's dtype, the adapter's, rank, layers of one x, p, columns, empty stripes, gradients wanted of (x, A and B), bits
REPRESENTATIVE = [
    (BF16, FP32, 8, 3, 0.05, 4096, False, (True, True), True),
    (BF16, FP32, 16, 3, 0.05, 4096, True, (True, True), False),
    (BF16, FP32, 16, 1, 0.05, 4096, True, (True, True), False),
    (BF16, FP32, 16, 1, 0.05, 4096, False, (True, True), True),
    (BF16, FP32, 16, 2, 0.05, 4096, True, (True, True), False),
    (BF16, BF16, 32, 2, 0.0, 4096, True, (True, True), False),
    (BF16, FP32, 32, 3, 0.05, 4096, True, (True, True), False),
    (BF16, FP32, 64, 3, 0.05, 4096, False, (True, True), True),
    (BF16, BF16, 128, 1, 0.05, 4096, True, (False, True), False),
    (BF16, FP32, 128, 1, 0.05, 61, False, (True, True), False),
    (BF16, FP32, 256, 2, 0.05, 4096, True, (True, True), False),
    (BF16, FP32, 256, 1, 0.05, 4104, False, (True, True), True),
    (BF16, FP32, 16, 1, 0.05, 4104, True, (True, True), False),
    (FP16, FP32, 32, 2, 0.05, 61, True, (True, True), False),
    (FP16, FP16, 16, 1, 0.0, 4096, False, (True, False), False),
    (FP32, FP32, 16, 3, 0.05, 4096, True, (True, True), False),
    (FP32, FP32, 64, 3, 0.05, 61, True, (True, True), False),
    (FP32, FP32, 256, 1, 0.05, 4096, True, (True, True), True),
]


def _every_case():
    drops = [(0.0, 4096, False), *((0.05, columns, bits) for columns in (4096, 4104) for bits in (False, True))]
    for rank in (8, 16, 32, 64, 128, 256):
        for group in range(1, GROUP + 1):
            for (x, a), (p, columns, bits), striped in itertools.product(
                DTYPES, [*drops, (0.05, 61, False)], (False, True)
            ):
                for wanted in ((True, True), (True, False), (False, True)):
                    yield x, a, rank, group, p, columns, striped, wanted, bits


class _Striped(NamedTuple):
    """A mask without memory; stripes None where none is empty."""

    mask: Tensor
    stripes: Tensor | None

    def as_words(self) -> Tensor:
        return self.mask.view(torch.uint8)


def _launch_all(x_dtype, a_dtype, rank, group, p, columns, striped, wanted, bits, tokens=8192) -> None:
    """One group's backward, masked."""
    needs_x, needs_factors = wanted
    x, needs = meta(tokens, columns, dtype=x_dtype), [needs_factors] * group
    factors = [meta(rank, columns, dtype=a_dtype) for _ in range(group)]
    seeds = [meta(1, dtype=torch.int64) if p > 0 else None for _ in range(group)]
    drawn = [meta(tokens, columns // 8, dtype=torch.uint8) for _ in range(group)] if bits else []
    # Keys and values are narrower than queries, as where several heads share them.
    widths = [columns, *[columns // 4 if columns % 64 == 0 else columns] * (group - 1)]
    dys = [meta(tokens, N, dtype=x_dtype) for N in widths]
    lora_bs = [meta(N, rank, dtype=a_dtype) for N in widths]
    ss = [meta(tokens, padded_rank(factors), dtype=x_dtype) for _ in widths]
    masks_a, masks_b = (
        [_Striped(meta(*shape, dtype=torch.bool), meta(cdiv(n, 64), dtype=torch.uint8) if striped else None)
         for shape, n in shapes]
        for shapes in ([((rank, columns), columns)] * group, [((N, rank), N) for N in widths])
    )  # fmt: skip
    dss, _ = output_gradients(dys, lora_bs, ss, [2.0] * group, p, masks_b, needs)
    input_gradients(x, factors, dss, p, seeds, drawn, masks_a, needs, needs_x)
