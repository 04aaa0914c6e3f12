"""The ways of one LoRA layer that the benchmarks compare: forward, and backward with dX, dA and dB; B ≠ 0.

ours                    lora_linear, fp32 factors beside a bf16 base as PEFT keeps them
ours plain              the same with torch's product and the expand added to it (LORAPAR_PRODUCT=plain), and
ours fused              with one that carries the expand (LORAPAR_PRODUCT=fused); ours takes the faster as timed
frozen nn.Linear        the base alone, forward and dX: what any LoRA layer costs at least
PEFT's layer            as PEFT makes it: fp32 factors
PEFT's layer, bf16      its factors in the base's dtype (where that is not fp32)
addmm_, no dropout      baselines/addmm.py (where p is 0)
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorapar_kernels as lk
from bench.baselines.addmm import addmm_lora
from lorapar_kernels import lora_product

SCALING = 2.0
OURS = {"": "ours", "plain": "ours plain", "fused": "ours fused"}
FROZEN, PEFT, PEFT_NARROW, ADDMM = "frozen nn.Linear", "PEFT's layer", "PEFT's layer, bf16", "addmm_, no dropout"

Results = tuple[Tensor, ...]
Way = Callable[[], Results]


@dataclass(frozen=True)
class Layer:
    """One case. tokens, n_in, n_out, rank: sizes; p: dropout; dtype: of x and the base; active: share of the elements
    of A and B that the masks keep, 1: no masks."""

    tokens: int
    n_in: int
    n_out: int
    rank: int
    p: float
    dtype: torch.dtype
    device: str
    active: float = 1.0

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

    def ways(self, products: Sequence[str] = ("",)) -> dict[str, Way]:
        """name -> a call that gives y, dX and, but for the frozen layer, dA and dB; ours first, of each product."""
        made = Made(self)
        ways = {OURS[product]: made.ours(product) for product in products} | {FROZEN: made.frozen()}
        with suppress(ImportError):
            ways |= made.peft_ways()
        if self.p == 0.0:
            ways[ADDMM] = made.addmm()
        return ways


class Made:
    """A layer's tensors, and the ways over them."""

    def __init__(self, layer: Layer):
        torch.manual_seed(0)
        on: dict[str, Any] = {"device": layer.device}
        self.layer = layer
        base = nn.Linear(layer.n_in, layer.n_out, bias=False, dtype=layer.dtype, **on)
        self.base = base.requires_grad_(False)
        self.a = torch.randn(layer.rank, layer.n_in, **on).div_(layer.n_in**0.5).requires_grad_()
        self.b = torch.randn(layer.n_out, layer.rank, **on).mul_(0.1).requires_grad_()
        self.x = torch.randn(layer.tokens, layer.n_in, dtype=layer.dtype, **on).requires_grad_()
        self.dy = torch.randn(layer.tokens, layer.n_out, dtype=layer.dtype, **on)
        self.seed = torch.randint(2**62, (1,), **on) if layer.p else None
        self.masks: tuple[Tensor | None, ...] = None, None
        if layer.active < 1.0:
            self.masks = tuple(torch.rand(factor.shape, **on) < layer.active for factor in (self.a, self.b))

    def _gradients(self, y: Tensor, *leaves: Any) -> Results:
        return y.detach(), *torch.autograd.grad(y, (self.x, *leaves), self.dy)

    def frozen(self) -> Way:
        return lambda: self._gradients(self.base(self.x))

    def ours(self, product: str = "", masked: bool = True) -> Way:
        mask_a, mask_b = self.masks if masked else (None, None)
        options: dict[str, Any] = {"mask_a": mask_a, "mask_b": mask_b, "dropout_p": self.layer.p, "seed": self.seed}

        def way() -> Results:
            with forced_product(product):
                y = lk.lora_linear(self.x, self.base.weight, self.a, self.b, SCALING, **options)
                return self._gradients(y, self.a, self.b)

        return way

    def peft_ways(self) -> dict[str, Way]:
        """With factors of each dtype; raises what PEFT raises, ImportError where it is not installed."""
        return {
            name: self._peft(dtype)
            for name, dtype in ((PEFT, torch.float32), (PEFT_NARROW, self.layer.dtype))
            if name == PEFT or dtype != torch.float32
        }

    def _peft(self, dtype: torch.dtype) -> Way:
        layer = peft_layer(self.base, self.a, self.b, self.layer.p, dtype)
        factors = [parameter for key, parameter in layer.named_parameters() if ".default." in key]
        return lambda: self._gradients(layer(self.x), *factors)

    def addmm(self) -> Way:
        """Factors of x's dtype, no dropout whatever the layer's p, no masks."""
        a, b = (factor.detach().to(self.layer.dtype).requires_grad_() for factor in (self.a, self.b))
        return lambda: self._gradients(addmm_lora(self.x, self.base.weight, a, b, SCALING), a, b)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """The variable at this value within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def forced_product(way: str) -> Any:
    """LORAPAR_PRODUCT=way within the block; "" forces none."""
    return environment(lora_product.VARIABLE, way)


def peft_layer(base: nn.Linear, a: Tensor, b: Tensor, p: float, dtype: torch.dtype) -> nn.Module:
    """PEFT's own layer of the same base and factors."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

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
