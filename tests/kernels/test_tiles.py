"""tile_sums and spread_tiles against loops, and tiles chosen by top_mass."""

import pytest
import torch

from lorapar_kernels import spread_tiles, tile_sums, top_mass
from lorapar_kernels.tiles import tile_sums_reference

CASES = [((37, 129), (16, 64)), ((129, 37), (64, 16)), ((8, 700), (1, 700)), ((700, 8), (700, 1)), ((5, 3), (99, 99)),
         ((1, 1), (1, 1)), ((16, 64), (16, 64)), ((33, 300), (2, 257))]  # fmt: skip


def loops(scores: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    (rows, columns), (height, width) = scores.shape, tile
    return torch.stack([
        torch.stack([scores[r : r + height, c : c + width].double().sum() for c in range(0, columns, width)])
        for r in range(0, rows, height)
    ])  # fmt: skip


@pytest.mark.parametrize(("shape", "tile"), CASES)
def test_sums_are_those_of_loops_and_the_same_to_the_bit(every_backend, shape, tile):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).square().to(every_backend)
    sums = tile_sums(scores, tile)
    torch.testing.assert_close(sums.cpu(), loops(scores.cpu(), tile), rtol=1e-14, atol=0)
    small = (min(tile[0], shape[0]), min(tile[1], shape[1]))
    assert torch.equal(sums.cpu(), tile_sums_reference(scores.cpu(), small))


def test_spread_is_the_reverse(every_backend):
    kept = torch.tensor([[True, False, True], [False, True, False]], device=every_backend)
    mask = spread_tiles(kept, (20, 130), (16, 64)).cpu()
    assert mask.shape == (20, 130)
    assert all(part.all() for part in (mask[:16, :64], mask[:16, 128:], mask[16:, 64:128]))
    assert int(mask.sum()) == 16 * 64 + 16 * 2 + 4 * 64


def test_whole_tiles_hold_the_share(every_backend, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator).pow(8).to(every_backend) for shape in ((32, 320), (200, 32))]
    tiles = [(16, 64), (64, 16)]
    sums = [tile_sums(score, tile) for score, tile in zip(scores, tiles)]
    # csrc selects float32 scores; the few thousand sums are float64.
    monkeypatch.delenv("LORAPAR_BACKEND")
    kept = top_mass(sums, 0.7)
    masks = [spread_tiles(keep, score.shape, tile) for keep, score, tile in zip(kept, scores, tiles)]
    total = sum(float(score.double().sum()) for score in scores)
    share = sum(float(score.double()[mask].sum()) for score, mask in zip(scores, masks)) / total
    assert 0.7 <= share < 0.8


def test_refusals():
    with pytest.raises(ValueError, match=r"scores must be a matrix with elements, got \[3\]"):
        tile_sums(torch.ones(3), (1, 1))
    with pytest.raises(ValueError, match=r"scores must be a matrix with elements, got \[0, 3\]"):
        tile_sums(torch.ones(0, 3), (1, 1))
    with pytest.raises(ValueError, match="torch.float32 or torch.float64, got torch.bfloat16"):
        tile_sums(torch.ones(3, 3, dtype=torch.bfloat16), (1, 1))
    with pytest.raises(ValueError, match=r"tile must be two ints of at least 1, got \(0, 4\)"):
        tile_sums(torch.ones(3, 3), (0, 4))
    with pytest.raises(ValueError, match=r"kept must be torch.bool \[1, 2\], got torch.bool \[2, 1\]"):
        spread_tiles(torch.ones(2, 1, dtype=torch.bool), (3, 8), (3, 4))
