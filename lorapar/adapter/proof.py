"""The proof that a stage changed its active elements and nothing else, over the whole model and bit for bit.

With several processes each looks at what it holds: its parts of a sharded base, and the whole adapter, which has to be
the same in all of them. An adapter that is sharded as well is compared part by part.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..distributed import processes
from ..distributed.sharding import is_part, local, local_part
from .layers import lora_parameters

if TYPE_CHECKING:
    from ..partitioning.partition import Partition


log = logging.getLogger("lorapar")


class FrozenElementsChanged(RuntimeError):
    """A stage wrote something it was to leave alone, or moved nothing at all."""


class NothingMoved(FrozenElementsChanged):
    """Not one active element of a stage moved."""


class AdaptersDiffer(FrozenElementsChanged):
    """The processes of a launch have trained different adapters."""


@dataclass
class Snapshot:
    """What a model held before a stage: the LoRA elements themselves, and a checksum of every other parameter.

    Of a sharded parameter, the part of this process."""

    lora: dict[str, Tensor]
    others: dict[str, int]

    @classmethod
    def take(cls, model: nn.Module) -> "Snapshot":
        lora = {name: local(parameter.detach()).clone() for name, parameter in lora_parameters(model).items()}
        return cls(lora, checksums(model))


def checksums(model: nn.Module) -> dict[str, int]:
    """An order-sensitive 64-bit checksum of the bits of every parameter that is no adapter's, nor a head's that PEFT
    trains whole beside it (task_type SEQ_CLS and the like)."""
    trained = (".lora_", ".modules_to_save.")
    return {
        name: _checksum(local(p.detach()))
        for name, p in model.named_parameters()
        if not any(part in name for part in trained)
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
    """Compare the whole model, bit for bit, with what it was before `stage`; in a launch, every process calls it.

    Returns counts: "active" elements, those of them that "moved", "tensors" with active elements, and "tensors_moved",
    those in which one moved. A tensor without any is named in a warning: it never got a gradient, as an expert that no
    token reaches, or a tower without input. Raises FrozenElementsChanged where an inactive element or any other
    parameter differs, in whichever process, AdaptersDiffer where an adapter that each process holds whole is not the
    same in all of them, NothingMoved where not one active element moved.
    """
    parameters = lora_parameters(model)
    found = processes.gather(_compared(model, parameters, before, partition, stage))
    for rank, (fault, _) in enumerate(found):
        if fault:
            raise FrozenElementsChanged(f"{stage}: {fault}" + (f" in process {rank}" if len(found) > 1 else ""))
    if any(map(is_part, parameters.values())):
        counts = {name: [sum(of) for of in zip(*(found_[1][name] for found_ in found))] for name in parameters}
    else:
        counts = found[0][1]
        check_adapters_equal(model, stage)
    n_active, n_moved = (sum(of) for of in zip(*counts.values()))
    if n_moved == 0:
        raise NothingMoved(f"{stage}: not one of {n_active} active elements moved; nothing was trained")
    n_tensors = sum(active > 0 for active, _ in counts.values())
    still = [name for name, (active, moved) in counts.items() if active and not moved]
    if still:
        named = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        log.warning("%s: %d of %d tensors with active elements did not move, they never got a gradient: %s",
                    stage, len(still), n_tensors, named)  # fmt: skip
    return {"active": n_active, "moved": n_moved, "tensors": n_tensors, "tensors_moved": n_tensors - len(still)}


def check_adapters_equal(model: nn.Module, stage: str) -> None:
    """AdaptersDiffer where an adapter that each process of a launch holds whole is not the same in all, bit for bit."""
    if processes.count() == 1:
        return
    digest = hashlib.sha256()
    for parameter in lora_parameters(model).values():
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    digests = processes.gather(digest.hexdigest())
    for rank, theirs in enumerate(digests):
        if theirs != digests[0]:
            raise AdaptersDiffer(f"{stage}: the adapter of process {rank} is not that of process 0")


def _compared(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    before: Snapshot,
    partition: "Partition",
    stage: Literal["sft", "grpo"],
) -> tuple[str, dict[str, list[int]]]:
    """Of what this process holds: what changed that should not have, the active elements of each tensor and those of
    them that moved."""
    after, counts = checksums(model), {}
    for name, checksum in before.others.items():
        if after.get(name) != checksum:
            return f"{name} of the frozen base changed", {}
    for name, parameter in parameters.items():
        here = local(parameter.detach()).contiguous()
        mask = local_part(partition.active(stage)[name], parameter).to(here.device)
        changed = here.view(torch.uint8) != before.lora[name].to(here).view(torch.uint8)
        changed = changed.view(*here.shape, here.element_size()).any(-1)
        stray = int((changed & ~mask).sum())
        if stray:
            return f"{stray} inactive elements of {name} changed", {}
        counts[name] = [int(mask.sum()), int(changed.sum())]
    return "", counts
