"""lora_passes.py's Triton kernels: the passes over x and dY that a LoRA layer adds to the frozen one.

With S = drop(x) Aᵀ, dS = s · dY B and keep the dropout mask, scaled by 1 / (1 − p) where it is applied:

    shrink_kernel       S of up to 3 layers of one x (q, k, v), each with its own mask:  reads x once
    output_kernel       dS and dB = s · dYᵀ S:                                           reads dY once
    input_kernel        dx += Σ keep ⊙ (dS A) and dA = dSᵀ (keep ⊙ x), up to 3 layers:   reads x, reads and writes dx
    reduce_kernel       adds up the partial sums of the three in a fixed order, and masks

Layouts: x, dx [T, K], dY [T, N], A [r, K], B [N, r], row strides free; S and dS [T, R] contiguous, r padded to R = 16,
32, ... 256 (`padded_rank`); partial sums fp32. The mask is a function of (seed, element) as in dropout.py, so nothing
of x's size is kept for it. Sums go in the same order whatever runs beside: deterministic.

Trade-off: with cuBLAS's product the expand s · S Bᵀ is a second one onto its output (beta = 1), and dx is read and
written once more here. lora_product_triton.py's product carries both; `input_gradients` without dx then makes dA alone.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..lora_passes_kernels import input_kernel, output_kernel, reduce_kernel, shrink_kernel
from .launch import Variant, launch, recording

# More layers of one x than this go in several launches: three accumulators of 64 ranks still fit in registers.
GROUP = 3
# Programs wanted at least: two for each of the 132 multiprocessors of an H100 or H200. Untuned: no GPU was at hand.
PROGRAMS = 264


def padded_rank(factors: Sequence[Tensor]) -> int:
    """The width of a kernel's S and dS: the next power of two, at least 16, what a matrix instruction takes."""
    return max(16, 1 << (max(a.shape[0] for a in factors) - 1).bit_length())


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def _rows(factor: Tensor) -> Tensor:
    """The factor with unit column stride, which the kernels take for granted."""
    return factor if factor.stride(1) == 1 else factor.contiguous()


def _bits(mask: Tensor | None) -> Tensor | None:
    """The mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def precision(x: Tensor) -> str:
    """How products of tensors like x are made: IEEE, or TF32 for fp32 where the caller allows it for torch's own.

    torch's older switches (`allow_tf32`, `set_float32_matmul_precision`) set this one too; asking the older one raises
    once this one has been set.
    """
    if x.element_size() != 4:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
        members, drawn = list(map(_rows, factors[start : start + group])), seeds[start : start + group]
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


def output_gradients(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, p: float, mask: Tensor | None, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS [T, R] = scaling / (1 - p) · dY B in dY's dtype, and dB [N, r] = scaling · dYᵀ S in B's, 0 outside `mask`."""
    (T, N), R = dy.shape, s.shape[1]
    tiles = _output_tiles(dy, R)
    rows, steps = cdiv(T, tiles["BT"]), cdiv(N, tiles["BN"])
    n_split = cdiv(steps, _splits(rows, steps)) * tiles["BN"]
    splits = cdiv(N, n_split)
    ds_part = torch.empty((splits, T, R), dtype=dy.dtype if splits == 1 else torch.float32, device=dy.device)
    db_part = torch.empty((rows, N, R) if needs_b else (0,), dtype=torch.float32, device=dy.device)
    bits, factor = _bits(mask), _rows(b)
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
        members = tuple(_rows(factors[g][rows]) for g, rows in here)
        actives = tuple(mask if mask is None else mask[rows] for mask, rows in ((active[g], rows) for g, rows in here))
        wanted = tuple(needs_a[g] for g, _ in here)
        tiles = _input_tiles(x, width, len(here), p)
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
    """The kernels' variants, as the launchers launch them on tensors without memory (ahead_of_time.py).

    `every`: all dtypes, ranks, numbers of layers, dropouts, masks and wanted gradients in all combinations; else each
    value of each at least once, the widest ones together.
    """
    with recording() as variants:
        for case in _every_case() if every else REPRESENTATIVE:
            _launch_all(*case)
    return variants


# x's dtype, the adapter's, rank, layers of one x, p, columns, masked, gradients wanted of (x, A and B)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
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
    dtypes = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
    drops = [(0.0, 4096), (0.05, 4096), (0.05, 4104), (0.05, 61)]
    for rank in (16, 32, 64, 128, 256):
        for group in range(1, GROUP + 1):
            for (x, a), (p, columns), masked in itertools.product(dtypes, drops, (False, True)):
                for wanted in ((True, True), (True, False), (False, True)):
                    yield x, a, rank, group, p, columns, masked, wanted


def _launch_all(x_dtype, a_dtype, rank, group, p, columns, masked, wanted, tokens=None) -> None:
    """One layer's passes, of so many tokens; None: so many that they are cut into partial sums, and so few that not."""

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

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
