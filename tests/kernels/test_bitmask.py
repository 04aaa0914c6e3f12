"""pack_mask, unpack_mask and index_mask: the bit layout, the round trip, the refusals."""

import pytest
import torch

from lorapar_kernels import index_mask, pack_mask, unpack_mask
from lorapar_kernels.bitmask import pack_mask_reference, unpack_mask_reference

SIZES = (0, 1, 7, 31, 32, 33, 63, 64, 65, 8 * 576, 1_000_003)


@pytest.fixture(autouse=True, params=["reference", ""])
def backend(request, monkeypatch):
    """Each test under the reference, and under whatever is installed."""
    monkeypatch.setenv("LORAPAR_BACKEND", request.param)


def as_python(mask: torch.Tensor) -> list[int]:
    """The words by the definition, one element at a time."""
    bits = mask.reshape(-1).tolist()
    words = [0] * ((len(bits) + 31) // 32)
    for i, bit in enumerate(bits):
        words[i // 32] |= bit << (i % 32)
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("n", SIZES)
def test_words_are_the_definition_and_come_back(n):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.4
    words = pack_mask(mask)
    assert words.dtype == torch.int32
    assert words.tolist() == as_python(mask)
    assert torch.equal(unpack_mask(words, mask.shape), mask)
    assert index_mask(mask).active == int(mask.sum())


@pytest.mark.parametrize("value", [True, False])
def test_all_and_none(value):
    mask = torch.full((5, 13), value)
    assert pack_mask(mask).tolist() == ([-1, -1, 1] if value else [0, 0, 0])
    assert torch.equal(unpack_mask(pack_mask(mask), (5, 13)), mask)


def test_rows_before_columns_whatever_the_strides():
    mask = torch.rand(37, 19, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_mask(mask.t()), pack_mask(mask.t().contiguous()))
    assert torch.equal(pack_mask(mask[::2, 3:]), pack_mask(mask[::2, 3:].clone()))
    words = pack_mask(mask.t())
    apart = torch.stack([words, torch.zeros_like(words)], 1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(unpack_mask(apart, (19, 37)), mask.t())
    assert index_mask(mask.t()).active == int(mask.sum())


def test_scalar_and_empty_shapes():
    assert pack_mask(torch.tensor(True)).tolist() == [1]
    assert unpack_mask(torch.tensor([1], dtype=torch.int32), ()).shape == ()
    assert unpack_mask(torch.zeros(0, dtype=torch.int32), (0, 3)).shape == (0, 3)


def test_logic_on_words_is_logic_on_masks():
    a, b = (torch.rand(4, 77, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2))
    words_a, words_b = pack_mask(a), pack_mask(b)
    assert torch.equal(unpack_mask(words_a & words_b, a.shape), a & b)
    assert torch.equal(unpack_mask(words_a & ~words_b, a.shape), a & ~b)
    assert torch.equal(unpack_mask(words_a ^ words_b, a.shape), a ^ b)


def test_references_agree_with_what_runs():
    mask = torch.rand(3, 1001, generator=torch.Generator().manual_seed(3)) < 0.5
    assert torch.equal(pack_mask(mask), pack_mask_reference(mask))
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), unpack_mask_reference(pack_mask(mask), mask.shape))


def test_refusals():
    with pytest.raises(ValueError, match=r"mask must be torch\.bool, got torch\.uint8"):
        pack_mask(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"1-D int32 tensor, got torch\.int64"):
        unpack_mask(torch.zeros(1, dtype=torch.int64), (4,))
    with pytest.raises(ValueError, match="words must be 2 for 33 elements, got 1"):
        unpack_mask(torch.zeros(1, dtype=torch.int32), (33,))
    with pytest.raises(ValueError, match="28 spare bits of the last word must be 0 for 4 elements, got 0x00000010"):
        unpack_mask(torch.tensor([16], dtype=torch.int32), (4,))
    with pytest.raises(ValueError, match="31 spare bits of the last word must be 0 for 33 elements, got 0x80000000"):
        unpack_mask(torch.tensor([0, -(1 << 31)], dtype=torch.int32), (33,))
