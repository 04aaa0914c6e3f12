"""What a LoRA layer adds to the frozen one's forward (../lora_linear.py has the specification).

    shrink_kernel       S = drop(x) Aᵀ of up to 3 layers of one x (q, k, v), each with its own mask: reads x once
    expand_kernel       y = scaling · S Bᵀ + bias, which the base's product then adds to:            writes y once
"""

from collections.abc import Sequence

from torch import Tensor

from ..dropout import threshold_of
from .launch import cdiv

# More layers of one x than this take several launches: three accumulators of 64 ranks still fit in registers.
GROUP = 3
# Launch at least this many programs: two for each multiprocessor of an H100 or H200 (132). Not tuned on a GPU.
PROGRAMS = 264


def padded_rank(factors: Sequence[Tensor]) -> int:
    """The width of a kernel's S and dS: the next power of two, at least 16, what a matrix instruction takes.

    factors: A [r, K] of each layer of the group.
    """
    return max(16, 1 << (max(a.shape[0] for a in factors) - 1).bit_length())


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
    """The two switches of the kernels that draw a mask. (`dropout.threshold_of(p)` is their threshold.)

    A p that rounds to a threshold of 0 keeps all, which the draw's comparison has no room for: nothing is drawn.
    """
    return {"DROPOUT": threshold_of(p) > 0, "ALIGNED": columns % 8 == 0}
