"""A training step captured as a CUDA graph: its replays give the bits of the calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lorapar_kernels as lk
from lorapar_kernels import native

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

T, HIDDEN, WIDE, R, P = 70, 64, 96, 8, 0.25


class Step:
    """The products of a decoder layer, its loss's gradients, and AdamW with the step's number and rate in memory."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to("cuda", dtype)

        shapes = [(HIDDEN, HIDDEN)] * 4 + [(WIDE, HIDDEN)] * 2 + [(HIDDEN, WIDE)]
        self.weights = [draw(*shape, dtype=torch.bfloat16) for shape in shapes]
        self.factors = [(draw(R, n_in), draw(n_out, R)) for n_out, n_in in shapes]
        self.parameters = [factor.requires_grad_() for pair in self.factors for factor in pair]
        self.masks = [torch.rand(p.shape, generator=generator).cuda() < 0.4 for p in self.parameters]
        self.x, self.seeds = draw(T, HIDDEN, dtype=torch.bfloat16), torch.zeros(7, 1, dtype=torch.int64, device="cuda")
        self.number, self.rate = torch.zeros((), dtype=torch.int64, device="cuda"), torch.tensor(1e-2, device="cuda")
        self.moments = [[torch.zeros(int(mask.sum()), device="cuda") for mask in self.masks] for _ in range(2)]
        self.prepared = lk.PreparedAdamW(self.parameters, self.masks, *self.moments)

    def layers(self, x: Tensor, places: range) -> list[Tensor]:
        of = [[column[i] for i in places] for column in (self.weights, [a for a, _ in self.factors],
                                                         [b for _, b in self.factors])]  # fmt: skip
        masks = [[self.masks[2 * i + which] for i in places] for which in range(2)]
        seeds = [self.seeds[i] for i in places]
        return lk.lora_linear_grouped(x, *of, [2.0] * len(places), None, *masks, P, seeds)

    def __call__(self) -> None:
        q, k, v = self.layers(self.x, range(3))
        (attended,) = self.layers(F.scaled_dot_product_attention(q[None], k[None], v[None])[0], range(3, 4))
        gate, up = self.layers(self.x + attended, range(4, 6))
        (y,) = self.layers(F.silu(gate) * up, range(6, 7))
        grads = torch.autograd.grad(y.float().square().mean(), self.parameters)
        self.number += 1
        self.prepared.step(grads, self.number, lr=self.rate, weight_decay=0.1)

    def draw(self, step: int) -> None:
        """What changes from step to step, in the places that the graph reads."""
        generator = torch.Generator("cuda").manual_seed(step)
        self.x.normal_(generator=generator)
        self.seeds.random_(generator=generator)
        self.rate.fill_(1e-2 / (step + 1))

    def written(self) -> list[Tensor]:
        return [self.number, *(parameter.detach() for parameter in self.parameters), *self.moments[0], *self.moments[1]]


@pytest.mark.parametrize("product", ["plain", "fused"])
def test_a_captured_training_step_gives_the_same_bits(product, monkeypatch):
    reason = native.obstacle(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORAPAR_PRODUCT", product)
    called, replayed = Step(), Step()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    start = [tensor.clone() for tensor in replayed.written()]
    # Compiled, and with memory of its own, before the capture.
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        replayed()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed()
    for tensor, value in zip(replayed.written(), start, strict=True):
        tensor.copy_(value)
    for step in range(4):
        called.draw(step)
        called()
        replayed.draw(step)
        graph.replay()
    assert int(replayed.number) == 4
    for one, other, first in zip(called.written(), replayed.written(), start, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, first)


def test_an_optimizer_step_that_is_skipped_in_a_graph():
    reason = native.obstacle(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    param, grad = torch.ones(600, device="cuda"), torch.ones(600, device="cuda")
    mask, moments = (
        torch.ones(600, dtype=torch.bool, device="cuda"),
        [torch.zeros(600, device="cuda") for _ in range(2)],
    )
    prepared = lk.PreparedAdamW([param], [mask], [moments[0]], [moments[1]])
    taken = torch.zeros((), device="cuda")

    def step() -> None:
        taken.add_(prepared.step([grad], taken + 1, lr=0.1, skip_nonfinite=True))

    graph = torch.cuda.CUDAGraph()
    step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    for value in (1.0, float("nan"), 2.0, float("inf")):
        grad.fill_(value)
        graph.replay()
    assert float(taken) == 3.0
    assert bool(param.isfinite().all())
