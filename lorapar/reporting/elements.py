"""The numbers behind the report's pictures of scores and partition: plain arrays over the trainable elements.

A twin's rows (rows r.. of A, columns r.. of B, where the artefact has the rank) are left out, so that counts and shares
are of what could train at all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..partitioning.choose import TILE_A, TILE_B
from ..partitioning.partition import Partition

REGIONS = ("inactive", "System 1 only", "System 2 only", "shared")  # code = kept by 1 + 2 * kept by 2
GRANULARITIES = ("element", "tile", "rank")


@dataclass
class RegionMap:
    """Counts by place: `counts` [layers, modules, 4 regions] of int64, all zero where a layer lacks a module."""

    layers: list[str]
    modules: list[str]
    counts: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """Elements in each region, [4]."""
        return self.counts.sum((0, 1))

    def share(self, region: int) -> np.ndarray:
        """The region's share of each layer x module, NaN where there is none."""
        elements = self.counts.sum(2).astype(float)
        elements[elements == 0] = np.nan
        return self.counts[:, :, region] / elements

    @property
    def jaccard(self) -> float:
        union = int(self.totals[1:].sum())
        return int(self.totals[3]) / union if union else 0.0


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a parameter: "…layers.7.mlp.up_proj.lora_A" → ("7", "up_proj"); "–" for no layer."""
    path = name.split(".lora_")[0].split(".")
    numbers = [part for part in path if part.isdecimal()]
    return (numbers[0] if numbers else "–"), path[-1]


def trainable(name: str, tensor: Tensor, rank: int | None) -> np.ndarray:
    """The r trainable rows of A or columns of B, as an array of two dimensions."""
    array = tensor.numpy()
    return array[:rank] if ".lora_A." in name else array[:, :rank]


def region_codes(partition: Partition) -> dict[str, np.ndarray]:
    """{parameter: uint8 codes into REGIONS, of the trainable part's shape}."""
    rank = partition.metadata.get("rank")
    kept_1, kept_2 = partition.kept(1), partition.kept(2)
    return {
        name: trainable(name, kept_1[name], rank) + 2 * trainable(name, kept_2[name], rank).astype(np.uint8)
        for name in kept_1
    }


def region_map(codes: Mapping[str, np.ndarray]) -> RegionMap:
    """Count the regions of every layer and module; layers in numeric order, modules in the order of the model."""
    places = {name: place(name) for name in codes}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda layer: (not layer.isdecimal(), layer.zfill(6)))
    present = {module for _, module in places.values()}
    order = [m for m in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") if m in present]
    modules = order + sorted(present - set(order))
    counts = np.zeros((len(layers), len(modules), len(REGIONS)), dtype=np.int64)
    for name, array in codes.items():
        layer, module = places[name]
        counts[layers.index(layer), modules.index(module)] += np.bincount(array.reshape(-1), minlength=len(REGIONS))
    return RegionMap(layers, modules, counts)


@dataclass
class KeepCurve:
    """Units in order of falling score: `active` and `score`, the shares of elements and of score up to each unit."""

    active: np.ndarray
    score: np.ndarray

    def needed(self, theta: float) -> float:
        """The share of elements in the shortest prefix that holds `theta` of the score."""
        # Sums end at 1 only to rounding.
        at = int(np.searchsorted(self.score, theta * (1 - 1e-12)))
        return float(self.active[min(at, len(self.active) - 1)])

    def kept(self, active: float) -> float:
        """The share of the score that the highest units hold when they make up `active` of the elements."""
        return float(np.interp(active, np.r_[0, self.active], np.r_[0, self.score]))

    def thinned(self, points: int = 300) -> tuple[np.ndarray, np.ndarray]:
        """The curve at about `points` evenly spaced shares of elements, for drawing."""
        active = np.linspace(0, 1, points)
        return active, np.interp(active, np.r_[0, self.active], np.r_[0, self.score])


def keep_curve(scores: Mapping[str, np.ndarray], granularity: str) -> KeepCurve:
    """How much score the best elements, tiles (16 x 64 in A, 64 x 16 in B) or rank slices hold, by summed score."""
    if granularity == "element":
        sums = np.sort(np.concatenate([array.reshape(-1) for array in scores.values()]))[::-1].astype(np.float64)
        sizes = np.ones(len(sums))
    else:
        units = _tiles(scores) if granularity == "tile" else _ranks(scores)
        sums, sizes = (np.concatenate(parts) for parts in zip(*units))
        order = np.argsort(-sums, kind="stable")
        sums, sizes = sums[order], sizes[order]
    return KeepCurve(np.cumsum(sizes) / sizes.sum(), np.cumsum(sums) / sums.sum())


def _tiles(scores: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(summed score, size) of every tile, a pair of arrays a parameter."""
    units = []
    for name, array in scores.items():
        height, width = TILE_A if ".lora_A." in name else TILE_B
        rows, columns = np.arange(0, array.shape[0], height), np.arange(0, array.shape[1], width)
        sums = np.add.reduceat(np.add.reduceat(array.astype(np.float64), rows, axis=0), columns, axis=1)
        sizes = np.outer(np.diff([*rows, array.shape[0]]), np.diff([*columns, array.shape[1]]))
        units.append((sums.reshape(-1), sizes.reshape(-1)))
    return units


def _ranks(scores: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(summed score, size) of every rank slice: row i of A with column i of B."""
    units = []
    for name, a in scores.items():
        if ".lora_A." in name:
            b = scores[re.sub(r"\.lora_A\.", ".lora_B.", name)]
            sums = a.sum(1, dtype=np.float64) + b.sum(0, dtype=np.float64)
            units.append((sums, np.full(len(sums), a.shape[1] + b.shape[0])))
    return units
