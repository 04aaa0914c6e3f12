"""A dropout mask that is a function of (seed, element): drawn again in the backward, equal everywhere.

Element i of the mask, counted row-major, is kept where draw(i) ≥ round(p · 65536). draw(i) is the 16-bit lane
i % 8 of the 128-bit word Philox4x32-10(key = (seed low, seed high), counter = (block low, block high, 0, 0)),
block = i // 8; the low half of word 0 is lane 0. True = kept; the caller scales by 1 / (1 - p).

Trade-off: 16 bits a draw give p in steps of 1/65536 (0.05 becomes 0.050003) and eight elements per Philox
call, a quarter of the arithmetic of a 64-bit draw an element. A counter-based generator has no state, so any
tile of the mask can be made alone, by any kernel, and recomputation under checkpointing repeats it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from . import native
from .backend import choose, no_obstacle, old_gpu

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF
LANES = 8

# Philox blocks a step of the reference: its dozen int64 temporaries (256 KB each) then stay in the cache.
CHUNK = 1 << 15


def _multiply(multiplier: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low words of multiplier · values, both 32 bits, by halves so that int64 never wraps."""
    low = multiplier * (values & 0xFFFF)
    middle = multiplier * (values >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors of 32-bit words: 4 of the counter, 2 of the key; returns 4 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW32, (k1 + KEY_STEPS[1]) & LOW32
    return c0, c1, c2, c3


def threshold_of(p: float) -> int:
    """The draws below this one are dropped."""
    return round(p * 65536)


def dropout_mask_reference(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The specification, in int64 arithmetic on the seed's device."""
    n = math.prod(shape)
    blocks = -(-n // LANES)
    kept = torch.empty(blocks, LANES, dtype=torch.bool, device=seed.device)
    key = (seed.reshape(()) & LOW32, (seed.reshape(()) >> 32) & LOW32)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    for start in range(0, blocks, CHUNK):
        block = torch.arange(start, min(start + CHUNK, blocks), device=seed.device)
        words = philox4x32((block & LOW32, block >> 32, zero, zero), key)
        for i, word in enumerate(words):
            kept[start : start + CHUNK, 2 * i] = (word & 0xFFFF) >= threshold_of(p)
            kept[start : start + CHUNK, 2 * i + 1] = (word >> 16) >= threshold_of(p)
    # Cloned where the last block is not used up, or the result would hold on to more memory than its own.
    flat = kept.view(-1) if n == blocks * LANES else kept.view(-1)[:n].clone()
    return flat.view(list(shape))


def triton_obstacle(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this device's tensors; None when they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return old_gpu(device)
    from .triton_kernels import dropout as kernels

    if device.type == "cpu" and kernels.INTERPRETED:
        return None
    return f"no Triton kernel runs on {device.type} tensors; set TRITON_INTERPRET=1 to interpret it on the CPU"


def _backend(op: str, device: torch.device) -> str:
    obstacles = {
        "triton": partial(triton_obstacle, device),
        "native": partial(native.obstacle, device),
        "reference": no_obstacle,
    }
    # On the CPU the Triton kernel is only ever interpreted, for tests, so it has to be asked for.
    order = ("native", "reference", "triton") if device.type == "cpu" else ("triton", "native", "reference")
    return choose(op, {name: obstacles[name] for name in order})


# One op, opaque to torch.compile: the choice above is made when it runs.
@torch.library.custom_op("lorapar::dropout_mask", mutates_args=())
def _dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    backend = _backend("dropout_mask", seed.device)
    if backend == "triton":
        from .triton_kernels import dropout as kernels

        return kernels.dropout_mask(seed, shape, threshold_of(p))
    if backend == "native":
        kept = torch.empty(shape, dtype=torch.bool, device=seed.device)
        native.call("dropout_mask", seed.device, seed.data_ptr(), kept.numel(), threshold_of(p), kept.data_ptr())
        return kept
    return dropout_mask_reference(seed, shape, p)


@_dropout_mask.register_fake
def _dropout_mask_fake(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    return seed.new_empty(shape, dtype=torch.bool)


@_dropout_mask.register_vmap
def _dropout_mask_vmap(info, in_dims, seed: Tensor, shape: Sequence[int], p: float) -> tuple[Tensor, int]:
    return torch.stack([_dropout_mask(one, shape, p) for one in seed.movedim(in_dims[0], 0)]), 0


def dropout_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """A bool mask of `shape` on the seed's device, True = kept, with probability 1 - p to 1/65536.

    Args:
        seed: one int64 element; equal seeds give equal masks, element by element in row-major order, on every
            backend.
        p: in [0, 1). The caller scales what is kept by 1 / (1 - p).

    Raises ValueError on any other p or seed, and where LORAPAR_BACKEND forces a backend that cannot serve.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be one int64 element, got {seed.numel()} of {seed.dtype}")
    return _dropout_mask(seed, list(shape), p)


def is_batched(x: Tensor) -> bool:
    """Whether x stands for several tensors (is_grads_batched, vmap), and so has no memory of its own."""
    return is_legacy_batchedtensor(x) or is_batchedtensor(x)


def zero_dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x where `dropout_mask(seed, x.shape, p)` keeps, else 0; unscaled, a new contiguous tensor.

    On the CPU the native library draws and applies the mask in one pass. x: a floating dtype of 2, 4 or 8 bytes, on the
    seed's device.
    """
    if x.device.type == "cpu" and not is_batched(x) and _backend("zero_dropped", x.device) == "native":
        x = x.contiguous()
        zeroed = torch.empty_like(x)
        native.call("zero_dropped", x.device, x.data_ptr(), x.element_size(), x.numel(), seed.data_ptr(),
                    threshold_of(p), zeroed.data_ptr())  # fmt: skip
        return zeroed
    return torch.where(dropout_mask(seed, x.shape, p), x, 0.0)
