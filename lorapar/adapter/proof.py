"""The proof that a stage changed its active elements and nothing else, over the whole model and bit for bit."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .layers import lora_parameters

if TYPE_CHECKING:
    from ..partitioning.partition import Partition


log = logging.getLogger("lorapar")


class FrozenElementsChanged(RuntimeError):
    """A stage wrote something it was to leave alone, or moved nothing at all."""


class NothingMoved(FrozenElementsChanged):
    """Not one active element of a stage moved."""


@dataclass
class Snapshot:
    """What a model held before a stage: the LoRA elements themselves, and a checksum of every other parameter."""

    lora: dict[str, Tensor]
    others: dict[str, int]

    @classmethod
    def take(cls, model: nn.Module) -> "Snapshot":
        lora = {name: parameter.detach().clone() for name, parameter in lora_parameters(model).items()}
        return cls(lora, checksums(model))


def checksums(model: nn.Module) -> dict[str, int]:
    """An order-sensitive 64-bit checksum of the bits of every parameter that is no adapter's, nor a head's that PEFT
    trains whole beside it (task_type SEQ_CLS and the like)."""
    trained = (".lora_", ".modules_to_save.")
    return {
        name: _checksum(p.detach()) for name, p in model.named_parameters() if not any(part in name for part in trained)
    }


def _checksum(tensor: Tensor) -> int:
    total = 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.reshape(-1).view(kinds[tensor.element_size()])
    # In chunks, so that the int64 copies stay small beside the model.
    for number, chunk in enumerate(flat.split(1 << 22)):
        weights = torch.arange(1, chunk.numel() + 1, device=chunk.device) * 2654435761 + number
        total += int((chunk.long() * weights).sum())
    return total % (1 << 64)


def verify(
    model: nn.Module, before: Snapshot, partition: "Partition", stage: Literal["sft", "grpo"]
) -> dict[str, float]:
    """Compare the whole model, bit for bit, with what it was before `stage`.

    Returns counts: "active" elements, those of them that "moved", "tensors" with active elements, and "tensors_moved",
    those in which one moved. A tensor without any is named in a warning: it never got a gradient, as an expert that no
    token reaches, or a tower without input. Raises FrozenElementsChanged where an inactive element or any other
    parameter differs, NothingMoved where not one active element moved.
    """
    after = checksums(model)
    for name, checksum in before.others.items():
        if after.get(name) != checksum:
            raise FrozenElementsChanged(f"{stage}: {name} of the frozen base changed")
    n_active = n_moved = n_tensors = 0
    still: list[str] = []
    for name, parameter in lora_parameters(model).items():
        mask = partition.active(stage)[name].to(parameter.device)
        changed = parameter.detach().view(torch.uint8) != before.lora[name].to(parameter).view(torch.uint8)
        changed = changed.view(*parameter.shape, -1).any(-1)
        stray = int((changed & ~mask).sum())
        if stray:
            raise FrozenElementsChanged(f"{stage}: {stray} inactive elements of {name} changed")
        active, moved = int(mask.sum()), int(changed.sum())
        n_active, n_moved, n_tensors = n_active + active, n_moved + moved, n_tensors + (active > 0)
        if active and not moved:
            still.append(name)
    if n_moved == 0:
        raise NothingMoved(f"{stage}: not one of {n_active} active elements moved; nothing was trained")
    if still:
        named = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        log.warning("%s: %d of %d tensors with active elements did not move, they never got a gradient: %s",
                    stage, len(still), n_tensors, named)  # fmt: skip
    return {"active": n_active, "moved": n_moved, "tensors": n_tensors, "tensors_moved": n_tensors - len(still)}
