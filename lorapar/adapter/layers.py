"""The LoRA layers of the method: PEFT's own, computed by `lorapar_kernels`, with the masks of the running stage.

`MaskedLayer` goes ahead of a PEFT layer class and adds to `FastLayer`, which computes it, what the method asks for:
masks, scoring, and merging that leaves the base as it was. `layers_bnb.py` has the layers of 4-bit and 8-bit bases. The
functions at the end find a model's layers and set their masks.

Under a twin start (attach.py) rows r..2r of A and columns r..2r of B are the start's negative. A slice i that no stage
has moved still cancels its twin r + i to the last bit, so both are left out of every product (`live_ranks`): at rank
granularity a layer runs at its active rank.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import lorapar_kernels as lk
from lorapar_kernels.peft_layers import FastLayer, nothing_watches_all
from lorapar_kernels.siblings import Frozen, Terms, as_wide

from ..errors import InputError

if TYPE_CHECKING:
    from ..partitioning.partition import Partition

ADAPTER = "default"  # TRL looks for this name


class Prepared(NamedTuple):
    """A layer's masks and live ranks, and what the op takes of them: made once, where they are set.

    Attributes:
        mask_a, mask_b, live: the layer's buffers.
        masks: of whole factors. of_live: of the slices that are computed with.
    """

    mask_a: Tensor | None = None
    mask_b: Tensor | None = None
    live: Tensor | None = None
    masks: tuple[lk.TiledMask | None, lk.TiledMask | None] = (None, None)
    of_live: tuple[lk.TiledMask | None, lk.TiledMask | None] = (None, None)

    @classmethod
    def of(cls, mask_a: Tensor | None, mask_b: Tensor | None, live: Tensor | None) -> "Prepared":
        """Waits for the device."""
        a, b = mask_a, mask_b
        whole = lk.TiledMask.of_a(a) if a is not None else None, lk.TiledMask.of_b(b) if b is not None else None
        if live is None:
            return cls(mask_a, mask_b, None, whole)
        a, b = None if a is None else a[live], None if b is None else b[:, live].contiguous()
        selected = lk.TiledMask.of_a(a) if a is not None else None, lk.TiledMask.of_b(b) if b is not None else None
        return cls(mask_a, mask_b, live, whole, selected)


class MaskedLayer(FastLayer):
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
        self._prepared = Prepared()
        self._unmerged: Any = None
        self._merged_sum: str | None = None

    def inputs(self, x: Tensor) -> tuple[str, Tensor, Tensor, Frozen, float] | None:
        return super().inputs(x) if self.scoring is None else None

    def adapted(self, x: Tensor, names: list[str], for_variants: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.scoring is not None:
            return self.scored(x, *args, **kwargs)
        return super().adapted(x, names, for_variants, *args, **kwargs)

    def as_peft(self, y: Tensor, x: Tensor, name: str, kwargs: dict[str, Any]) -> Tensor:
        if name in self.lora_variant and self.masks(name) != (None, None):
            raise InputError(f"lora: the adapter {name!r} is no plain LoRA, and a partition masks plain LoRA alone")
        return super().as_peft(y, x, name, kwargs)

    def masks(self, name: str) -> tuple[lk.TiledMask | None, lk.TiledMask | None]:
        return self.prepared().masks if name == ADAPTER else (None, None)

    def terms(self, name: str, a: Tensor, b: Tensor) -> Terms:
        live = self._buffers["live_ranks"]
        if name != ADAPTER or live is None:
            return super().terms(name, a, b)
        # Gradients go back to their places.
        return Terms(a.index_select(0, live), b.index_select(1, live), self.scaling[name], *self.prepared().of_live)

    def prepared(self) -> "Prepared":
        """The masks as the op takes them; made again where a caller set others, or moved them to another device."""
        # Out of the dictionary: a module's attribute costs half a microsecond to two.
        buffers, made = self._buffers, self._prepared
        mask_a, mask_b, live = buffers["mask_a"], buffers["mask_b"], buffers["live_ranks"]
        if made.mask_a is not mask_a or made.mask_b is not mask_b or made.live is not live:
            made = self._prepared = Prepared.of(mask_a, mask_b, live)
        return made

    def scored(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer of a scoring pass."""
        assert self.scoring is not None
        if not self.is_vanilla(ADAPTER):
            raise InputError(
                "lora: hooks, a parametrization, a bias or a variant sits on lora_A or lora_B, whose importance cannot "
                "be measured; remove it before scoring"
            )
        a, b, scaling = self.factors(ADAPTER)
        frozen = self.frozen(x) if nothing_watches_all() and not args and not kwargs else None
        if self.offsets is None:
            # One example, whose gradient autograd leaves in the factors.
            y = cast(Tensor, self.base_layer(x, *args, **kwargs)) if frozen is None else None
            return self.with_share(x, frozen, y, Terms(a, b, scaling), 0.0)
        if frozen is not None and isinstance(frozen[0], Tensor):
            return lk.lora_linear_scored(x, frozen[0], a, b, scaling, self.offsets, self.scoring, bias=frozen[1])
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        return lk.lora_add_scored(y, x, *as_wide(y, a, b), scaling, self.offsets, self.scoring)

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

    def activate(self, mask_a: Tensor, mask_b: Tensor) -> None:
        """Take the masks of a stage, and find the slices that cancel their twin and stay so while it runs."""
        a, b, _ = self.factors(ADAPTER)
        if a.is_meta or b.is_meta:
            raise InputError("lora: the adapter's weights are offloaded (on the meta device), and cannot be trained")
        self.mask_a, self.mask_b = mask_a.to(a.device), mask_b.to(a.device)
        self.live_ranks = None
        r = self.trainable_rank
        if a.shape[0] == 2 * r:
            with torch.no_grad():
                cancels = (a[:r] == a[r:]).all(1) & (b[:, :r] == -b[:, r:]).all(0)
                active = self.mask_a.any(1) | self.mask_b.any(0)
                live = (~cancels | active[:r] | active[r:]).nonzero().squeeze(1)
            if live.numel() < r:
                self.live_ranks = torch.cat((live, live + r))
        self.prepared()

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
