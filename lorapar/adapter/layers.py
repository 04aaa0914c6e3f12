"""The LoRA layers: PEFT's own, computed by `lorapar_kernels`, with the masks of the running stage.

`MaskedLayer` goes ahead of a PEFT layer class; PEFT's names, saving, loading and adapter switching are untouched.
`layers_bnb.py` has the layers of 4-bit and 8-bit bases. The functions at the end find a model's layers and set their
masks.

Under a twin start (attach.py) rows r..2r of A and columns r..2r of B are the start's negative. A slice i that no stage
has moved still cancels its twin r + i to the last bit, so both are left out of every product (`live_ranks`): at rank
granularity a layer runs at its active rank.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import lorapar_kernels as lk

from ..errors import InputError

if TYPE_CHECKING:
    from ..partitioning.partition import Partition

ADAPTER = "default"  # TRL looks for this name


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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        if self.scoring is not None:
            if self.offsets is None:
                # One example, whose gradient autograd leaves in the factors.
                return self.added(None, x, *self.factors(ADAPTER), None, None, 0.0, None)
            return self.scored(x, *self.factors(ADAPTER))
        y: Tensor | None = None
        for name in names:
            a, b, scaling = self.factors(name)
            masks = self.mask_a, self.mask_b
            if name != ADAPTER:
                masks = None, None
            elif self.live_ranks is not None:
                a, b, masks = select_ranks(a, b, *masks, self.live_ranks)
            if a.shape[0] > 0:
                y = self.added(y, x, a, b, scaling, *masks, *self.draw_dropout(name, x.device))
        return self.base_layer(x, *args, **kwargs) if y is None else y

    def added(self, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scaling: float, *masks_p_seed: Any) -> Tensor:
        """One adapter's share added to y, or to the base's output where y is None: an opaque base's way."""
        return lk.lora_add(self.base_layer(x) if y is None else y, x, a, b, scaling, *masks_p_seed)

    def scored(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The layer of a scoring pass: an opaque base's way."""
        assert self.scoring is not None
        assert self.offsets is not None
        return lk.lora_add_scored(self.base_layer(x), x, a, b, scaling, self.offsets, self.scoring)

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        return a.weight, b.weight, self.scaling[name]

    def draw_dropout(self, name: str, device: torch.device) -> tuple[float, Tensor | None]:
        """p and a seed out of torch's generator, so that recompute under checkpointing repeats it."""
        dropout = self.lora_dropout[name]
        if not self.training or not isinstance(dropout, nn.Dropout) or dropout.p == 0.0:
            return 0.0, None
        return dropout.p, torch.randint(2**62, (1,), device=device)

    def activate(self, mask_a: Tensor, mask_b: Tensor) -> None:
        """Take the masks of a stage, and find the slices that cancel their twin and stay so while it runs."""
        a, b, _ = self.factors(ADAPTER)
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
        """Merge into a copy of the base weight, so that `unmerge` gives the base back bit for bit."""
        if not self.merged:
            self._unmerged = self.set_aside()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """The base as it was before `merge`, without computing anything."""
        if self._unmerged is None:
            super().unmerge()
            return
        self.merged_adapters.clear()
        self.put_back(self._unmerged)
        self._unmerged = None

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

    def added(self, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scaling: float, *masks_p_seed: Any) -> Tensor:
        if y is not None:
            return lk.lora_add(y, x, a, b, scaling, *masks_p_seed)
        base = cast(nn.Linear, self.get_base_layer())
        return lk.lora_linear(x, base.weight, a, b, scaling, base.bias, *masks_p_seed)

    def scored(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        assert self.scoring is not None
        assert self.offsets is not None
        base = cast(nn.Linear, self.get_base_layer())
        return lk.lora_linear_scored(x, base.weight, a, b, scaling, self.offsets, self.scoring, bias=base.bias)


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
