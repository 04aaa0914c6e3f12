"""The frozen weights of bitsandbytes' 4-bit and 8-bit layers, dequantised where a product needs them; imports
bitsandbytes, and is imported where that is installed.

The base's product is y = x Wᵀ + bias with W dequantised for that product alone, once in the forward and once more in
the backward, into one buffer that every layer shares; neither W nor x is kept for it. In a LoRA layer `QuantisedWeight`
stands where a plain layer has its weight, and the op adds both products to one y and to one dX. A layer without an
adapter, and one whose base has hooks or a compute dtype of its own, makes its product alone (`FrozenProduct`). Where no
gradient is asked for, a 4-bit base's product is bitsandbytes' own, whose fused kernels serve the few tokens of a
generation step.

Trade-off: an 8-bit base computes with x as it is, where bitsandbytes rounds x to 8 bits as well (LLM.int8()) in
evaluation and, on a GPU, in training: the same function in training, in rollouts and in evaluation, and no kept x, for
products in x's dtype.
"""

import types
from typing import Any, cast

import bitsandbytes.functional as bnb_functional
import bitsandbytes.nn.modules as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# One flat buffer a device, dtype and CUDA stream, as large as the largest weight so far. A stream runs in order, so a
# product has read the buffer before the next weight is written there; products on two streams have one each.
_buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def _stream(device: torch.device) -> int | None:
    """The current stream's handle, 0 on a CPU; None while it is captured into a CUDA graph."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def _buffer(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    stream = _stream(device)
    if stream is None:
        # A graph writes where it wrote when it was captured. A buffer of ours may have been freed by then; the graph's
        # own memory stays, and is the next product's again as soon as this one has read it.
        return torch.empty(shape, dtype=dtype, device=device)
    there = _buffers.get((device, dtype, stream))
    if there is None or there.numel() < shape.numel():
        there = _buffers[device, dtype, stream] = torch.empty(shape.numel(), dtype=dtype, device=device)
    return there[: shape.numel()].view(shape)


def free_buffers() -> None:
    """Let go of every buffer: torch's allocator takes each back in the order of its stream, so none is still read."""
    _buffers.clear()


def quant_state(base: Any) -> Any:
    """The scales and the shape of a 4-bit layer's weight; None before it is quantised.

    The layer keeps them too: a parameter that FSDP puts in the place of bitsandbytes' own has none.
    """
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def dequantised(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a bitsandbytes layer, [out, in] in `dtype`, in a buffer that the next call writes over.

    Each element is what bitsandbytes' own forward multiplies by, rounded once to `dtype`.
    """
    weight, state = cast(Any, base.weight), cast(Any, base)
    if not isinstance(base, bnb.Linear4bit):
        # bitsandbytes moves the weight and its scales into `state` at its own first forward.
        moved = weight.CB is None
        codes, scales = (state.state.CB, state.state.SCB) if moved else (weight.CB, weight.SCB)
        out = _buffer(codes.shape, codes.device, dtype)
        return torch.mul(codes, scales.unsqueeze(1) * (1.0 / 127.0), out=out)
    state = quant_state(base)
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(absmax, state.state2) + state.offset
    arguments = weight.data.view(-1, 1), absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
    if weight.device.type == "cpu":
        # bitsandbytes has no CPU kernel that writes where it is told.
        return torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
    out = _buffer(state.shape, weight.device, dtype)
    torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
    return out


class QuantisedWeight:
    """The weight of a bitsandbytes layer as a `FrozenWeight` of lora_linear.py: its values where they are needed.

    It holds the layer and no tensor, so that a graph that keeps it keeps nothing of the weight's size.
    """

    __slots__ = ("_base", "device", "shape")

    def __init__(self, base: Any):
        self._base = base
        self.device: torch.device = base.weight.device
        self.shape = torch.Size((base.out_features, base.in_features))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, in a buffer that the next call of any weight writes over."""
        return dequantised(self._base, dtype)


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias with W dequantised from `base`; x [..., in] and the result [..., out] share a dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module) -> Tensor:  # type: ignore[override]
        ctx.base = base
        bias = cast("Tensor | None", base.bias)
        return F.linear(x, dequantised(base, x.dtype), None if bias is None else bias.to(x.dtype))

    # Once more and the weight would have to be made a third time; torch refuses it in words.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ dequantised(ctx.base, grad.dtype), None


def _dtypes(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What the product is computed in and what it is returned in; under autocast, autocast's dtype for both."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype, dtype
    return getattr(base, "compute_dtype", None) or x.dtype, x.dtype


def forward(base: Any, x: Tensor) -> Tensor:
    """What `take_over` puts in the place of a bitsandbytes layer's forward; under autocast, in autocast's dtype."""
    dtype, out_dtype = _dtypes(base, x)
    if isinstance(base, bnb.Linear4bit) and not (torch.is_grad_enabled() and x.requires_grad):
        return type(base).forward(base, x).to(out_dtype)
    return cast(Tensor, FrozenProduct.apply(x.to(dtype), base)).to(out_dtype)


def take_over(module: nn.Module) -> None:
    """Give a 4-bit or 8-bit layer the product above; a subclass with a forward of its own keeps that.

    bitsandbytes would also repack 4-bit weights in place at the first forward in evaluation on a CPU with AVX512-BF16,
    and compute without autograd from then on: training after an evaluation would lose the gradient of x in silence.
    """
    if type(module).forward in (bnb.Linear4bit.forward, bnb.Linear8bitLt.forward):
        # accelerate's hooks (a model on several devices) stand in the place of the forward, and call this one.
        name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        setattr(module, name, types.MethodType(forward, module))
    if isinstance(module, bnb.Linear4bit):
        module.support_avx512bf16_for_cpu = False


def _has_own_forward(base: Any) -> bool:
    """Whether the layer computes by something else than bitsandbytes' forward or the one above."""
    on_instance = base.__dict__.get("forward")
    if on_instance is not None:
        return getattr(on_instance, "__func__", None) is not forward
    return type(base).forward not in (bnb.Linear4bit.forward, bnb.Linear8bitLt.forward)


def frozen_weight(base: Any, x: Tensor) -> QuantisedWeight | None:
    """The weight of a layer of bitsandbytes, for an op that makes the base's product of x together with the adapter's.

    None where `base(x)` has to make it: something of its own happens in the call, the product is computed in another
    dtype than x's, the bias is trained, or no gradient is asked of a 4-bit layer. Whoever asks has looked for hooks.
    """
    kind = type(base._parameters.get("weight"))
    # FSDP's is a plain one while its block computes.
    of_fsdp = kind is nn.Parameter and isinstance(base, bnb.Linear4bit) and base.quant_state is not None
    if _has_own_forward(base) or not (of_fsdp or kind in (bnb.Params4bit, bnb.Int8Params)):
        return None
    bias = base._parameters.get("bias")
    if (bias is not None and bias.requires_grad) or torch.compiler.is_compiling():
        return None
    if isinstance(base, bnb.Linear4bit):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return None
    elif base.state.has_fp16_weights:
        return None
    dtype, out_dtype = _dtypes(base, x)
    return QuantisedWeight(base) if dtype == out_dtype else None
