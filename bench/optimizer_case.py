"""One step of `masked_adamw` and of torch's fused AdamW over every element, on the LoRA factors (r = 8) of a model.

What a step saves in memory is certain (8 bytes an active element, about 2 with 8-bit moments); this says what it
costs or saves in time, and what share of a plain copy's bandwidth it reaches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import lorapar_kernels as lk
from lorapar_kernels.bitmask import TILE

LR, DECAY = 2e-4, 0.1
FUSED, EIGHT_BIT, COPY = "torch's fused AdamW", "ours, 8-bit moments", "a copy of 24 bytes an element"
IN_MEMORY = "ours, step in memory"
# In and out features of q, k, v, gate, up, down in each of 30 layers, and q, k, v, gate, up, down of a Llama-2-7B.
LINEARS = {
    "small": [(64, 96), (576, 192)],
    "135m": [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30,
    "7b": [(4096, 4096)] * 3 * 32 + [(4096, 11008), (4096, 11008), (11008, 4096)] * 32,
}


@dataclass(frozen=True)
class OptimizerCase:
    """ways: name -> one step, ours first, each called once already. elements, kept: all and active ones.

    check: raises AssertionError unless all ways, called equally often, came to the same parameters.
    state: bytes of moments an active element, fp32 and 8-bit.
    """

    ways: dict[str, Callable[[], object]]
    elements: int
    kept: int
    state: list[float]
    check: Callable[[], None]

    def moved(self) -> int:
        """Bytes of a step: parameters read and written, gradients read, active elements' moments read and written."""
        return 12 * self.elements + 16 * self.kept


def optimizer_case(model: str, active: float, device: str) -> OptimizerCase:
    """A key of LINEARS, the share of active elements."""
    torch.manual_seed(0)
    shapes = [shape for inner, outer in LINEARS[model] for shape in ((8, inner), (outer, 8))]
    dense = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    masks = [torch.rand(shape, device=device) < active for shape in shapes]
    indexed = [lk.index_mask(mask) for mask in masks]
    params, params_8, params_m = ([tensor.detach().clone() for tensor in dense] for _ in range(3))
    start = [tensor.clone() for tensor in params]
    exp_avgs, exp_avg_sqs, *moments_m = (
        [torch.zeros(index.active, device=device) for index in indexed] for _ in range(4)
    )
    codes = [[torch.zeros(index.active, dtype=dtype, device=device) for index in indexed]
             for dtype in (torch.int8, torch.uint8)]  # fmt: skip
    scales = [torch.zeros(2, -(-tensor.numel() // TILE), device=device) for tensor in params]
    optimizer = torch.optim.AdamW(dense, lr=LR, weight_decay=DECAY, fused=True)
    for tensor, grad in zip(dense, grads):
        tensor.grad = grad
    elements, kept = sum(mask.numel() for mask in masks), sum(index.active for index in indexed)
    source = torch.ones(elements * 3, device=device)
    target = torch.empty_like(source)
    prepared = lk.PreparedAdamW(params, indexed, exp_avgs, exp_avg_sqs)
    prepared_8 = lk.PreparedAdamW(params_8, indexed, codes[0], codes[1], scales=scales)
    prepared_m = lk.PreparedAdamW(params_m, indexed, *moments_m)
    steps, step_in_memory = {"ours": 0, EIGHT_BIT: 0}, torch.zeros((), dtype=torch.int64, device=device)

    def ours() -> None:
        steps["ours"] += 1
        prepared.step(grads, steps["ours"], lr=LR, weight_decay=DECAY)

    def ours_8_bit() -> None:
        steps[EIGHT_BIT] += 1
        prepared_8.step(grads, steps[EIGHT_BIT], lr=LR, weight_decay=DECAY)

    def ours_in_memory() -> None:
        step_in_memory.add_(1)
        prepared_m.step(grads, step_in_memory, lr=LR, weight_decay=DECAY)

    def check() -> None:
        for mine, theirs, eight, other, mask, before in zip(params, dense, params_8, params_m, masks, start):
            for stepped in (mine, other):
                torch.testing.assert_close(stepped[mask], theirs.detach()[mask], rtol=1e-5, atol=1e-6)
            for stepped in (mine, eight, other):
                assert torch.equal(stepped[~mask], before[~mask]), "an inactive element moved"

    ways = {
        "ours": ours,
        FUSED: optimizer.step,
        EIGHT_BIT: ours_8_bit,
        IN_MEMORY: ours_in_memory,
        COPY: lambda: target.copy_(source),
    }
    for way in ways.values():
        way()
    state = [sum(tensor.nbytes for tensor in tensors) / kept for tensors in
             ((*exp_avgs, *exp_avg_sqs), (*codes[0], *codes[1], *scales))]  # fmt: skip
    return OptimizerCase(ways, elements, kept, state, check)
