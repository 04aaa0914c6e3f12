"""One scored layer, forward and backward: against one example at a time, and against the frozen layer with dX alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lorapar_kernels as lk
from bench.interleaved import interleave

RANK, EXAMPLES, TOKENS = 8, 8, 200
# (in, out): SmolLM2-135M's gate on a CPU, Llama-2-7B's q and down on a GPU.
SHAPES = {"cpu": [(576, 1536)], "cuda": [(4096, 4096), (11008, 4096)]}


@pytest.mark.parametrize("which", [0, 1])
def test_lora_linear_scored(benchmark, report, device, which):
    if which >= len(SHAPES[device]):
        pytest.skip("one shape on a CPU")
    n_in, n_out = SHAPES[device][which]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x, dy = (torch.randn(EXAMPLES * TOKENS, n, device=device).to(dtype) for n in (n_in, n_out))
    w = (torch.randn(n_out, n_in, device=device) / n_in**0.5).to(dtype)
    a, b = (torch.randn(*shape, device=device) * 0.01 for shape in ((RANK, n_in), (n_out, RANK)))
    offsets = torch.arange(EXAMPLES + 1) * TOKENS
    examples = lk.Examples.of(offsets, device)
    x.requires_grad_()
    a.requires_grad_()
    b.requires_grad_()

    def ours():
        sums = lk.ScoreSums.zeros_like(a, b)
        lk.lora_linear_scored(x, w, a, b, 8.0, examples, sums).backward(dy)
        return sums

    def one_at_a_time():
        sums = [torch.zeros_like(factor) for factor in (a, a, b, b)]
        for start, end in itertools.pairwise(offsets.tolist()):
            y = lk.lora_linear(x[start:end], w, a, b, 8.0)
            _, *gradients = torch.autograd.grad(y, (x, a, b), dy[start:end])
            for i, (gradient, factor) in enumerate(zip(gradients, (a, b))):
                gphi = gradient * factor.detach()
                sums[2 * i] += gphi
                sums[2 * i + 1] += gphi * gphi
        return sums

    def bare():
        return torch.autograd.grad(F.linear(x, w), x, dy)

    ways = {"ours": ours, "one example at a time": one_at_a_time, "forward and dX alone": bare}
    for way in ways.values():
        way()
    timed = interleave(
        benchmark, f"lora_linear_scored {n_in}→{n_out} {dtype} [{device}]", ways, device, rounds=9, calls=3
    )
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, want in zip(timed.results["ours"], timed.results["one example at a time"]):
        assert (got - want).norm() / want.norm() < bound
    report(timed)
