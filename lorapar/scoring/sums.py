"""The running sums of a scoring pass: readable at any time, kept in a file between batches, stable or not yet.

Stable: the kept set at θ (what the partition is made of) after n examples and after 2n have a Jaccard index of at least
the level asked for. Each look is after twice as many examples as the one before, so that it compares with as much that
is new as it had; looks at a fixed distance would agree ever better with nothing learnt.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk

from ..adapter.layers import ADAPTER, MaskedLayer
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

    Attributes:
        examples, batches: how many have been added.
        loss_scale: what the loss was multiplied by; `importance` divides by it again.
        looks: [examples, Jaccard index with the look before] of every look but the first.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer]):
        self.layers = layers
        self.examples = self.batches = 0
        self.loss_scale = 1.0
        self.looks: list[list[float]] = []
        self._kept_before: Tensor | None = None
        self._saved, self._save_took = time.monotonic(), 0.0

    @property
    def sums(self) -> dict[str, lk.ScoreSums]:
        found = {}
        for name, layer in self.layers.items():
            assert layer.scoring is not None
            found[name] = layer.scoring
        return found

    def importance(self, method: Method = "taylor") -> dict[str, Tensor]:
        """I(φ) of the examples so far, fp32 on the CPU by parameter name; zero on a twin's rows."""
        scores = {}
        for name, sums in self.sums.items():
            for factor, gphi, gphi_sq in (("lora_A", *sums[:2]), ("lora_B", *sums[2:])):
                squares = torch.zeros_like(gphi_sq) if method == "first_order" else gphi_sq / self.loss_scale**2
                values = lk.importance(gphi / self.loss_scale, squares, self.examples).cpu().float()
                parameter = f"{name}.{factor}.{ADAPTER}.weight"
                trainable = trainable_mask(parameter, values, self.layers[name].trainable_rank)
                scores[parameter] = torch.where(trainable, values, 0.0)
        return scores

    def finite(self) -> bool:
        """Whether no sum has become NaN or Inf; whatever is wrong with a gradient shows in its square's sum."""
        squares = [sums[i] for sums in self.sums.values() for i in (1, 3)]
        return _all_finite(squares)

    def look(self, theta: float) -> float | None:
        """The Jaccard index of the kept set at θ with that of the look before; None at the first look."""
        kept = torch.cat([mask.reshape(-1) for mask in lk.top_mass(list(self.importance().values()), theta)])
        before, self._kept_before = self._kept_before, kept
        if before is None:
            return None
        jaccard = float((kept & before).sum() / (kept | before).sum())
        self.looks.append([self.examples, jaccard])
        return jaccard

    def save(self, path: Path, fingerprint: str) -> None:
        """Write everything to `path`, whole or not at all."""
        began = time.monotonic()
        tensors = {
            f"{name}.{field}{suffix}": tensor
            for name, sums in self.sums.items()
            for suffix, four in (("", sums), (".rest", sums.rests))
            for field, tensor in zip(lk.ScoreSums._fields, four)
        }
        if self._kept_before is not None:
            tensors["kept"] = lk.pack_mask(self._kept_before)
        facts = {"fingerprint": fingerprint, "examples": self.examples, "batches": self.batches,
                 "loss_scale": self.loss_scale, "looks": self.looks}  # fmt: skip
        save_tensors(path, tensors, facts)
        self._saved, self._save_took = time.monotonic(), time.monotonic() - began

    def save_if_due(self, path: Path, fingerprint: str) -> None:
        if time.monotonic() - self._saved >= max(SAVE_SECONDS, self._save_took / SAVE_SHARE):
            self.save(path, fingerprint)

    def restore(self, path: Path, fingerprint: str) -> None:
        """Go on from what `save` wrote there, where it is of the same rows, settings and factors."""
        if not path.exists():
            return
        tensors, facts = load_tensors(path)
        if facts["fingerprint"] != fingerprint:
            log.info("score: %s is of other rows, settings or factors: not used", path.name)
            return
        for name, sums in self.sums.items():
            for suffix, four in (("", sums), (".rest", sums.rests)):
                for field, tensor in zip(lk.ScoreSums._fields, four):
                    tensor.copy_(tensors[f"{name}.{field}{suffix}"])
        self.examples, self.batches = facts["examples"], facts["batches"]
        self.loss_scale, self.looks = facts["loss_scale"], facts["looks"]
        if "kept" in tensors:
            elements = sum(total.numel() for sums in self.sums.values() for total in (sums.a_gphi, sums.b_gphi))
            self._kept_before = lk.unpack_mask(tensors["kept"], [elements])
        log.info("score: going on after %d examples", self.examples)


def fingerprint_of(
    layers: Mapping[str, MaskedLayer], examples: list[Example], plan: list[list[int]], **facts: Any
) -> str:
    """A digest of all that the sums depend on, but for the base's weights."""
    factors = {}
    for name, layer in layers.items():
        factors[f"{name}.a"], factors[f"{name}.b"], _ = layer.factors(ADAPTER)
    digest = sha256_tensors({name: factor.detach().cpu().contiguous() for name, factor in factors.items()})
    return sha256_json([digest, [[example.ids, example.targets] for example in examples], plan, facts])


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
