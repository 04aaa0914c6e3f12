"""The LoRA layers: PEFT's own, computed by `lorapar_kernels`, with the masks of the running stage.

`MaskedLayer` goes ahead of a PEFT layer class; PEFT's names, saving, loading and adapter switching are untouched.
`layers_bnb.py` has the layers of 4-bit and 8-bit bases. The functions at the end find a model's layers and set their
masks.

The base's product and the adapter's are one op where nothing can tell them apart: where the base is an `nn.Linear`
and nothing else (`is_plain`). Any other base is called as PEFT calls it and the adapter's share is added to what it
returns, so that a forward of its own, an inner adapter, hooks and offloading take part.

Under a twin start (attach.py) rows r..2r of A and columns r..2r of B are the start's negative. A slice i that no stage
has moved still cancels its twin r + i to the last bit, so both are left out of every product (`live_ranks`): at rank
granularity a layer runs at its active rank.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import lorapar_kernels as lk

from ..errors import InputError

if TYPE_CHECKING:
    from ..partitioning.partition import Partition

ADAPTER = "default"  # TRL looks for this name
# Torch's own, which a library may replace for every layer.
_FORWARD, _LINEAR = nn.Linear.forward, F.linear


class MaskedLayer(Linear if TYPE_CHECKING else object):
    """A mixin ahead of one of PEFT's LoRA layers; gradients are masked by `mask_a` and `mask_b`.

    Attributes:
        mask_a, mask_b: bool, of lora_A's and lora_B's shape, or None: what the running stage may change.
        live_ranks: int64 indices of the slices that do not cancel their twin, or None: all are computed with.
        trainable_rank: r; rows from there on are the frozen twin.
        scoring: where a scoring pass adds its sums (see `lorapar.score`), else None; offsets: its examples, or None
            while it takes one example at a time.
    """

    mask_a: Tensor | None
    mask_b: Tensor | None
    live_ranks: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        super().__init__(base_layer, adapter_name, **kwargs)
        for name in ("mask_a", "mask_b", "live_ranks"):
            self.register_buffer(name, None, persistent=False)
        self.trainable_rank: int = self.r[adapter_name]
        self.scoring: lk.ScoreSums | None = None
        self.offsets: lk.Examples | Tensor | None = None
        self._unmerged: Any = None
        self._merged_sum: str | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Out of the dictionaries, here and below: a module's attribute costs half a microsecond to two.
        there, buffers = cast(nn.ModuleDict, self._modules["lora_A"])._modules, self._buffers
        names = [name for name in self.active_adapters if name in there]
        if self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        for_variants = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS} if kwargs else {}
        kwargs.pop("adapter_names", None)
        if self.scoring is not None:
            return self.scored(x, *args, **kwargs)
        y: Tensor | None = None
        alone = _nothing_watches_all()
        if args or kwargs or not (alone and self.can_fuse()):
            y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for name in names:
            if not (alone and self.is_vanilla(name)):
                y = self.as_peft(self.base_layer(x) if y is None else y, x, name, for_variants | kwargs)
                continue
            a, b, scaling = self.factors(name)
            masks, live = (buffers["mask_a"], buffers["mask_b"]), buffers["live_ranks"]
            if name != ADAPTER:
                masks = None, None
            elif live is not None:
                a, b, masks = select_ranks(a, b, *masks, live)
            if a.shape[0] > 0:
                y = self.added(y, x, a, b, scaling, *masks, *self.draw_dropout(name, x.device))
        return self.base_layer(x) if y is None else y

    def can_fuse(self) -> bool:
        """Whether `added` makes the base's product itself where y is None."""
        return False

    def is_vanilla(self, name: str) -> bool:
        """Whether the adapter's share is s · drop(x) Aᵀ Bᵀ of the two weights, and its modules have no hooks."""
        if name in self.lora_variant or self.lora_bias[name]:
            return False
        parts: Any = self._modules
        return (
            is_plain(parts["lora_A"]._modules[name])
            and is_plain(parts["lora_B"]._modules[name])
            and _is_plain_dropout(parts["lora_dropout"]._modules[name])
        )

    def added(self, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scaling: float, *masks_p_seed: Any) -> Tensor:
        """One adapter's share added to y, what the base returned for x."""
        assert y is not None
        return lk.lora_add(y, x, *_as_wide(y, a, b), scaling, *masks_p_seed)

    def as_peft(self, y: Tensor, x: Tensor, name: str, kwargs: dict[str, Any]) -> Tensor:
        """An adapter's share by PEFT's arithmetic, module by module: a variant (DoRA, ...), hooks, a bias of B."""
        masks = (self.mask_a, self.mask_b) if name == ADAPTER else (None, None)
        a, b = cast(nn.Module, self.lora_A[name]), cast(nn.Module, self.lora_B[name])
        x = self._cast_input_dtype(x, cast(Tensor, a.weight).dtype)
        if name in self.lora_variant:
            if masks != (None, None):
                raise InputError(f"lora: the adapter {name!r} is no plain LoRA, and a partition masks plain LoRA alone")
            kwargs = dict.fromkeys(VARIANT_KWARG_KEYS) | kwargs
            share = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=y, **kwargs)
            return share.to(y.dtype)
        dropout = cast(nn.Module, self.lora_dropout[name])
        if type(dropout) is nn.Dropout and _is_plain_dropout(dropout) and _nothing_watches_all():
            p, seed = self.draw_dropout(name, x.device)
            # The elements that the op would drop.
            x = x if seed is None else torch.where(lk.dropout_mask(seed, list(x.shape), p), x / (1.0 - p), 0.0)
        else:
            x = dropout(x)
        share = _masked_call(b, _masked_call(a, x, masks[0]), masks[1])
        return (y + share * self.scaling[name]).to(y.dtype)

    def scored(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer of a scoring pass."""
        assert self.scoring is not None
        alone = _nothing_watches_all()
        if not self.is_vanilla(ADAPTER):
            raise InputError(
                "lora: hooks, a parametrization, a bias or a variant sits on lora_A or lora_B, whose importance cannot "
                "be measured; remove it before scoring"
            )
        a, b, scaling = self.factors(ADAPTER)
        fused = alone and self.can_fuse() and not args and not kwargs
        y = None if fused else cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.offsets is None:
            # One example, whose gradient autograd leaves in the factors.
            return self.added(y, x, a, b, scaling, None, None, 0.0, None)
        if y is None:
            base = cast(nn.Linear, self.base_layer)
            return lk.lora_linear_scored(x, base.weight, a, b, scaling, self.offsets, self.scoring, bias=base.bias)
        return lk.lora_add_scored(y, x, *_as_wide(y, a, b), scaling, self.offsets, self.scoring)

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        parts: Any = self._modules
        return parts["lora_A"]._modules[name].weight, parts["lora_B"]._modules[name].weight, self.scaling[name]

    def leave_meta(self) -> None:
        """Give the factors of an offloaded base memory, where PEFT leaves them on the meta device beside it.

        They begin as PEFT's do by default, on the device that accelerate computes the base on.
        """
        hook: Any = self.base_layer.__dict__.get("_hf_hook")
        hooks = getattr(hook, "hooks", (hook,))  # several in one, where more was asked for
        device = next((hook.execution_device for hook in hooks if hasattr(hook, "execution_device")), None)
        if self.factors(ADAPTER)[0].is_meta and device is not None:
            self.lora_A.to_empty(device=device)
            self.lora_B.to_empty(device=device)
            self.reset_lora_parameters(ADAPTER, True)

    def draw_dropout(self, name: str, device: torch.device) -> tuple[float, Tensor | None]:
        """p and a seed out of torch's generator, so that recompute under checkpointing repeats it."""
        dropout = cast(nn.ModuleDict, self._modules["lora_dropout"])._modules[name]
        if not self.training or not isinstance(dropout, nn.Dropout) or dropout.p == 0.0:
            return 0.0, None
        return dropout.p, torch.randint(2**62, (1,), device=device)

    def activate(self, mask_a: Tensor, mask_b: Tensor) -> None:
        """Take the masks of a stage, and find the slices that cancel their twin and stay so while it runs."""
        a, b, _ = self.factors(ADAPTER)
        if a.is_meta or b.is_meta:
            raise InputError("lora: the adapter's weights are offloaded (on the meta device), and cannot be trained")
        self.mask_a, self.mask_b = mask_a.to(a.device), mask_b.to(a.device)
        self.live_ranks = None
        r = self.trainable_rank
        if a.shape[0] != 2 * r:
            return
        with torch.no_grad():
            cancels = (a[:r] == a[r:]).all(1) & (b[:, :r] == -b[:, r:]).all(0)
            active = self.mask_a.any(1) | self.mask_b.any(0)
            live = (~cancels | active[:r] | active[r:]).nonzero().squeeze(1)
        if live.numel() < r:
            self.live_ranks = torch.cat((live, live + r))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # What is loaded need not cancel; `activate` looks again.
        self.live_ranks = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a copy of the base weight, so that `unmerge` gives the base back bit for bit.

        InputError where the base's output is not its weight's product, which PEFT would merge into all the same.
        """
        root = self.mergeable()
        # An inner adapter merges into the same weight, in an order of its own: PEFT's arithmetic then.
        if not self.merged and root is self.base_layer:
            bias = root.bias
            self._unmerged = self.set_aside(), bias if bias is None else cast(Tensor, bias).data
            if bias is not None:
                bias.data = cast(Tensor, bias.data).clone()
        elif self.merged_sum() != self._merged_sum:
            self._unmerged = None
        super().merge(safe_merge, adapter_names)
        self._merged_sum = self.merged_sum()

    def unmerge(self) -> None:
        """The base as it was before `merge`, to the last bit; by subtraction where something else changed it since."""
        if self._unmerged is None or not self.merged or self.merged_sum() != self._merged_sum:
            self._unmerged = None
            super().unmerge()
            return
        self.merged_adapters.clear()
        aside, bias = self._unmerged
        self.put_back(aside)
        if bias is not None:
            cast(Any, self.get_base_layer()).bias.data = bias
        self._unmerged = None

    def mergeable(self) -> nn.Module:
        """The base, whose output is its weight's product; InputError where it is not."""
        return self.get_base_layer()

    def merged_sum(self) -> str | None:
        """The sum of the base's weight, which another adapter around this layer changes as it merges and unmerges."""
        return None

    def set_aside(self) -> Any:
        """The base's weight, after leaving a copy of it in its place."""
        base = cast(nn.Linear, self.get_base_layer())
        weight = base.weight.data
        base.weight.data = weight.clone()
        return weight

    def put_back(self, aside: Any) -> None:
        """What `set_aside` gave."""
        cast(nn.Linear, self.get_base_layer()).weight.data = aside


class MaskedLinear(MaskedLayer, Linear):
    """Of an `nn.Linear`: one op makes the base's product and the adapter's."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any):
        if config.fan_in_fan_out:
            # As PEFT does it where the layer is its own; an nn.Linear keeps its weight as [out, in].
            warnings.warn(
                "lora.fan_in_fan_out: set to false, since the target is an nn.Linear (true is for Conv1D)", stacklevel=2
            )
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def mergeable(self) -> nn.Module:
        root = self.get_base_layer()
        # accelerate's forward on the instance computes what the class's does, which it leaves there in the end.
        forward = root.__dict__.get("forward", root.forward)
        patched = getattr(forward, "__func__", None) is not nn.Linear.forward and not hasattr(root, "_hf_hook")
        own_forward = patched or type(root).forward is not nn.Linear.forward
        # A parametrization, a weight norm and pruning make the weight anew in each call.
        weight = root._parameters.get("weight")
        if own_forward or type(weight) is not nn.Parameter:
            raise InputError(
                f"lora.target_modules: a target is a {type(root).__name__} with "
                f"{'a forward' if own_forward else 'a weight'} of its own; an adapter can be trained on it, but not "
                "merged into its weight or started from it"
            )
        if weight.is_meta:
            raise InputError("lora.target_modules: a target's weight is offloaded (on the meta device); load it first")
        return root

    def merged_sum(self) -> str | None:
        # As text, in which one NaN equals another.
        return float(cast(nn.Linear, self.get_base_layer()).weight.sum(dtype=torch.float64)).hex()

    def can_fuse(self) -> bool:
        base = cast(nn.Module, self._modules["base_layer"])
        if not is_plain(base):
            return False
        # The op gives the base no gradient.
        weight, bias = cast(Tensor, _tensor(base, "weight")), _tensor(base, "bias")
        return not (weight.requires_grad or (bias is not None and bias.requires_grad))

    def added(self, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scaling: float, *masks_p_seed: Any) -> Tensor:
        if y is not None:
            return super().added(y, x, a, b, scaling, *masks_p_seed)
        base = cast(nn.Linear, self._modules["base_layer"])
        return lk.lora_linear(x, base.weight, *_as_wide(x, a, b), scaling, base.bias, *masks_p_seed)


def is_plain(module: Any) -> bool:
    """Whether `module(x)` is x Wᵀ + bias and nothing else happens in the call.

    False for a subclass (a forward of its own, a parametrization), a forward put on the instance (accelerate), hooks,
    and a weight of a tensor class of its own (quantised, sharded). It is asked in every call: hooks come and go.
    """
    if type(module) is not nn.Linear or _is_watched(module):
        return False
    kind = type(_tensor(module, "weight"))
    return kind is nn.Parameter or kind is Tensor


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """`module`'s tensor of that name, quickly; a replica's (DataParallel) and a sharded layer's are no parameters."""
    return module._parameters.get(name) if name in module._parameters else module.__dict__.get(name)


def _nothing_watches_all() -> bool:
    """Whether no hook is on all modules, and nn.Linear computes what torch has it compute."""
    return not _has_any_global_hook() and nn.Linear.forward is _FORWARD and F.linear is _LINEAR


def _is_plain_dropout(module: Any) -> bool:
    return (type(module) is nn.Identity or type(module) is nn.Dropout) and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's forward; hooks on all modules are not asked for."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def _as_wide(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B at least as wide as x, as the ops take them; PEFT narrows x instead."""
    size = x.dtype.itemsize
    return a if a.dtype.itemsize >= size else a.to(x.dtype), b if b.dtype.itemsize >= size else b.to(x.dtype)


def _masked_call(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """module(x), hooks and all; where there is a mask, its weight's gradient is zero outside it."""
    if mask is None or not torch.is_grad_enabled():
        return module(x)
    weight = cast(Tensor, module.weight)
    return torch.func.functional_call(module, {"weight": torch.where(mask, weight, weight.detach())}, (x,))


def select_ranks(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, ranks: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Rows `ranks` of A and its mask, columns `ranks` of B and its mask; gradients go back to their places."""
    masks = None if mask_a is None else mask_a[ranks], None if mask_b is None else mask_b[:, ranks].contiguous()
    return a.index_select(0, ranks), b.index_select(1, ranks), masks


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Our layers by module name, InputError where an adapter sits on something else or on the output head."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, MaskedLayer):
            kind = type(module.get_base_layer()).__name__
            if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
                raise InputError(
                    f"lora.target_modules: {name} has a LoRA layer of PEFT's own; attach the adapter with "
                    "lorapar.attach, or load it with lorapar's layers"
                )
            if not isinstance(module, LoraLayer):
                other = type(module).__module__.split(".")[-2]
                raise InputError(
                    f"lora.target_modules: {name} has an adapter of another kind, {other}; a partition is of LoRA alone"
                )
            raise InputError(
                f"lora.target_modules: {name} is a {kind}; only nn.Linear and bitsandbytes' 4-bit and 8-bit layers "
                "can be partitioned"
            )
        if name.split(".")[-1] in ("lm_head", "embed_out"):
            raise InputError(f"lora.target_modules: {name} is the output head, which takes no adapter; leave it out")
        layers[name] = module
    if not layers:
        raise InputError("lora.target_modules: the model has no LoRA layer; attach an adapter first (lorapar.attach)")
    return layers


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """lora_A and lora_B of the trained adapter, by the names of `model.named_parameters()`."""
    ends = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def masks_by_parameter(model: nn.Module) -> dict[str, Tensor | None]:
    """The active mask of every LoRA parameter of the trained adapter; None: no stage is active."""
    masks = {}
    for name, layer in masked_layers(model).items():
        masks[f"{name}.lora_A.{ADAPTER}.weight"] = layer.mask_a
        masks[f"{name}.lora_B.{ADAPTER}.weight"] = layer.mask_b
    return masks


def activate(model: nn.Module, partition: "Partition", stage: Literal["sft", "grpo"]) -> None:
    """Set each layer's masks to what `stage` may change; a factor with nothing active needs no gradient.

    Raises InputError where the partition does not fit the model (naming the tensor and both shapes) or holds nothing
    active for the stage.
    """
    active = partition.active(stage)
    parameters = lora_parameters(model)
    check_fits(parameters, active, "partition")
    if not any(bool(mask.any()) for mask in active.values()):
        raise InputError(f"partition: no element is active in {stage}; raise theta, alpha or beta")
    for name, layer in masked_layers(model).items():
        a, b = f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight"
        layer.activate(active[a], active[b])
        for parameter, mask in ((parameters[a], active[a]), (parameters[b], active[b])):
            parameter.requires_grad_(bool(mask.any()))


def check_fits(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError unless `tensors` has exactly the parameters' names and shapes."""
    for name, parameter in parameters.items():
        if name not in tensors:
            raise InputError(f"{what}: does not fit the model: it lacks {name} {list(parameter.shape)}")
        if tensors[name].shape != parameter.shape:
            raise InputError(
                f"{what}: does not fit the model: {name} is {list(tensors[name].shape)} there, "
                f"{list(parameter.shape)} in the model"
            )
    for name in tensors:
        if name not in parameters:
            raise InputError(f"{what}: does not fit the model: {name} {list(tensors[name].shape)} is not in it")
