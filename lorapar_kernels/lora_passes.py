"""The three passes that a LoRA layer adds to the frozen one, in plain PyTorch: `shrink`, `output_gradients`,
`input_gradients` (the maths is in lora_linear.py).

The specification, and the path on every device; lora_passes_triton.py has kernels of the same names and arguments, and
`passes_for` chooses. Shapes: x [T, in], dy [T, out], A [r, in], B [out, r], S and dS [T, r] or wider (a kernel's are
padded), masks bool of A's and B's shape.

Trade-off: a product of r rows is made for each layer of one x, where the kernel reads x once for all of them.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from . import native
from .backend import always, choose
from .dropout import triton_obstacle, zero_dropped

MAX_RANK = 256  # of the Triton kernels


def as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [T, n] with unit column stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def kept(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ⊙ x: x with the seeded dropout applied and nothing scaled."""
    if p == 0.0:
        return x
    assert seed is not None  # checked by `check_arguments`
    return zero_dropped(x, seed, p)


def thin(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right [m, n] of left [k, m] and right [k, n], multiplied with the smaller of m and n as the rows.

    That is 1.6 to 4.6 times as fast in fp32 on a CPU (r = 8, 265 and 408 tokens, torch 2.13); bf16 is the same.
    """
    return left.t() @ right if left.shape[1] <= right.shape[1] else (right.t() @ left).t()


def masked(gradient: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient in its parameter's dtype, contiguous, exactly zero (also where it was NaN) outside the mask."""
    gradient = gradient.to(dtype).contiguous()
    return gradient if mask is None else gradient.masked_fill_(~mask, 0.0)


def shrink(x: Tensor, factors: list[Tensor], p: float, seeds: Sequence[Tensor | None]) -> list[Tensor]:
    """S = drop(x) Aᵀ [T, r] of x [T, in] for each A of `factors`, in x's dtype."""
    # r-sided as in `thin`, but always, so that S has the same strides for any T.
    columns = [(a.to(x.dtype) @ kept(x, p, seed).t()).t() for a, seed in zip(factors, seeds)]
    return columns if p == 0.0 else [s.mul_(1.0 / (1.0 - p)) for s in columns]


def output_gradients(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, p: float, mask: Tensor | None, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = scaling / (1 − p) · dY B [T, r] in dY's dtype, and dB = mask ⊙ scaling · dYᵀ S in B's."""
    ds = thin(dy.t(), b.to(dy.dtype)).mul_(scaling / (1.0 - p))
    return ds, masked(thin(dy, s).mul_(scaling), mask, b.dtype) if needs_b else None


def input_gradients(
    x: Tensor,
    dx: Tensor | None,
    factors: list[Tensor],
    dss: list[Tensor],
    p: float,
    seeds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    needs_a: Sequence[bool],
) -> list[Tensor | None]:
    """Add Σ keep ⊙ (dS A) to dx [T, in] in place; dA = mask ⊙ dSᵀ (keep ⊙ x) in A's dtype for each A that needs it."""
    if dx is not None:
        for a, ds, seed in zip(factors, dss, seeds):
            if p == 0.0:
                dx.addmm_(ds, a.to(x.dtype))
            else:
                dx.add_(kept(ds @ a.to(x.dtype), p, seed))
    return [
        masked(ds.t() @ kept(x, p, seed), mask, a.dtype) if need else None
        for a, ds, seed, mask, need in zip(factors, dss, seeds, masks, needs_a)
    ]


def expand(y: Tensor, s: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling · S Bᵀ to y [T, out] in place; S [T, r or more]: a kernel's S is padded."""
    y.addmm_(s[:, : b.shape[1]], b.to(y.dtype).t(), alpha=scaling)


def triton_obstacle_of(x: Tensor, rank: int) -> str | None:
    """Why the Triton kernels cannot serve x and this rank; None when they can."""
    if x.dtype == torch.float64:
        return "the kernels add in fp32, and x is float64"
    if rank > MAX_RANK:
        return f"the kernels hold at most rank {MAX_RANK}, got {rank}"
    return triton_obstacle(x.device)


def passes_for(op: str, x: Tensor, factors: Sequence[Tensor]) -> ModuleType:
    """The module whose shrink, output_gradients and input_gradients serve this call."""
    rank = max(a.shape[0] for a in factors)
    obstacles: dict[str, Callable[[], str | None]] = {
        "triton": partial(triton_obstacle_of, x, rank),
        # torch's own products around csrc's dropout (dropout.py), or around the reference's.
        "native": partial(native.obstacle, x.device),
        "reference": always,
    }
    order = ("native", "reference", "triton") if x.device.type == "cpu" else ("triton", "reference")
    name = choose(op, {backend: obstacles[backend] for backend in order})
    # Of no tokens there is nothing to launch.
    if name == "triton" and x.numel() > 0:
        from .triton_kernels import lora_passes as lora_passes_triton

        return lora_passes_triton
    return sys.modules[__name__]
