"""`masked_adamw` with 40 % active against torch's fused AdamW over every element, on SmolLM2-135M's factors (r = 8).

What a step saves in memory is certain (8 bytes an active element); this says what it costs or saves in time.
"""

import pytest
import torch

import lorapar_kernels as lk
from bench.interleaved import interleave

LR, DECAY = 2e-4, 0.1
# In and out features of q, k, v, gate, up, down in each of 30 layers.
LINEARS = [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30
SHAPES = [shape for inner, outer in LINEARS for shape in ((8, inner), (outer, 8))]


@pytest.mark.parametrize("active", [0.4, 1.0], ids=["40%", "all"])
def test_masked_adamw(benchmark, report, device, active):
    torch.manual_seed(0)
    dense = [torch.randn(shape, device=device).requires_grad_() for shape in SHAPES]
    grads = [torch.randn(shape, device=device) for shape in SHAPES]
    masks = [torch.rand(shape, device=device) < active for shape in SHAPES]
    params = [tensor.detach().clone() for tensor in dense]
    start = [tensor.clone() for tensor in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros(int(mask.sum()), device=device) for mask in masks] for _ in range(2))
    optimizer = torch.optim.AdamW(dense, lr=LR, weight_decay=DECAY, fused=True)
    for tensor, grad in zip(dense, grads):
        tensor.grad = grad
    step = 0

    def ours():
        nonlocal step
        step += 1
        lk.masked_adamw(params, grads, masks, exp_avgs, exp_avg_sqs, step, lr=LR, weight_decay=DECAY)

    # One call of each warms up, so both are at one step throughout.
    ours()
    optimizer.step()
    ways = {"ours": ours, "torch's fused AdamW": optimizer.step}
    timed = interleave(benchmark, f"masked_adamw {device} {active:.0%} active", ways, device, rounds=9)
    for mine, theirs, mask, before in zip(params, dense, masks, start):
        torch.testing.assert_close(mine[mask], theirs.detach()[mask], rtol=1e-5, atol=1e-6)
        assert torch.equal(mine[~mask], before[~mask])
    timed.facts = {"elements": sum(mask.numel() for mask in masks), "tensors": len(SHAPES)}
    report(timed)
