"""Bytes that one training step needs beside the weights, from the model's configuration alone.

The model's own code runs forward and backward on tensors without data (torch's FakeTensorMode), with a few of its
layers and then with one more of each kind; every storage is counted while it lives, and what a layer adds is taken
times the number of layers of its kind (full and sliding-window attention, linear attention, experts). So attention
kernels, norms and checkpointing cost what they cost in this version of the libraries, and no table of formulas has to
be kept.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..model.load import auto_class

MOST_KINDS = 6  # of layers; a model with more (one of its own width each) is run whole


@dataclass(frozen=True)
class TrainingStep:
    """A forward and backward over `rows` rows of `tokens` tokens."""

    rows: int
    tokens: int
    checkpointing: bool = False
    offloading: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made under it while that storage lives; `peak` is the most at one time.

    `weights`: storages that are there before, so that a view of one counts nothing.
    """

    def __init__(self, weights: Iterable[int] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set(weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Experts' products: on a CPU torch takes fp32 too, and without data refuses it.
            out = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
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
    def __init__(self, linear: nn.Linear):
        super().__init__()
        # Some models ask a layer for its weight's dtype or device.
        self.out_features, self.weight, self.bias = linear.out_features, linear.weight, linear.bias

    def forward(self, x: Tensor) -> Any:
        return FrozenProduct.apply(x, self.out_features)


class NotSimulated(RuntimeError):
    """The model's code does not run without data; the message says in one line what stood in its way."""


def step_bytes(config: PretrainedConfig, step: TrainingStep, dtype: torch.dtype, device: str) -> int:
    """The peak of one step over the weights, up to the last hidden state and back, all linear layers frozen under LoRA.

    A LoRA layer keeps its input and nothing else (lorapar_kernels/lora_linear.py).
    Raises NotSimulated where the model's code cannot be run without data.
    """
    try:
        return _simulation(config, dtype, device).step_bytes(step)
    except Exception as error:  # the model's own code, which may be anybody's
        said = str(error).strip().splitlines()
        raise NotSimulated(f"{type(error).__name__}: {said[0] if said else 'no message'}") from error


_LAST: dict[Any, "Simulation"] = {}


def _simulation(config: PretrainedConfig, dtype: torch.dtype, device: str) -> "Simulation":
    """Made once for the many steps that a plan asks about."""
    key = (type(config), config.to_json_string(), dtype, device)
    if key not in _LAST:
        made = Simulation(config, dtype, device)
        _LAST.clear()
        _LAST[key] = made
    return _LAST[key]


class Simulation:
    """A model without data, whose decoder can be run with any choice of its layers."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: str):
        self.mode, self.device = FakeTensorMode(allow_non_fake_inputs=True), device
        # Some towers draw their first weights by the values of others.
        with self.mode, torch.device(device), no_init_weights():
            self.model: Any = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
            self.model.requires_grad_(False)
            for name, module in list(self.model.named_modules()):
                # One with a forward of its own may return something else (Llama 4's router: scores and logits).
                plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
                if plain and module is not self.model.get_output_embeddings():
                    self.model.set_submodule(name, StandIn(module))
            self.model.train()
            self.model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        self.weights = {parameter.untyped_storage()._cdata for parameter in self.model.parameters()}
        # Of a multimodal model the language model, which is what text rows go through.
        self.decoder = self.model.get_decoder()
        self.count = config.get_text_config().num_hidden_layers
        lists = [(name, module) for name, module in self.decoder.named_modules() if isinstance(module, nn.ModuleList)]
        self.stack, self.layers = next(((name, list(m)) for name, m in lists if len(m) == self.count), ("", []))
        configs = {id(module.config): module.config for module in self.decoder.modules()
                   if isinstance(module, PreTrainedModel)}  # fmt: skip
        # What a configuration says of each layer, by its place.
        self.per_layer = [
            (config, key, value)
            for config in configs.values()
            for key, value in vars(config).items()
            if isinstance(value, list) and len(value) == self.count
        ]
        self.configs, self.checkpointing = list(configs.values()), False

    def step_bytes(self, step: TrainingStep) -> int:
        """The peak of a few layers, and for each kind of layer what one more of it adds, times how many there are."""
        kinds: dict[Any, list[int]] = {}
        for place in range(len(self.layers)):
            kinds.setdefault(self._kind(place), []).append(place)
        if not self.layers or len(kinds) > MOST_KINDS:
            return self.peak(list(range(len(self.layers))), step)
        few = [places[0] for places in kinds.values()] * (2 if len(kinds) == 1 else 1)
        total = peak = self.peak(few, step)
        for places in kinds.values():
            more = len(places) - few.count(places[0])
            if more:
                total += more * (self.peak(sorted([*few, places[0]]), step) - peak)
        return total

    def _kind(self, place: int) -> Any:
        """What makes one layer need other memory than another: its modules, their shapes, and its settings."""
        layer = self.layers[place]
        modules = tuple((name, type(module).__name__, getattr(module, "out_features", None))
                        for name, module in layer.named_modules())  # fmt: skip
        shapes = tuple(tuple(parameter.shape) for parameter in layer.parameters())
        return modules, shapes, tuple(str(value[place]) for _, _, value in self.per_layer)

    def peak(self, places: list[int], step: TrainingStep) -> int:
        """Of a forward and backward through the layers at these places, one after another."""
        if self.layers:
            self.decoder.set_submodule(self.stack, nn.ModuleList(self.layers[place] for place in places))
            for config, key, value in self.per_layer:
                setattr(config, key, [value[place] for place in places])
            for config in self.configs:
                config.num_hidden_layers = len(places)
        if step.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.checkpointing = step.checkpointing
        away = offloaded(self.weights) if step.offloading else contextlib.nullcontext()
        with _quiet(), self.mode, torch.device(self.device):
            ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
            # Rows of a batch are padded, so there is a mask.
            mask = torch.ones_like(ids)
            with LiveBytes(self.weights) as counted, away:
                # The last hidden state, or logits where the model is all one module.
                hidden = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                hidden.backward(torch.empty_like(hidden))
        return counted.peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch prints a traceback for each operation that fails without data, before it raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
