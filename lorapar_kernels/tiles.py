"""Scores summed by tile or by rank slice, and masks of whole tiles: what `top_mass` needs to choose tiles for elements.

    sums = [tile_sums(score, (16, 64)) for score in scores]
    masks = [spread_tiles(kept, score.shape, (16, 64)) for kept, score in zip(top_mass(sums, theta), scores)]

A rank slice is a tile too: (1, in) of A and (out, 1) of B; the slice's sum is A's plus B's. Sums are float64, down each
column of the tile and then across the columns, on every device: the same to the bit, so the same tiles are chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .backend import choose, no_obstacle

STRIPE = 64  # what a kernel skips: so many columns of A, or rows of B, without an active element


class TiledMask(NamedTuple):
    """A factor's mask, and which of its stripes hold work: made once, where a mask is set, and used in every step.

    Attributes:
        mask: bool, of the factor's shape.
        stripes: uint8, 1 where a stripe has an active element, one entry for STRIPE columns of A or rows of B; None
            where every stripe has one, so that there is nothing to skip and a kernel need not ask.
        words: the mask as a kernel reads it, contiguous uint8; None: made in each call.
    """

    mask: Tensor
    stripes: Tensor | None
    words: Tensor | None = None

    @classmethod
    def of_a(cls, mask: Tensor) -> "TiledMask":
        """Of lora_a's mask [r, in]; waits for the device."""
        return cls(mask, _stripes(mask.any(0)), _words(mask))

    @classmethod
    def of_b(cls, mask: Tensor) -> "TiledMask":
        """Of lora_b's mask [out, r]; waits for the device."""
        return cls(mask, _stripes(mask.any(1)), _words(mask))

    def check(self, name: str, columns: int) -> None:
        """An error that names what of mask `name`, over so many columns of A or rows of B, is not as said above."""
        entries = (-(-columns // STRIPE),)
        for field, tensor, shape in (("stripes", self.stripes, entries), ("words", self.words, self.mask.shape)):
            if tensor is None:
                continue
            expected = f"must be torch.uint8 {list(shape)}, contiguous, on {self.mask.device}"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}.{field} {expected}, got {type(tensor).__name__}")
            if tensor.dtype != torch.uint8 or tensor.shape != shape or tensor.device != self.mask.device:
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ValueError(f"{name}.{field} {expected}, got {got}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}.{field} {expected}, got strides {list(tensor.stride())}")

    def as_words(self) -> Tensor:
        """The mask as contiguous uint8."""
        return _words(self.mask) if self.words is None else self.words


def _words(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _stripes(active: Tensor) -> Tensor | None:
    padded = torch.nn.functional.pad(active, (0, -active.numel() % STRIPE)).view(-1, STRIPE)
    stripes = padded.any(1)
    return None if bool(stripes.all()) else stripes.to(torch.uint8)


def tile_sums_reference(scores: Tensor, tile: tuple[int, int]) -> Tensor:
    """The specification: running sums, as torch.sum's order is its own."""
    (rows, columns), (height, width) = scores.shape, tile
    padded = torch.nn.functional.pad(scores.double(), (0, -columns % width, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return tiles.cumsum(1)[:, -1].cumsum(2)[..., -1].clone(memory_format=torch.contiguous_format)


def _native_obstacle(scores: Tensor) -> str | None:
    if scores.dtype != torch.float32:
        return f"csrc sums float32 scores, these are {scores.dtype}"
    return native.obstacle(scores.device)


# An op, so that torch.compile leaves it whole: the backend is chosen when it runs.
@torch.library.custom_op("lorapar::tile_sums", mutates_args=())
def _tile_sums(scores: Tensor, height: int, width: int) -> Tensor:
    if choose("tile_sums", {"native": lambda: _native_obstacle(scores), "reference": no_obstacle}) == "reference":
        return tile_sums_reference(scores, (height, width))
    scores = scores.contiguous()
    rows, columns = scores.shape
    sums = torch.empty(-(-rows // height), -(-columns // width), dtype=torch.float64, device=scores.device)
    native.call("tile_sums", scores.device, scores.data_ptr(), rows, columns, height, width, sums.data_ptr())
    return sums


@_tile_sums.register_fake
def _tile_sums_fake(scores: Tensor, height: int, width: int) -> Tensor:
    rows, columns = scores.shape
    return scores.new_empty((rows + height - 1) // height, (columns + width - 1) // width, dtype=torch.float64)


def _check(shape: torch.Size, tile: tuple[int, int], name: str) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must be a matrix with elements, got {list(shape)}")
    if len(tile) != 2 or not all(isinstance(side, int) and side >= 1 for side in tile):
        raise ValueError(f"tile must be two ints of at least 1, got {tile}")


def tile_sums(scores: Tensor, tile: tuple[int, int]) -> Tensor:
    """The sum of every tile of a matrix, float64 [ceil(rows / height), ceil(columns / width)].

    Args:
        scores: [rows, columns], float32 or float64.
        tile: height and width; the tiles at the lower and right edges are smaller.

    Raises ValueError naming the argument.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores must be torch.float32 or torch.float64, got {scores.dtype}")
    _check(scores.shape, tile, "scores")
    # A tile that is larger than the matrix is the matrix; so large a one would be padded to its size.
    height, width = min(tile[0], scores.shape[0]), min(tile[1], scores.shape[1])
    return _tile_sums(scores.detach(), height, width)


def spread_tiles(kept: Tensor, shape: tuple[int, int] | torch.Size, tile: tuple[int, int]) -> Tensor:
    """The mask of `shape` that holds the tiles where `kept` (bool, as `tile_sums` is shaped) is True.

    Raises ValueError naming the argument.
    """
    _check(torch.Size(shape), tile, "shape")
    (rows, columns), (height, width) = shape, tile
    expected = [-(-rows // height), -(-columns // width)]
    if kept.dtype != torch.bool or list(kept.shape) != expected:
        raise ValueError(f"kept must be torch.bool {expected}, got {kept.dtype} {list(kept.shape)}")
    return kept.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns].contiguous()
