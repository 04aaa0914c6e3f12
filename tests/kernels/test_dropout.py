"""dropout_mask: Philox's published vectors, the layout of the draws, statistics, and the refusals."""

import pytest
import torch

from lorapar_kernels import dropout_mask, native
from lorapar_kernels.dropout import CHUNK, LOW32, dropout_mask_reference, philox4x32, threshold_of, zero_dropped

# philox4x32 10 of Random123's kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (two >> 32) ^ c1 ^ k0, two & LOW32, (one >> 32) ^ c3 ^ k1, one & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    got = philox4x32([torch.tensor([word]) for word in words(counter)], [torch.tensor(word) for word in words(key)])
    assert [int(word) for word in got] == words(output)
    assert philox_in_python(words(counter), words(key)) == words(output)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 0x1_0000_0000])
def test_each_element_takes_its_own_lane(seed):
    n, p = 203, 0.3
    mask = dropout_mask(torch.tensor([seed]), (7, 29), p)
    expected = []
    for i in range(n):
        block = i // 8
        output = philox_in_python([block & LOW32, block >> 32, 0, 0], [seed & LOW32, (seed >> 32) & LOW32])
        draw = (output[i % 8 // 2] >> (16 * (i % 2))) & 0xFFFF
        expected.append(draw >= round(p * 65536))
    assert mask.dtype == torch.bool
    assert mask.shape == (7, 29)
    assert mask.reshape(-1).tolist() == expected


def test_a_longer_mask_begins_with_the_shorter_one():
    seed = torch.tensor([99])
    long = dropout_mask(seed, (8 * CHUNK + 13,), 0.5)
    for n in (1, 7, 8, 9, 1000, 8 * CHUNK - 1, 8 * CHUNK + 1):
        assert torch.equal(dropout_mask(seed, (n,), 0.5), long[:n])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.5, 0.9, 0.999999])
def test_share_kept(p):
    n = 1 << 20
    mask = dropout_mask(torch.tensor([7]), (1024, 1024), p)
    expected = 1 - threshold_of(p) / 65536
    deviation = (expected * (1 - expected) / n) ** 0.5
    assert abs(float(mask.double().mean()) - expected) <= 5 * deviation
    assert abs(expected - (1 - p)) <= 2**-17


def test_seeds_lanes_and_neighbours_are_independent():
    n = 1 << 18
    masks = [dropout_mask(torch.tensor([seed]), (n,), 0.5).double() - 0.5 for seed in (1, 2, 1 << 32)]
    bound = 5 * 0.25 / n**0.5
    pairs = [(masks[0], masks[1]), (masks[0], masks[2])]
    pairs += [(masks[0][lag:], masks[0][:-lag]) for lag in (1, 2, 7, 8, 16, 1024)]
    for left, right in pairs:
        assert abs(float((left * right).mean())) < bound
    for lane in range(8):
        assert abs(float(masks[0][lane::8].mean())) < 5 * 0.5 / (n / 8) ** 0.5


def test_p_zero_keeps_all_and_empty_shapes_work():
    assert dropout_mask(torch.tensor([3]), (5, 5), 0.0).all()
    assert dropout_mask(torch.tensor([3]), (0, 5), 0.5).shape == (0, 5)
    assert dropout_mask(torch.tensor(3), (), 0.5).shape == ()


def test_result_owns_its_memory():
    mask = dropout_mask(torch.tensor([3]), (9,), 0.5)
    assert mask.untyped_storage().nbytes() == 9


def test_op_passes_torch_library_checks():
    torch.library.opcheck(torch.ops.lorapar.dropout_mask.default, (torch.tensor([5]), [3, 11], 0.25))


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_refuses_other_p(p):
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got"):
        dropout_mask(torch.tensor([1]), (4,), p)


def test_refuses_other_seeds():
    with pytest.raises(ValueError, match=r"one int64 element, got 2 of torch\.int64"):
        dropout_mask(torch.tensor([1, 2]), (4,), 0.5)
    with pytest.raises(ValueError, match=r"one int64 element, got 1 of torch\.int32"):
        dropout_mask(torch.tensor([1], dtype=torch.int32), (4,), 0.5)


def test_triton_on_the_cpu_is_refused_with_the_remedy(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"cannot serve dropout_mask: .* set TRITON_INTERPRET=1"):
        dropout_mask(torch.tensor([1]), (4,), 0.5)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (127,), (128,), (129,), (5, 3, 577), (40000,), (333, 1001)])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, -(2**63)])
def test_native_gives_the_same_bits_and_zeroes_what_they_drop(monkeypatch, shape, seed):
    if native.obstacle(torch.device("cpu")) is not None:
        pytest.skip(f"no native library: {native.obstacle(torch.device('cpu'))}")
    monkeypatch.setenv("LORAPAR_BACKEND", "native")
    key = torch.tensor([seed])
    for p in (0.0, 0.05, 0.5, 0.99999, 0.9999999):
        expected = dropout_mask_reference(key, shape, p)
        assert torch.equal(dropout_mask(key, shape, p), expected)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(zero_dropped(x, key, p), torch.where(expected, x, 0.0))


def test_zeroing_is_the_same_without_the_native_library(monkeypatch):
    x, key = torch.randn(300, 7).t(), torch.tensor([11])
    default = zero_dropped(x, key, 0.3)
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    assert torch.equal(zero_dropped(x, key, 0.3), default)
    assert torch.equal(default == 0, ~dropout_mask(key, x.shape, 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1025), (2048, 577)])
def test_cuda_gives_the_same_bits(shape):
    for seed in (0, -1, 2**40 + 3):
        mask = dropout_mask(torch.tensor([seed], device="cuda"), shape, 0.1)
        assert torch.equal(mask.cpu(), dropout_mask_reference(torch.tensor([seed]), shape, 0.1))
