"""What a call of the LoRA layer is given, one `LoraLayer` for each layer of its x (lora_linear.py computes them)."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from .tiles import TiledMask


class FrozenWeight(Protocol):
    """A base's weight that is made where a product needs it, such as one that is held in 4 bits."""

    shape: torch.Size
    device: torch.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`; the next call of any weight's `dense` may write over it."""
        ...


class LoraLayer(NamedTuple):
    """One layer of a call.

    Attributes:
        weight, bias: the frozen base, [out, in] and [out]; weight None: the base is opaque.
        y: what an opaque base returned for x, [..., out].
        lora_a, lora_b, scaling: the adapter, [r, in] and [out, r].
        mask_a, mask_b: what of the factors is active; None: all of it.
        seed: of the dropout mask; None without dropout.
    """

    weight: Tensor | FrozenWeight | None
    bias: Tensor | None
    y: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    mask_a: TiledMask | None = None
    mask_b: TiledMask | None = None
    seed: Tensor | None = None


def as_rows(x: Tensor) -> Tensor:
    """[..., n] -> [T, n] with unit column stride."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def dense_weight(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The base's weight as a tensor [out, in]."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def is_recorded() -> bool:
    """Whether selective checkpointing sees torch's operations, and may keep what one returns.

    What it kept may not be changed in place, and a recompute puts it in the place of the operation.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    modes = _CachedTorchDispatchMode, _CachingTorchDispatchMode
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())
