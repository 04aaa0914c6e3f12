"""What a LoRA layer adds to the frozen one's forward (../lora_linear.py has the specification).

With S = drop(x) Aᵀ and keep the dropout mask, of up to 3 layers of one x (q, k, v; gate, up) a launch:

    shrink_kernel       S = (keep ⊙ x) Aᵀ / (1 − p), each layer with its own mask: reads x once
    expand_kernel       y = scaling · S Bᵀ + bias, to which the base's product is added (beta = 1): writes y once

Layouts: x [T, K], A [r, K], B [N, r], row strides free; S [T, R] contiguous, r padded to R = 16, 32, ... 256
(`padded_rank`); y [T, N] contiguous. Where T is so small that rows alone do not fill the GPU, columns of x are cut into
parts, and S comes as fp32 parts [splits, T, R], which the expand adds up in their order as it loads them.
The mask is a function of (seed, element) as in dropout.py, so nothing of x's size is kept for it, unless the backward
is to read it: then the shrink writes it down as bits, X / 16 in bf16. Deterministic: no atomics, one order of sums.

Trade-off: y is written here and read again by the product's epilogue, where a product of our own (lora_product.py)
opens its accumulator with the expand. But cuBLAS's product stays, its read of y hides behind its arithmetic, and no
clone of y is ever made. A and B are read as they are stored, fp32 or x's dtype, and rounded in registers.

Triton compiles a kernel again where an integer argument becomes 1 or a multiple of 16. That is switched off for what
differs between batches (numbers of tokens and parts, the dropout's threshold), so that no batch waits for the compiler
in the middle of training. Columns, ranks and strides stay specialised, since loads of 16 bytes depend on them.
"""

# Triton's annotations describe the language from outside and differ between its releases.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_and_store_tile, keep_tile, threshold_of
from .launch import BF16, DTYPES, FP16, FP32, Launch, Variant, cdiv, meta, precision, recording, unit_rows

# More layers of one x than this take several launches: three accumulators of 64 ranks still fit in registers.
GROUP = 3
# Launch at least this many programs: two for each multiprocessor of an H100 or H200 (132). Not tuned on a GPU.
PROGRAMS = 264
# The expand's programs: four for each multiprocessor, so that one's loads hide behind the others' stores, and no more
# than the rows and that need, since each program adds up its rows' parts of S again.
EXPAND_PROGRAMS = 528
# So many parts of S are loaded before the first is added: four round trips to L2 at once.
AHEAD = tl.constexpr(4)
# Kinds of launches, by number of tokens too, that are remembered; one that is not is planned anew, in 20 µs.
PLANS = 4096


@triton.jit(do_not_specialize=["T", "threshold"])
def shrink_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, seed0_ptr, seed1_ptr, seed2_ptr, s0_ptr, s1_ptr, s2_ptr,
    bits0_ptr, bits1_ptr, bits2_ptr, T, K, x_stride, rank0, rank1, rank2, a0_stride, a1_stride, a2_stride,
    k_split, threshold, scale,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s_ptr [splits, T, R] <- scale · (keep ⊙ x) Aᵀ of each of G layers, over columns k_split · program_id(1) onwards.

    bits_ptr: where a layer's keep is written as by `keep_and_store_tile`; None: nowhere.
    """
    i_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = i_t < T
    first = tl.program_id(1) * k_split
    # Loaded here, a seed's ten keys are scalars that the loop finds ready.
    seed0 = tl.load(seed0_ptr) if DROPOUT else 0
    seed1 = tl.load(seed1_ptr) if DROPOUT and G > 1 else 0
    seed2 = tl.load(seed2_ptr) if DROPOUT and G > 2 else 0
    acc0 = tl.zeros((BT, R), tl.float32)
    acc1 = tl.zeros((BT, R), tl.float32)
    acc2 = tl.zeros((BT, R), tl.float32)
    for k in range(first, tl.minimum(first + k_split, K), BK):
        m_x = m_t[:, None] & (k + tl.arange(0, BK) < K)[None, :]
        b_x = tl.load(x_ptr + i_t[:, None] * x_stride + (k + tl.arange(0, BK))[None, :], mask=m_x, other=0.0)
        acc0 = _add_product(
            acc0, b_x, a0_ptr, seed0, bits0_ptr, i_t, k, T, K, rank0, a0_stride, threshold, DROPOUT, ALIGNED, PRECISION
        )
        if G > 1:
            acc1 = _add_product(
                acc1, b_x, a1_ptr, seed1, bits1_ptr, i_t, k, T, K, rank1, a1_stride, threshold, DROPOUT, ALIGNED,
                PRECISION,
            )  # fmt: skip
        if G > 2:
            acc2 = _add_product(
                acc2, b_x, a2_ptr, seed2, bits2_ptr, i_t, k, T, K, rank2, a2_stride, threshold, DROPOUT, ALIGNED,
                PRECISION,
            )  # fmt: skip
    i_s = (tl.program_id(1).to(tl.int64) * T + i_t[:, None]) * R + tl.arange(0, R)[None, :]
    tl.store(s0_ptr + i_s, (acc0 * scale).to(s0_ptr.dtype.element_ty), mask=m_t[:, None])
    if G > 1:
        tl.store(s1_ptr + i_s, (acc1 * scale).to(s1_ptr.dtype.element_ty), mask=m_t[:, None])
    if G > 2:
        tl.store(s2_ptr + i_s, (acc2 * scale).to(s2_ptr.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def _add_product(
    acc, b_x, a_ptr, seed, bits_ptr, i_t, k, T, K, rank, a_stride, threshold,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BT, R] + (keep ⊙ x) Aᵀ over the columns of b_x [BT, BK], which begin at k."""
    BK: tl.constexpr = b_x.shape[1]
    i_r = tl.arange(0, acc.shape[1])
    i_k = k + tl.arange(0, BK)
    m_a = (i_r < rank)[None, :] & (i_k < K)[:, None]
    b_a = tl.load(a_ptr + i_r[None, :].to(tl.int64) * a_stride + i_k[:, None], mask=m_a, other=0.0)
    if DROPOUT:
        if bits_ptr is None:
            keep = keep_tile(seed, i_t, k, K, threshold.to(tl.uint32), BK, ALIGNED)
        else:
            keep = keep_and_store_tile(bits_ptr, seed, i_t, k, T, K, threshold.to(tl.uint32), BK)
        b_x = tl.where(keep, b_x, 0.0)
    return tl.dot(b_x, b_a.to(b_x.dtype), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "splits0", "splits1", "splits2", "groups"])
def expand_kernel(
    parts0_ptr, parts1_ptr, parts2_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr,
    bias0_ptr, bias1_ptr, bias2_ptr, base0_ptr, base1_ptr, base2_ptr, y0_ptr, y1_ptr, y2_ptr,
    T, splits0, splits1, splits2, N0, N1, N2, rank0, rank1, rank2, b0_stride, b1_stride, b2_stride,
    base0_stride, base1_stride, base2_stride, scaling0, scaling1, scaling2, n_group, groups,
    G: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_ptr [T, N] <- scaling · S Bᵀ (+ bias [N]) (+ base [T, N]) of each of G layers.

    parts_ptr: S in y's dtype where s_ptr is None; else parts of it, fp32 [splits, T, R], whose sum s_ptr takes. A
    program makes BT rows of n_group columns of layer program_id(1): where its N is smaller than another's, a layer's
    last programs have nothing to do. Neighbouring programs write neighbouring columns.
    """
    i_t = (tl.program_id(0) // groups).to(tl.int64) * BT + tl.arange(0, BT)
    first = (tl.program_id(0) % groups) * n_group
    layer = tl.program_id(1)
    if layer == 0:
        _write_columns(
            parts0_ptr, s0_ptr, b0_ptr, bias0_ptr, base0_ptr, y0_ptr, i_t, first, n_group, T, splits0, N0, rank0,
            b0_stride, base0_stride, scaling0, R, BT, BN, BR, PRECISION,
        )  # fmt: skip
    # Nested, because G is known when the kernel is compiled: there is no code for layers that are absent.
    if G > 1:  # noqa: SIM102
        if layer == 1:
            _write_columns(
                parts1_ptr, s1_ptr, b1_ptr, bias1_ptr, base1_ptr, y1_ptr, i_t, first, n_group, T, splits1, N1, rank1,
                b1_stride, base1_stride, scaling1, R, BT, BN, BR, PRECISION,
            )  # fmt: skip
    if G > 2:  # noqa: SIM102
        if layer == 2:
            _write_columns(
                parts2_ptr, s2_ptr, b2_ptr, bias2_ptr, base2_ptr, y2_ptr, i_t, first, n_group, T, splits2, N2, rank2,
                b2_stride, base2_stride, scaling2, R, BT, BN, BR, PRECISION,
            )  # fmt: skip


@triton.jit
def _write_columns(
    parts_ptr, s_ptr, b_ptr, bias_ptr, base_ptr, y_ptr, i_t, first, n_group, T, splits, N, rank,
    b_stride, base_stride, scaling,
    R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """expand_kernel, for one layer: columns first..first + n_group of the rows i_t."""
    m_t = i_t < T
    # S of up to BR ranks is loaded once, and held; wider ones come BR ranks at a time, again for each block of columns.
    b_s = tl.zeros((BT, BR), y_ptr.dtype.element_ty)
    if R == BR:
        b_s = _load_s(parts_ptr, s_ptr, i_t, 0, first == 0, T, splits, R, BR, b_s)
    for n in range(first, tl.minimum(first + n_group, N), BN):
        i_n = n + tl.arange(0, BN)
        m_n = i_n < N
        acc = tl.zeros((BT, BN), tl.float32)
        for r in tl.range(0, R, BR, num_stages=1):
            if R > BR:
                b_s = _load_s(parts_ptr, s_ptr, i_t, r, n == 0, T, splits, R, BR, b_s)
            i_r = r + tl.arange(0, BR)
            m_b = (i_r < rank)[:, None] & m_n[None, :]
            b_b = tl.load(b_ptr + i_n[None, :].to(tl.int64) * b_stride + i_r[:, None], mask=m_b, other=0.0)
            acc = tl.dot(b_s, b_b.to(b_s.dtype), acc, input_precision=PRECISION)
        acc *= scaling
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        m_y = m_t[:, None] & m_n[None, :]
        if base_ptr is not None:
            acc += tl.load(base_ptr + i_t[:, None] * base_stride + i_n[None, :], mask=m_y, other=0.0).to(tl.float32)
        tl.store(y_ptr + i_t[:, None] * N + i_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def _load_s(parts_ptr, s_ptr, i_t, r, stores, T, splits, R: tl.constexpr, BR: tl.constexpr, like):
    """Columns r..r + BR of S, like's shape and dtype: the sum of the parts, which is stored too if `stores`."""
    i_s = i_t[:, None] * R + r + tl.arange(0, BR)[None, :]
    m_s = (i_t < T)[:, None]
    if s_ptr is None:
        b_s = tl.load(parts_ptr + i_s, mask=m_s, other=0.0)
    else:
        total = tl.zeros(like.shape, tl.float32)
        for part in range(0, splits, AHEAD):
            for j in tl.static_range(AHEAD):
                # As a bound, because a scalar condition is no part of a mask in the interpreter of Triton 3.9.
                m_part = (i_t < tl.where(part + j < splits, T, 0))[:, None]
                total += tl.load(parts_ptr + (part + j) * T.to(tl.int64) * R + i_s, mask=m_part, other=0.0)
        b_s = total.to(like.dtype)
        if stores:
            tl.store(s_ptr + i_s, b_s, mask=m_s)
    return b_s


def padded_rank(factors: Sequence[Tensor]) -> int:
    """The width of a kernel's S and dS: the next power of two, at least 16, what a matrix instruction takes.

    factors: A [r, K] of each layer of the group.
    """
    return _padded(max([a.shape[0] for a in factors]))


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def is_slow(size: int, columns: int, p: float) -> bool:
    """fp32, whose IEEE products run on the plain cores with both operands in registers, or a Philox call an element.

    size: bytes an element of x; columns: x's.
    """
    return size == 4 or (p > 0.0 and columns % 8 != 0)


def group_size(size: int, columns: int, R: int, p: float) -> int:
    """How many layers of one x a launch serves (`is_slow`'s arguments)."""
    return 1 if is_slow(size, columns, p) or R > 64 or columns % 16 != 0 else GROUP if R <= 32 else 2


def splits_of(tiles: int, steps: int) -> int:
    """How many parts `steps` iterations go into: tiles · parts reaches PROGRAMS, with at least four steps a part."""
    return max(1, min(cdiv(PROGRAMS, tiles), steps // 4))


def dropout_switches(p: float, columns: int) -> dict[str, bool]:
    """The two switches of the kernels that draw a mask. (`threshold_of(p)` is their threshold.)

    A p that rounds to a threshold of 0 keeps all, which the draw's comparison has no room for: nothing is drawn.
    """
    return {"DROPOUT": threshold_of(p) > 0, "ALIGNED": columns % 8 == 0}


def _shrink_tiles(size: int, columns: int, R: int, G: int, p: float) -> dict[str, int]:
    if is_slow(size, columns, p):
        return {"BT": 16, "BK": 32, "num_warps": 8 if R > 64 else 4, "num_stages": 2}
    if p > 0.0 and G > 1 and R * G <= 64:
        # Each layer's draws hold registers: at 64 × 64 of 8 warps 177 a thread, so one program a multiprocessor. Of
        # these fit three (two where bits are kept), with three tiles of x of 4 KB each on their way: 36 KB a
        # multiprocessor, where 4.3 TB/s · 0.7 µs over 132 of them is 23 KB.
        return {"BT": 64, "BK": 32, "num_warps": 4, "num_stages": 4}
    wide = R * G > 64
    if wide and G == GROUP:
        # Three accumulators of 32 ranks: 32 × 64 spills up to 32 bytes on sm_80 and sm_90.
        return {"BT": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
    # Rows that are no multiple of 16 elements spill up to 252 bytes at 4 warps on sm_80, and in 64 columns of 128 ranks
    # 44 on sm_90; 64 columns of 256 ranks spill 224.
    warps = 8 if R * G > 32 or columns % 16 != 0 else 4
    width = 32 if R > 128 or (R == 128 and columns % 16 != 0) else 64
    return {"BT": 32 if wide else 64, "BK": width, "num_warps": warps, "num_stages": 2 if wide else 3}


def _expand_tiles(size: int, aligned: bool, R: int) -> dict[str, int]:
    """aligned: each y's rows are multiples of 16 elements."""
    if size == 4:
        # 64 ranks and more spill at 32 × 64: up to 64 bytes 16 at a time, 96 32 at a time; at 16 × 64 24.
        small = R > 32
        return {"BT": 16 if small else 32, "BN": 32 if small else 64, "BR": 16, "num_warps": 4, "num_stages": 2}
    if not aligned:
        # Its rows are stored in narrower pieces, whose addresses take registers: 128 × 128 spill 1.1 kB on sm_90.
        return {"BT": 64, "BN": 64, "BR": min(R, 32), "num_warps": 8, "num_stages": 2}
    # A row of a tile is 256 bytes, two whole lines. 128 rows share one B, which is read from L2 again for each tile: of
    # 16 ranks in fp32 a quarter of the bytes of y that it makes, half of them for 64 rows, and L2 would then be the
    # limit. Twice 8 warps fit on a multiprocessor. 128 rows of 128 ranks, 64 at a time, spill 8 bytes on sm_100, and 64
    # rows so 208 on sm_80.
    if R > 64:
        return {"BT": 64, "BN": 128, "BR": 32, "num_warps": 8, "num_stages": 2}
    return {"BT": 128, "BN": 128, "BR": R, "num_warps": 8, "num_stages": 2}


class _Plan(NamedTuple):
    """One launch of a group's, but for its tensors.

    Attributes:
        launch, grid: the kernel and its programs.
        here: which of the group's layers it serves.
        rest: None for each layer that is not there.
        shapes: of what is allocated for a layer (see where the plan is made).
        integers: the kernel's last arguments.
    """

    launch: Launch
    grid: tuple[int, ...]
    here: slice
    rest: tuple[None, ...]
    shapes: tuple[Any, ...]
    integers: tuple[Any, ...]


@functools.cache
def _shrink_launch(
    dtype: torch.dtype, K: int, R: int, G: int, p: float, precision: str, kind: tuple[Any, ...]
) -> Launch:
    """kind: what else makes a kernel of its own (dtypes, ranks, strides, which arguments are there)."""
    del kind
    switches = dropout_switches(p, K)
    return Launch(shrink_kernel, G=G, R=R, PRECISION=precision, **switches, **_shrink_tiles(dtype.itemsize, K, R, G, p))


@functools.lru_cache(PLANS)
def _plan_shrink(
    T: int, K: int, dtype: torch.dtype, x_stride: int, p: float, keep_bits: bool, precision: str,
    factors: tuple[tuple[int, int, torch.dtype], ...],
) -> list[_Plan]:  # fmt: skip
    """factors: rank, stride and dtype of each A. Shapes: of parts, their dtype, of bits."""
    R = _padded(max(rank for rank, *_ in factors))
    plans, group = [], group_size(dtype.itemsize, K, R, p)
    for start in range(0, len(factors), group):
        here = slice(start, min(start + group, len(factors)))
        ranks, strides, dtypes = zip(*factors[here])
        tiles = _shrink_tiles(dtype.itemsize, K, R, len(ranks), p)
        rows, steps = cdiv(T, tiles["BT"]), cdiv(K, tiles["BK"])
        k_split = cdiv(steps, splits_of(rows, steps)) * tiles["BK"]
        splits = cdiv(K, k_split)
        kind = (x_stride, *ranks, *strides, *dtypes, splits == 1, keep_bits)
        launch = _shrink_launch(dtype, K, R, len(ranks), p, precision, kind)
        rest = T, K, x_stride, *_three(ranks), *_three(strides), k_split, threshold_of(p), 1.0 / (1.0 - p)
        shapes = (splits, T, R), dtype if splits == 1 else FP32, (T, K // 8) if keep_bits else None
        plans.append(_Plan(launch, (rows, splits), here, (None,) * (GROUP - len(ranks)), shapes, rest))
    return plans


def plan_shrink(x: Tensor, factors: Sequence[Tensor], p: float, keep_bits: bool) -> list[_Plan]:
    """How `run_shrink` launches what `shrink` computes of tensors like these; factors with unit column stride."""
    T, K = x.shape
    keep_bits = keep_bits and K % 8 == 0 and threshold_of(p) > 0
    kinds = tuple([(a.shape[0], a.stride(0), a.dtype) for a in factors])
    return _plan_shrink(T, K, x.dtype, x.stride(0), p, keep_bits, precision(x), kinds)


def run_shrink(
    plans: list[_Plan], x: Tensor, factors: Sequence[Tensor], seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """`shrink`, by plans that were made for tensors of these shapes, strides and dtypes."""
    parts: list[Tensor] = []
    bits: list[Tensor] = []
    for plan in plans:
        members, rest = factors[plan.here], plan.rest
        shape, dtype, of_bits = plan.shapes
        sums = [x.new_empty(shape, dtype=dtype) for _ in members]
        masks = [] if of_bits is None else [x.new_empty(of_bits, dtype=torch.uint8) for _ in members]
        plan.launch(
            plan.grid, x, *members, *rest, *seeds[plan.here], *rest, *sums, *rest,
            *(masks or (None,) * len(members)), *rest, *plan.integers,
        )  # fmt: skip
        parts += sums
        bits += masks
    return parts, bits


def shrink(
    x: Tensor, factors: Sequence[Tensor], p: float, seeds: Sequence[Tensor | None], keep_bits: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """drop(x) Aᵀ for each A [r, K] of `factors`, x [T, K] with unit column stride, T ≥ 1.

    Returns the parts of each, [splits, T, R], whose sum it is: one in x's dtype, or several in fp32; and with keep_bits
    each layer's dropout mask, uint8 [T, K / 8] (`kept_bits` reads it). There are no bits where K is no multiple of 8,
    nor where p rounds to a threshold of 0.
    """
    factors = [unit_rows(a) for a in factors]
    return run_shrink(plan_shrink(x, factors, p, keep_bits), x, factors, seeds)


@functools.cache
def _expand_launch(dtype: torch.dtype, aligned: bool, R: int, G: int, precision: str, kind: tuple[Any, ...]) -> Launch:
    """kind: as in `_shrink_launch`."""
    del kind
    return Launch(expand_kernel, G=G, R=R, PRECISION=precision, **_expand_tiles(dtype.itemsize, aligned, R))


@functools.lru_cache(PLANS)
def _plan_expand(
    T: int, R: int, dtype: torch.dtype, precision: str, layers: tuple[tuple[Any, ...], ...], leading: tuple[int, ...]
) -> list[_Plan]:
    """layers: of each, its parts, B's shape, stride and dtype, the bias's dtype, the base's stride and dtype, and its
    scaling. Shapes: of each y; of each S, None where it has one part."""
    plans = []
    for start in range(0, len(layers), GROUP):
        here = slice(start, min(start + GROUP, len(layers)))
        splits, shapes, strides, dtypes, of_biases, base_strides, of_bases, scalings = zip(*layers[here])
        widths, ranks = zip(*shapes)
        G, widest = len(widths), max(widths)
        aligned = all(N % 16 == 0 for N in widths)
        tiles = _expand_tiles(dtype.itemsize, aligned, R)
        rows, steps = cdiv(T, tiles["BT"]), cdiv(widest, tiles["BN"])
        n_group = cdiv(steps, min(steps, cdiv(EXPAND_PROGRAMS, rows * G))) * tiles["BN"]
        groups = cdiv(widest, n_group)
        whole = tuple(n == 1 for n in splits)
        kind = (*widths, *ranks, *strides, *base_strides, *dtypes, *whole, *of_biases, *of_bases)
        launch = _expand_launch(dtype, aligned, R, G, precision, kind)
        rest = (
            T, *_three(splits), *_three(widths), *_three(ranks), *_three(strides), *_three(base_strides),
            *_three([float(scaling) for scaling in scalings]), n_group, groups,
        )  # fmt: skip
        shapes = [(*leading, N) for N in widths], [None if n == 1 else (T, R) for n in splits]
        plans.append(_Plan(launch, (rows * groups, G), here, (None,) * (GROUP - G), shapes, rest))
    return plans


def plan_expand(
    parts: list[tuple[int, int, int]],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    dtype: torch.dtype,
    how: str,
    leading: Sequence[int],
) -> list[_Plan]:
    """How `run_expand` launches what `expand` computes of tensors like these.

    parts: their shapes. lora_bs and bases have unit column stride, biases are contiguous. how: `precision`.
    """
    _, T, R = parts[0]
    kinds = tuple(
        [
            (shape[0], b.shape, b.stride(0), b.dtype, None if bias is None else bias.dtype,
             None if base is None else base.stride(0), None if base is None else base.dtype, scaling)
            for shape, b, bias, base, scaling in zip(parts, lora_bs, biases, bases, scalings)
        ]
    )  # fmt: skip
    return _plan_expand(T, R, dtype, how, kinds, tuple(leading))


def run_expand(
    plans: list[_Plan],
    parts: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """`expand`, by plans that were made for tensors of these shapes, strides and dtypes."""
    ys: list[Tensor] = []
    columns: list[Tensor] = []
    for plan in plans:
        here, rest = plan.here, plan.rest
        sums, members = parts[here], lora_bs[here]
        of_ys, of_columns = plan.shapes
        made = [part.new_empty(shape, dtype=dtype) for part, shape in zip(sums, of_ys)]
        # One part is S itself.
        stored = [
            None if shape is None else part.new_empty(shape, dtype=dtype) for part, shape in zip(sums, of_columns)
        ]
        plan.launch(
            plan.grid, *sums, *rest, *stored, *rest, *members, *rest, *biases[here], *rest, *bases[here], *rest,
            *made, *rest, *plan.integers,
        )  # fmt: skip
        ys += made
        columns += [part[0] if s is None else s for part, s in zip(sums, stored)]
    return ys, columns


def expand(
    parts: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    dtype: torch.dtype,
    leading: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """y [T, N] = scaling · S Bᵀ + bias [N] + base [T, N] of each layer, and S [T, R], both in `dtype`, x's.

    parts: as `shrink` returned them; B [N, r]. A base is read, never changed. leading: what y has in place of [T].
    """
    lora_bs = [unit_rows(b) for b in lora_bs]
    bases = [None if base is None else unit_rows(base) for base in bases]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    leading = parts[0].shape[1:2] if leading is None else leading
    how = precision(parts[0]) if dtype == FP32 else "ieee"
    shapes = [tuple(part.shape) for part in parts]
    plans = plan_expand(shapes, lora_bs, scalings, biases, bases, dtype, how, leading)  # type: ignore[arg-type]
    return run_expand(plans, parts, lora_bs, biases, bases, dtype)


def _three(entries: Sequence[Any]) -> tuple[Any, Any, Any]:
    """A kernel's three arguments, None for the layers that are not there."""
    return (*entries, *(None,) * (GROUP - len(entries)))  # pyright: ignore[reportReturnType]


def ahead_of_time(every: bool = False) -> list[Variant]:
    """The kernels' variants, as the launchers launch them on tensors without memory (launch.py).

    `every`: all dtypes, ranks, numbers of layers, dropouts and what else is added to y, in all combinations; else each
    value of each at least once, the widest ones together.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_all(*case)
    return variants


# x's dtype, the adapter's, rank, layers of one x, p, columns, bits kept, what y has besides ("", "bias", "base")
REPRESENTATIVE = [
    (BF16, FP32, 16, 1, 0.05, 4096, True, ""),
    (BF16, FP32, 16, 3, 0.05, 4096, False, "bias"),
    (BF16, FP32, 8, 3, 0.05, 4096, True, "base"),
    (BF16, BF16, 32, 2, 0.0, 4096, False, "base"),
    (BF16, FP32, 32, 3, 0.05, 4096, True, "bias"),
    (BF16, FP32, 32, 1, 0.05, 61, False, "base"),
    (BF16, FP32, 128, 1, 0.05, 61, False, "bias"),
    (BF16, FP32, 64, 3, 0.05, 4096, True, "bias"),
    (BF16, BF16, 128, 1, 0.05, 4096, False, "base"),
    (BF16, FP32, 256, 1, 0.05, 4096, True, "bias"),
    (BF16, FP32, 256, 1, 0.0, 4104, False, "base"),
    (BF16, FP32, 8, 1, 0.05, 4104, True, "bias"),
    (BF16, FP32, 16, 2, 0.05, 4096, True, ""),
    (FP16, FP32, 8, 2, 0.05, 61, False, "bias"),
    (FP16, FP16, 16, 1, 0.0, 4096, False, "base"),
    (FP32, FP32, 16, 3, 0.05, 4096, True, "bias"),
    (FP32, FP32, 64, 3, 0.05, 61, False, "base"),
    (FP32, FP32, 256, 1, 0.05, 4096, False, "bias"),
]


def _every_case():
    drops = [(0.0, 4096, False), *((0.05, columns, bits) for columns in (4096, 4104, 61) for bits in (False, True))]
    for rank in (8, 16, 32, 64, 128, 256):
        for group in range(1, GROUP + 1):
            for (x, a), (p, columns, bits), more in itertools.product(DTYPES, drops, ("", "bias", "base")):
                yield x, a, rank, group, p, columns, bits, more


def _launch_all(x_dtype, a_dtype, rank, group, p, columns, bits, more, tokens=None) -> None:
    """One group's launches, of so many tokens; None: so few that x is cut into parts, and so many that it is not."""
    for T in (512, 65536) if tokens is None else (tokens,):
        x = meta(T, columns, dtype=x_dtype)
        factors = [meta(rank, columns, dtype=a_dtype) for _ in range(group)]
        seeds = [meta(1, dtype=torch.int64) if p > 0 else None for _ in range(group)]
        parts, _ = shrink(x, factors, p, seeds, bits)
        # Keys and values are narrower than queries, as where several heads share them.
        widths = [columns, *[columns // 4 if columns % 64 == 0 else columns] * (group - 1)]
        factors = [meta(N, rank, dtype=a_dtype) for N in widths]
        biases = [meta(N, dtype=x_dtype) if more == "bias" else None for N in widths]
        bases = [meta(T, N, dtype=x_dtype) if more == "base" else None for N in widths]
        expand(parts, factors, [2.0] * group, biases, bases, x_dtype)
