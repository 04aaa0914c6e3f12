"""`masked_adamw` against torch's fused AdamW over every element, on the factors (r = 8) of SmolLM2-135M and of a 7B.

What a step saves in memory is certain (8 bytes an active element, about 2 with 8-bit moments); this says what it
costs or saves in time, and what share of a plain copy's bandwidth it reaches.
"""

import pytest
import torch

import lorapar_kernels as lk
from bench.interleaved import interleave
from lorapar_kernels.bitmask import TILE

LR, DECAY = 2e-4, 0.1
# In and out features of q, k, v, gate, up, down in each of 30 layers, and q, k, v, gate, up, down of a Llama-2-7B.
LINEARS = {
    "135m": [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30,
    "7b": [(4096, 4096)] * 3 * 32 + [(4096, 11008), (4096, 11008), (11008, 4096)] * 32,
}
# The 7B's 17.9 M elements at 40 %: bytes allow 1.52.
REQUIRED = {("7b", 0.4): {"torch's fused AdamW": 1.2}}


@pytest.mark.parametrize("active", [0.4, 1.0], ids=["40%", "all"])
@pytest.mark.parametrize("model", LINEARS)
def test_masked_adamw(benchmark, report, device, model, active):
    torch.manual_seed(0)
    shapes = [shape for inner, outer in LINEARS[model] for shape in ((8, inner), (outer, 8))]
    dense = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    masks = [torch.rand(shape, device=device) < active for shape in shapes]
    indexed = [lk.index_mask(mask) for mask in masks]
    params, params_8 = ([tensor.detach().clone() for tensor in dense] for _ in range(2))
    start = [tensor.clone() for tensor in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros(index.active, device=device) for index in indexed] for _ in range(2))
    codes = [[torch.zeros(index.active, dtype=dtype, device=device) for index in indexed]
             for dtype in (torch.int8, torch.uint8)]  # fmt: skip
    scales = [torch.zeros(2, -(-tensor.numel() // TILE), device=device) for tensor in params]
    optimizer = torch.optim.AdamW(dense, lr=LR, weight_decay=DECAY, fused=True)
    for tensor, grad in zip(dense, grads):
        tensor.grad = grad
    steps = {"ours": 0, "8-bit": 0}
    elements, kept = sum(mask.numel() for mask in masks), sum(index.active for index in indexed)
    source = torch.ones(elements * 3, device=device)
    target = torch.empty_like(source)

    prepared = lk.PreparedAdamW(params, indexed, exp_avgs, exp_avg_sqs)
    prepared_8 = lk.PreparedAdamW(params_8, indexed, codes[0], codes[1], scales=scales)

    def ours():
        steps["ours"] += 1
        prepared.step(grads, steps["ours"], lr=LR, weight_decay=DECAY)

    def ours_8_bit():
        steps["8-bit"] += 1
        prepared_8.step(grads, steps["8-bit"], lr=LR, weight_decay=DECAY)

    def copy():
        target.copy_(source)

    # One call of each warms up, so all are at one step throughout.
    ways = {
        "ours": ours,
        "torch's fused AdamW": optimizer.step,
        "ours, 8-bit moments": ours_8_bit,
        "a copy of 24 bytes an element": copy,
    }
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"masked_adamw {device} {model} {active:.0%} active", ways, device, rounds=15)
    timed.required |= REQUIRED.get((model, active), {})
    for mine, theirs, eight, mask, before in zip(params, dense, params_8, masks, start):
        torch.testing.assert_close(mine[mask], theirs.detach()[mask], rtol=1e-5, atol=1e-6)
        for stepped in (mine, eight):
            assert torch.equal(stepped[~mask], before[~mask])
    state = [sum(tensor.nbytes for tensor in tensors) / kept for tensors in
             ((*exp_avgs, *exp_avg_sqs), (*codes[0], *codes[1], *scales))]  # fmt: skip
    # Parameters read and written, gradients read, moments of active elements read and written.
    moved = 12 * elements + 16 * kept
    bandwidth = moved / timed.median("ours")
    copied = 24 * elements / timed.median("a copy of 24 bytes an element")
    timed.facts = {"elements": elements, "tensors": len(masks), "state_bytes_an_active_element": state,
                   "bytes_per_second": bandwidth, "share_of_a_copys_bandwidth": bandwidth / copied}  # fmt: skip
    report(timed)
