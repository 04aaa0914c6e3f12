"""The running sums of a scoring pass: readable at any time, kept in a file between batches, stable or not yet.

Stable: the kept set at θ (what the partition is made of) after n examples and after 2n have a Jaccard index of at least
the level asked for. Each look is after twice as many examples as the one before, so that it compares with as much that
is new as it had; looks at a fixed distance would agree ever better with nothing learnt.

In a launch each process has sums of the batches that it took. A look, and the end, add them up over the processes. Each
process keeps a file of its own; a file says which batches of the plan are in it, so a pass goes on in any number of
processes.
"""

import glob
import logging
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk

from ..adapter.layers import ADAPTER, MaskedLayer
from ..distributed import processes
from ..errors import InputError
from ..files import load_tensors, save_tensors, sha256_json, sha256_tensors
from ..recipe.sections import Method
from .batches import Example
from .scores import trainable_mask

log = logging.getLogger("lorapar")
foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
FIRST_LOOK = 16  # examples; the paper took 100
SAVE_SECONDS = 10.0  # between two saves at least,
SAVE_SHARE = 0.02  # and so much of the time at most


def marks_of(n_examples: int) -> list[int]:
    """How many examples there are at each look: 16, 32, 64, ... below `n_examples`."""
    marks, mark = [], FIRST_LOOK
    while mark < n_examples:
        marks.append(mark)
        mark *= 2
    return marks


class RunningSums:
    """Σ Gφ and Σ (Gφ)² of every layer, over the examples so far; the layers add to them while they are in scoring mode.

    In a launch: over those of this process.

    Attributes:
        examples: how many have been added. done: the places in the plan of the batches that have been.
        loss_scale: what the loss was multiplied by; `importance` divides by it again.
        looked: how many examples the last look was after. looks: [examples, Jaccard index with the look before] of
            every look but the first. Both are of all processes together.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer]):
        self.layers = layers
        self.examples = 0
        self.done: list[int] = []
        self.loss_scale = 1.0
        self.looked = 0
        self.looks: list[list[float]] = []
        self._kept_before: Tensor | None = None
        self._saved, self._save_took = time.monotonic(), 0.0

    @property
    def batches(self) -> int:
        """How many batches have been added."""
        return len(self.done)

    @property
    def sums(self) -> dict[str, lk.ScoreSums]:
        found = {}
        for name, layer in self.layers.items():
            assert layer.scoring is not None
            found[name] = layer.scoring
        return found

    def importance(self, method: Method = "taylor", together: bool = False) -> dict[str, Tensor]:
        """I(φ) of the examples so far, fp32 on the CPU by parameter name; zero on a twin's rows.

        together: of the examples of all processes, each of which makes this call; the result is the same in all.
        """
        examples, scale = self.examples, self.loss_scale
        if together:
            of_each = processes.gather((examples, scale))
            # A process without a batch does not know what the loss is multiplied by.
            examples, scale = sum(count for count, _ in of_each), max(scale for _, scale in of_each)
        scores = {}
        for name, sums in self.sums.items():
            # One layer at a time, so that there is never a second set of sums.
            four = _over_processes(sums) if together else sums
            for factor, gphi, gphi_sq in (("lora_A", *four[:2]), ("lora_B", *four[2:])):
                squares = torch.zeros_like(gphi_sq) if method == "first_order" else gphi_sq / scale**2
                values = lk.importance(gphi / scale, squares, examples).cpu().float()
                parameter = f"{name}.{factor}.{ADAPTER}.weight"
                trainable = trainable_mask(parameter, values, self.layers[name].trainable_rank)
                scores[parameter] = torch.where(trainable, values, 0.0)
        return scores

    def finite(self) -> bool:
        """Whether no sum has become NaN or Inf; whatever is wrong with a gradient shows in its square's sum."""
        squares = [sums[i] for sums in self.sums.values() for i in (1, 3)]
        return _all_finite(squares)

    def look(self, theta: float, examples: int) -> float | None:
        """The Jaccard index of the kept set at θ with that of the look before; None at the first look.

        Of all processes together, which have taken so many `examples`; all make this call.
        """
        scores = self.importance(together=True)
        kept = torch.cat([mask.reshape(-1) for mask in lk.top_mass(list(scores.values()), theta)])
        before, self._kept_before, self.looked = self._kept_before, kept, examples
        if before is None:
            return None
        # The main process's word, since all stop together or none does.
        jaccard = processes.from_main(lambda: float((kept & before).sum() / (kept | before).sum()))
        self.looks.append([examples, jaccard])
        return jaccard

    def save(self, path: Path, fingerprint: str) -> None:
        """Write everything, whole or not at all, to this process's file: `path`, or one beside it (`file_of`)."""
        began = time.monotonic()
        tensors = {
            f"{name}.{field}{suffix}": tensor
            for name, sums in self.sums.items()
            for suffix, four in (("", sums), (".rest", sums.rests))
            for field, tensor in zip(lk.ScoreSums._fields, four)
        }
        if self._kept_before is not None:
            tensors["kept"] = lk.pack_mask(self._kept_before)
        facts = {"fingerprint": fingerprint, "examples": self.examples, "done": self.done,
                 "loss_scale": self.loss_scale, "looked": self.looked, "looks": self.looks}  # fmt: skip
        save_tensors(file_of(path, processes.rank()), tensors, facts)
        self._saved, self._save_took = time.monotonic(), time.monotonic() - began

    def save_if_due(self, path: Path, fingerprint: str) -> None:
        if time.monotonic() - self._saved >= max(SAVE_SECONDS, self._save_took / SAVE_SHARE):
            self.save(path, fingerprint)

    def restore(self, path: Path, fingerprint: str) -> list[int]:
        """Go on from what `save` wrote there, where it is of the same rows, settings and factors; by however many
        processes. Returns the places of the batches that are done.

        The main process has all of it in its sums then, and in one file; the others begin with nothing.
        """
        found = processes.from_main(lambda: self._take(path, fingerprint))
        done, self.loss_scale, self.looked, self.looks, kept = found
        self._kept_before = self._unpacked(kept)
        return list(done)

    def _unpacked(self, kept: Tensor | None) -> Tensor | None:
        elements = sum(total.numel() for sums in self.sums.values() for total in (sums.a_gphi, sums.b_gphi))
        return None if kept is None else lk.unpack_mask(kept, [elements])

    def _take(self, path: Path, fingerprint: str) -> tuple[list[int], float, int, list[list[float]], Tensor | None]:
        """Add every file of the pass to these sums, and leave one file of them all; (the batches' places, the loss's
        scale, looked, looks, the kept set of the last look in bits)."""
        kept, files = None, files_of(path)
        for file in files:
            tensors, facts = load_tensors(file)
            if facts["fingerprint"] != fingerprint:
                log.info("score: %s is of other rows, settings or factors: not used", file.name)
                continue
            # A kill came between writing the one file of them all and removing this one, which is in it.
            if set(facts["done"]) & set(self.done):
                continue
            for name, sums in self.sums.items():
                for i, field in enumerate(lk.ScoreSums._fields):
                    total, rest = tensors[f"{name}.{field}"], tensors[f"{name}.{field}.rest"]
                    if self.done:
                        _add(sums[i], sums.rests[i], total.to(sums[i].device).double() + rest.to(sums[i].device))
                    else:
                        # To the bit, also where the sums are fp64.
                        sums[i].copy_(total)
                        sums.rests[i].copy_(rest)
            self.examples += facts["examples"]
            self.done += facts["done"]
            self.loss_scale = max(self.loss_scale, facts["loss_scale"])
            if facts["looked"] > self.looked:
                # Whichever process came furthest: looks are of all together.
                self.looked, self.looks, kept = facts["looked"], facts["looks"], tensors["kept"]
        if self.done:
            log.info("score: going on after %d examples", self.examples)
        self._kept_before = self._unpacked(kept)
        others = [file for file in files if file != path]
        if others and self.done:
            self.save(path, fingerprint)
        for file in others:
            file.unlink()
        return self.done, self.loss_scale, self.looked, self.looks, kept


def file_of(path: Path, rank: int) -> Path:
    """The file of a process's sums: `path` itself for the main one, with its rank in the name for the others."""
    return path if rank == 0 else path.with_name(f"{path.stem}.{rank}{path.suffix}")


def files_of(path: Path) -> list[Path]:
    """The files of a pass that are there, the main process's first, whatever the number of processes was."""
    beside = path.parent.glob(f"{glob.escape(path.stem)}.*{glob.escape(path.suffix)}")
    rank = re.compile(rf"{re.escape(path.stem)}\.[1-9]\d*{re.escape(path.suffix)}")
    return [*filter(Path.exists, [path]), *sorted(file for file in beside if rank.fullmatch(file.name))]


def remove(path: Path) -> None:
    """Remove a pass's files of sums, those of all processes."""
    for file in files_of(path):
        file.unlink()


def _over_processes(sums: lk.ScoreSums) -> list[Tensor]:
    """A layer's four totals, added up over the processes with what rounding them has left over; InputError where that
    leaves fp32's range."""
    if processes.count() == 1:
        return list(sums)
    exact = torch.cat([(total.double() + rest).reshape(-1) for total, rest in zip(sums, sums.rests)])
    (exact,) = processes.sum_in_order([exact])
    parts = exact.split([total.numel() for total in sums])
    four = [part.view(total.shape).to(total.dtype) for part, total in zip(parts, sums)]
    if not _all_finite(four):
        raise InputError("score: the sums over all processes leave fp32's range; score fewer examples (score.examples)")
    return four


def _add(total: Tensor, rest: Tensor, more: Tensor) -> None:
    """Add fp64 `more` to a total and to what rounding it has left over."""
    exact = total.double() + rest + more
    total.copy_(exact)
    rest.copy_(exact - total)


def fingerprint_of(
    layers: Mapping[str, MaskedLayer], examples: list[Example], plan: list[list[int]], **facts: Any
) -> str:
    """A digest of all that the sums depend on, but for the base's weights."""
    factors = {}
    for name, layer in layers.items():
        factors[f"{name}.a"], factors[f"{name}.b"], _ = layer.factors(ADAPTER)
    digest = sha256_tensors({name: factor.detach().cpu().contiguous() for name, factor in factors.items()})
    # 2: the form of the file, which says which batches are in it.
    return sha256_json([2, digest, [[example.ids, example.targets] for example in examples], plan, facts])


def first_fault(layers: Mapping[str, MaskedLayer]) -> str | None:
    """What is wrong with the sums of the last layer that has a fault, where the backward came by first; else None."""
    for name, layer in reversed(list(layers.items())):
        assert layer.scoring is not None
        for factor, gphi, gphi_sq in (("lora_A", *layer.scoring[:2]), ("lora_B", *layer.scoring[2:])):
            if not bool(gphi.isfinite().all()):
                return f"NaN or Inf in the gradient of {name}.{factor}"
            if not bool(gphi_sq.isfinite().all()):
                return f"the square of gradient times value leaves fp32's range at {name}.{factor}"
    return None


def not_finite(name: str, fault: str, fp16: bool) -> InputError:
    remedy = "look at the row, and at the model's weights for NaN"
    if fp16:
        remedy = "fp16 ends at 65504: score in bfloat16 or float32 (model.dtype)"
    return InputError(f"row {name}: {fault}; {remedy}")


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether no entry is NaN or Inf, by one call for all tensors of a device and one wait."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    # The largest magnitude, which NaN goes through; a norm that adds squares leaves fp32's range from 1.8e19 on.
    return all(bool(torch.stack(foreach_norm(group, math.inf)).isfinite().all()) for group in by_device.values())
