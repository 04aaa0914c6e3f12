"""The ways of one LoRA layer that the benchmarks compare: forward, and backward with dX, dA and dB; B ≠ 0.

ours                    lora_linear, fp32 factors beside a bf16 base as PEFT keeps them
ours, plain product     on a GPU: with torch's product and the expand added to it (LORAPAR_PRODUCT=plain), and
ours, fused product     with one that carries the expand (LORAPAR_PRODUCT=fused); ours takes the faster as timed
frozen nn.Linear        the base alone, forward and dX: what any LoRA layer costs at least
PEFT's layer            as PEFT makes it: fp32 factors
PEFT's layer, bf16      its factors in the base's dtype (where that is not fp32)
addmm_, no dropout      baselines/addmm.py (where p is 0)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorapar_kernels as lk
from bench.baselines.addmm import addmm_lora
from lorapar_kernels import lora_product

SCALING = 2.0


@dataclass(frozen=True)
class Layer:
    """One case. tokens, n_in, n_out, rank: sizes; p: dropout; dtype: of x and the base."""

    tokens: int
    n_in: int
    n_out: int
    rank: int
    p: float
    dtype: torch.dtype
    device: str

    @property
    def case(self) -> str:
        sizes = f"T={self.tokens} {self.n_in}->{self.n_out} r={self.rank}"
        return f"lora_linear {self.device} {sizes} {str(self.dtype)[6:]} p={self.p}"

    def frozen_flops(self) -> int:
        """Of the base's product and of dX's."""
        return 4 * self.tokens * self.n_in * self.n_out

    def least_bytes(self) -> int:
        """Each of x, W, y, dY, W, dX read or written once."""
        size = torch.finfo(self.dtype).bits // 8
        return 2 * size * (self.tokens * (self.n_in + self.n_out) + self.n_in * self.n_out)

    def ways(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """name -> a call that gives y, dX and, but for the frozen layer, dA and dB; ours first."""
        torch.manual_seed(0)
        on: dict[str, Any] = {"device": self.device}
        base = nn.Linear(self.n_in, self.n_out, bias=False, dtype=self.dtype, **on).requires_grad_(False)
        a = torch.randn(self.rank, self.n_in, **on).div_(self.n_in**0.5).requires_grad_()
        b = torch.randn(self.n_out, self.rank, **on).mul_(0.1).requires_grad_()
        x = torch.randn(self.tokens, self.n_in, dtype=self.dtype, **on).requires_grad_()
        dy = torch.randn(self.tokens, self.n_out, dtype=self.dtype, **on)
        seed = torch.randint(2**62, (1,), **on) if self.p else None
        weight = base.weight

        def gradients(y: Tensor, *leaves: Any) -> tuple[Tensor, ...]:
            return y.detach(), *torch.autograd.grad(y, (x, *leaves), dy)

        def ours(product: str) -> tuple[Tensor, ...]:
            with forced_product(product):
                return gradients(lk.lora_linear(x, weight, a, b, SCALING, dropout_p=self.p, seed=seed), a, b)

        ways = {"ours": lambda: ours(""), "frozen nn.Linear": lambda: gradients(base(x))}
        if self.device == "cuda":
            ways |= {f"ours, {product} product": lambda product=product: ours(product) for product in lora_product.WAYS}
        for name, dtype in {"PEFT's layer": torch.float32, "PEFT's layer, bf16": self.dtype}.items():
            layer = peft_layer(base, a, b, self.p, dtype)
            if layer is not None and not (name.endswith("bf16") and self.dtype == torch.float32):
                factors = [parameter for key, parameter in layer.named_parameters() if ".default." in key]
                ways[name] = lambda layer=layer, factors=factors: gradients(layer(x), *factors)
        if self.p == 0.0:
            narrow = [t.detach().to(self.dtype).requires_grad_() for t in (a, b)]
            ways["addmm_, no dropout"] = lambda: gradients(
                addmm_lora(x, weight, narrow[0], narrow[1], SCALING), *narrow
            )
        return ways


@contextmanager
def forced_product(way: str) -> Iterator[None]:
    """LORAPAR_PRODUCT=way within the block, unset where it is empty."""
    before = os.environ.get(lora_product.VARIABLE, "")
    os.environ[lora_product.VARIABLE] = way
    try:
        yield
    finally:
        os.environ[lora_product.VARIABLE] = before


def peft_layer(base: nn.Linear, a: Tensor, b: Tensor, p: float, dtype: torch.dtype) -> nn.Module | None:
    """PEFT's own layer of the same base and factors, None where PEFT is not installed."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return None
    rank, alpha = a.shape[0], int(SCALING * a.shape[0])
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=p)
    layer = Linear(deepcopy(base), "default", config=config, r=rank, lora_alpha=alpha).to(base.weight.device)
    for factors, given in ((layer.lora_A, a), (layer.lora_B, b)):
        factors["default"].weight = nn.Parameter(given.detach().clone().to(dtype))
    return layer.train()


def launches(call: Callable[[], object]) -> int:
    """Kernels that one call puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events: Any = profiled.events()
    return sum("CUDA" in str(event.device_type) for event in events)


def peak_bytes(call: Callable[[], object]) -> int:
    """Device memory that one call takes at its peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
