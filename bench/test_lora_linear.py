"""`lora_linear` forward and backward against the frozen layer alone and PEFT's LoRA layer; 512 tokens, r = 8, B ≠ 0.

The adapter is fp32 beside a bf16 layer, as PEFT has it, and x needs a gradient, as inside a model.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

import lorapar_kernels as lk
from bench.interleaved import interleave

TOKENS, RANK, ALPHA = 512, 8, 16
# Largest difference over the largest value that rounding may make; bf16 has 8 bits and PEFT rounds at other places.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def peft_layer(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, p: float) -> nn.Module | None:
    """PEFT's own layer of the same base and factors, None where PEFT is not installed."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return None
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p)
    layer = Linear(deepcopy(base), "default", config=config, r=RANK, lora_alpha=ALPHA)
    layer.lora_A["default"].weight.data = a.detach().clone()
    layer.lora_B["default"].weight.data = b.detach().clone()
    return layer.to(base.weight.device)


@pytest.mark.parametrize("p", [0.0, 0.05], ids=["p0", "p05"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("out_features", [2048, 5632])
def test_lora_linear(benchmark, report, device, out_features, dtype, p):
    torch.manual_seed(0)
    base = nn.Linear(2048, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
    a = torch.randn(RANK, 2048, device=device).div_(2048**0.5).requires_grad_()
    b = torch.randn(out_features, RANK, device=device).mul_(0.1).requires_grad_()
    x = torch.randn(TOKENS, 2048, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(TOKENS, out_features, device=device, dtype=dtype)
    seed = torch.randint(2**62, (1,), device=device) if p else None

    def ours():
        y = lk.lora_linear(x, base.weight, a, b, ALPHA / RANK, dropout_p=p, seed=seed)
        return (y.detach(), *torch.autograd.grad(y, (x, a, b), dy))

    def frozen():
        return torch.autograd.grad(base(x), x, dy)

    ways = {"ours": ours, "frozen nn.Linear": frozen}
    layer = peft_layer(base, a, b, p)
    if layer is not None:
        factors = [parameter for name, parameter in layer.named_parameters() if ".default." in name]

        def peft():
            y = layer(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *factors), dy))

        ways["PEFT's layer"] = peft
    for way in ways.values():
        way()
    calls = 20 if device == "cuda" else 1
    case = f"lora_linear {device} 2048->{out_features} {str(dtype)[6:]} p={p}"
    timed = interleave(benchmark, case, ways, device, rounds=7, calls=calls)
    # The two draw different dropout masks, so there is nothing to compare where p > 0.
    if layer is not None and p == 0.0:
        for mine, theirs in zip(timed.results["ours"], timed.results["PEFT's layer"], strict=True):
            difference = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
            assert difference < BOUND[dtype]
    timed.facts = {"tokens": TOKENS, "rank": RANK}
    report(timed)
