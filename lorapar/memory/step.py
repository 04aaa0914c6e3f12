"""Bytes that one training step needs beside the weights, from the model's configuration alone.

The model's own code runs forward and backward on tensors without data (torch's FakeTensorMode), with two and with three
of its layers; every storage is counted while it lives, and what a layer adds is taken times the number of layers. So
attention kernels, norms and checkpointing cost what they cost in this version of the libraries, and no table
of formulas has to be kept.
"""

import contextlib
import copy
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class TrainingStep:
    """A forward and backward over `rows` rows of `tokens` tokens."""

    rows: int
    tokens: int
    checkpointing: bool = False
    offloading: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made under it while that storage lives; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class Away(NamedTuple):
    """A saved tensor that waits in the host's memory: what it takes to have it back."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def offloaded(weights: set[int]) -> saved_tensors_hooks:
    """What autograd saves, but for `weights` (by storage), is given up in the forward and made anew in the backward.

    TRL's off-loading keeps five tensors longer, until their copies are done, which is not counted.
    """

    def pack(tensor: Tensor) -> Tensor | Away:
        if tensor.untyped_storage()._cdata in weights:
            return tensor
        return Away(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def unpack(saved: Tensor | Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return torch.empty_strided(saved.shape, saved.stride, dtype=saved.dtype, device=saved.device)

    return saved_tensors_hooks(pack, unpack)


class FrozenProduct(torch.autograd.Function):
    """A LoRA layer as memory sees it: x is kept for the factors' gradients, the weight's gradient is not made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.empty_like(x), None


class StandIn(nn.Module):
    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Any:
        return FrozenProduct.apply(x, self.out_features)


def step_bytes(config: PretrainedConfig, step: TrainingStep, dtype: torch.dtype, device: str) -> int:
    """The peak of one step over the weights, up to the last hidden state and back, all linear layers frozen under LoRA.

    A LoRA layer keeps its input and nothing else (lorapar_kernels/lora_linear.py).
    """
    text = config.get_text_config()
    few = [_peak_of(config, n, step, dtype, device) for n in (2, 3)]
    return few[0] + (text.num_hidden_layers - 2) * (few[1] - few[0])


def _peak_of(config: PretrainedConfig, layers: int, step: TrainingStep, dtype: torch.dtype, device: str) -> int:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:layers])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, StandIn(module.out_features))
        model.train()
        if step.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with LiveBytes() as counted, offloaded(weights) if step.offloading else contextlib.nullcontext():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.backward(torch.empty_like(hidden))
    return counted.peak
