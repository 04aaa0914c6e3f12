"""`pack_mask` against its plain PyTorch reference and NumPy's packbits, at a 7B's number of LoRA elements (r = 8)."""

import numpy as np
import torch

import lorapar_kernels as lk
from bench.interleaved import interleave
from lorapar_kernels.bitmask import pack_mask_reference

ELEMENTS = 17_891_328  # a whole number of words, so NumPy's bytes need no padding


def by_numpy(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little").view(np.int32))


def test_pack_mask(benchmark, report, device):
    mask = (torch.rand(ELEMENTS, generator=torch.Generator().manual_seed(0)) < 0.4).to(device)
    ways = {"ours": lambda: lk.pack_mask(mask), "plain PyTorch": lambda: pack_mask_reference(mask)}
    if device == "cpu":
        ways["numpy.packbits"] = lambda: by_numpy(mask)
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"pack_mask {device} {ELEMENTS / 1e6:.1f} M", ways, device, rounds=5)
    for words in timed.results.values():
        assert torch.equal(words, timed.results["ours"])
    timed.facts = {"elements": ELEMENTS}
    report(timed)
