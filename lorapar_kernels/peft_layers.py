"""PEFT's LoRA layers with this package's forward and backward; imports peft, and is imported by whoever has it.

`FastLayer` goes ahead of one of PEFT's LoRA layer classes (of `nn.Linear`, or of bitsandbytes' 4-bit and 8-bit layers);
PEFT's names, saving, loading, merging and adapter switching are untouched. It keeps nothing that PEFT's layer lacks
when it is made, so that a layer that exists already can be made one by its `__class__`.

The base's product and the adapter's are one op where nothing can tell them apart: where the base is an `nn.Linear`
and nothing else (`plain_weight`), or has a frozen weight that a subclass hands over (`frozen`). Any other base is
called as PEFT calls it and the adapter's share is added to what it returns, so that a forward of its own, an inner
adapter, hooks and offloading take part. An adapter whose share is not s · drop(x) Aᵀ Bᵀ of two weights (a variant,
hooks, a bias of B) is computed by PEFT's own arithmetic. Which calls share one op, siblings.py says.
"""

import operator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import lorapar_kernels as lk

from . import siblings
from .siblings import Frozen, Part, Siblings, Terms, as_wide, draw_seed
from .tiles import TiledMask

# Torch's own, which a library may replace for every layer.
_FORWARD, _LINEAR = nn.Linear.forward, F.linear


class FastLayer(Linear if TYPE_CHECKING else object):
    """A mixin ahead of one of PEFT's LoRA layers, which computes with the op of lora_linear.py.

    A subclass may say what its base multiplies by (`frozen`), which terms an adapter has (`terms`), which masks its
    factors have (`masks`), when a call is no single op (`part`), and take over what such a call computes (`adapted`).
    """

    # On the class, so that a layer made by `__class__` has them.
    _siblings: Siblings | None = None
    _accepted: tuple[Any, ...] | None = None  # see `siblings.check_once`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain, sharing = not args and not kwargs, siblings.can_share()
        y = siblings.taken(self, x, plain) if sharing else None
        if y is not None:
            return y
        part = self.part(x) if plain and nothing_watches_all() else None
        if part is None:
            return self.in_pieces(x, *args, **kwargs)
        return siblings.called(x, part) if sharing else siblings.computed(x, [part])[0]

    def part(self, x: Tensor) -> Part | None:
        """What the call is computed of where it is one op: a frozen base and one adapter; else None."""
        made = self.inputs(x)
        if made is None:
            return None
        name, a, b, frozen, p = made
        terms = self.terms(name, a, b)
        return Part(self, name, frozen, terms, p, (a, b)) if terms.a.shape[0] > 0 else None

    def inputs(self, x: Tensor) -> tuple[str, Tensor, Tensor, Frozen, float] | None:
        """The one adapter, its weights, the base and the dropout's p where the call is one op; else None."""
        # Out of the dictionaries, here and below: a module's attribute costs half a microsecond to two.
        state = self.__dict__
        parts, name = state["_modules"], _only(state["_active_adapter"])
        if name is None or state["_disable_adapters"] or state["merged_adapters"] or name in state["lora_variant"]:
            return None
        there, dropouts = parts["lora_A"]._modules, parts["lora_dropout"]._modules
        if name not in there or state["lora_bias"][name] or not _is_plain_dropout(dropouts[name]):
            return None
        a, b, frozen = plain_weight(there[name]), plain_weight(parts["lora_B"]._modules[name]), self.frozen(x)
        if a is None or b is None or frozen is None:
            return None
        return name, a, b, frozen, self.dropout_p(name)

    def is_intercepted(self) -> bool:
        """Whether something may happen between a call of this layer and its forward."""
        return bool(
            self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or "forward" in self.__dict__
            or self._compiled_call_impl is not None
        )

    def state(self, name: str, a: Tensor, b: Tensor, p: float) -> tuple[Any, tuple[Any, ...]]:
        """What a call's output depends on beside x: what is compared by value, and what by identity."""
        of_base = cast(nn.Module, self._modules["base_layer"])._parameters
        weight, bias = of_base.get("weight"), of_base.get("bias")
        try:
            versions = a._version, b._version, _version(weight), _version(bias)
        except RuntimeError:  # of an inference tensor, whose changes torch does not count
            versions = None
        values = name, p, self.__dict__["scaling"][name], a.requires_grad, b.requires_grad, versions
        return values, (a, b, weight, bias, *self.masks(name))

    def stands(self, x: Tensor, state: tuple[Any, tuple[Any, ...]]) -> bool:
        """Whether the layer still computes what it did in that state."""
        made = self.inputs(x) if nothing_watches_all() else None
        if made is None:
            return False
        name, a, b, _, p = made
        values, objects = self.state(name, a, b, p)
        return values == state[0] and all(map(operator.is_, objects, state[1]))

    def in_pieces(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A call that is more than one op, or PEFT's own."""
        there = cast(nn.ModuleDict, self._modules["lora_A"])._modules
        names = [name for name in self.active_adapters if name in there]
        if self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        for_variants = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS} if kwargs else {}
        kwargs.pop("adapter_names", None)
        return self.adapted(x, names, for_variants, *args, **kwargs)

    def adapted(self, x: Tensor, names: list[str], for_variants: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for x with the share of each adapter in `names` added."""
        alone = nothing_watches_all()
        frozen = self.frozen(x) if alone and not args and not kwargs else None
        y = cast(Tensor, self.base_layer(x, *args, **kwargs)) if frozen is None else None
        for name in names:
            if not (alone and self.is_vanilla(name)):
                y = self.as_peft(self.base_layer(x) if y is None else y, x, name, for_variants | kwargs)
                continue
            terms = self.terms(name, *self.factors(name)[:2])
            if terms.a.shape[0] > 0:
                y = self.with_share(x, frozen, y, terms, self.dropout_p(name))
        return self.base_layer(x) if y is None else y

    def frozen(self, x: Tensor) -> Frozen | None:
        """The base's weight and bias, where its output is x Wᵀ + bias and neither has a gradient; else None."""
        base = cast(nn.Module, self._modules["base_layer"])
        weight = plain_weight(base)
        # The op gives the base no gradient.
        if weight is None or weight.requires_grad:
            return None
        bias = base._parameters.get("bias")
        if bias is None:
            bias = base.__dict__.get("bias")
        return None if bias is not None and bias.requires_grad else (weight, bias)

    def is_vanilla(self, name: str) -> bool:
        """Whether the adapter's share is s · drop(x) Aᵀ Bᵀ of the two weights, and its modules have no hooks."""
        if name in self.lora_variant or self.lora_bias[name]:
            return False
        parts: Any = self._modules
        return (
            plain_weight(parts["lora_A"]._modules[name]) is not None
            and plain_weight(parts["lora_B"]._modules[name]) is not None
            and _is_plain_dropout(parts["lora_dropout"]._modules[name])
        )

    def with_share(self, x: Tensor, frozen: Frozen | None, y: Tensor | None, terms: Terms, p: float) -> Tensor:
        """The base's output with one adapter's share added. y: what the base returned for x; None: `frozen` is set."""
        if y is not None:
            a, b, seed = *as_wide(y, terms.a, terms.b), draw_seed(x.device) if p > 0.0 else None
            return lk.lora_add(y, x, a, b, terms.scaling, terms.mask_a, terms.mask_b, p, seed)
        assert frozen is not None
        return siblings.computed(x, [Part(self, "", frozen, terms, p)])[0]

    def as_peft(self, y: Tensor, x: Tensor, name: str, kwargs: dict[str, Any]) -> Tensor:
        """An adapter's share by PEFT's arithmetic, module by module: a variant (DoRA, ...), hooks, a bias of B."""
        masks = self.masks(name)
        a, b = cast(nn.Module, self.lora_A[name]), cast(nn.Module, self.lora_B[name])
        x = self._cast_input_dtype(x, cast(Tensor, a.weight).dtype)
        if name in self.lora_variant:
            kwargs = dict.fromkeys(VARIANT_KWARG_KEYS) | kwargs
            share = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=y, **kwargs)
            return share.to(y.dtype)
        dropout = cast(nn.Module, self.lora_dropout[name])
        if type(dropout) is nn.Dropout and _is_plain_dropout(dropout) and nothing_watches_all():
            p = self.dropout_p(name)
            # The elements that the op would drop.
            if p > 0.0:
                x = torch.where(lk.dropout_mask(draw_seed(x.device), list(x.shape), p), x / (1.0 - p), 0.0)
        else:
            x = dropout(x)
        share = _masked_call(b, _masked_call(a, x, masks[0]), masks[1])
        return (y + share * self.scaling[name]).to(y.dtype)

    def terms(self, name: str, a: Tensor, b: Tensor) -> Terms:
        """What the adapter `name` is computed with; a and b are its weights."""
        return Terms(a, b, self.scaling[name], *self.masks(name))

    def masks(self, name: str) -> tuple[TiledMask | None, TiledMask | None]:
        """The masks of lora_A and lora_B; None: every element has its gradient."""
        return None, None

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """lora_A [r, in], lora_B [out, r] and the scaling of the adapter `name`."""
        parts: Any = self._modules
        return parts["lora_A"]._modules[name].weight, parts["lora_B"]._modules[name].weight, self.scaling[name]

    def dropout_p(self, name: str) -> float:
        """The share of x that the adapter's dropout drops in this call."""
        dropout = cast(nn.ModuleDict, self._modules["lora_dropout"])._modules[name]
        # Its own mode: it may be in training where the layer is not (Monte Carlo dropout).
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version


def _only(active: str | list[str]) -> str | None:
    """The one active adapter; None where there are several or none."""
    return active if isinstance(active, str) else active[0] if len(active) == 1 else None


def plain_weight(module: Any) -> Tensor | None:
    """The weight where `module(x)` is x Wᵀ + bias and nothing else happens in the call; else None.

    None for a subclass (a forward of its own, a parametrization), a forward put on the instance (accelerate), hooks,
    and a weight of a tensor class of its own (quantised, sharded). It is asked in every call: hooks come and go. The
    weight of a replica (DataParallel) is no parameter.
    """
    if type(module) is not nn.Linear or _is_watched(module):
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        weight = module.__dict__.get("weight")
    kind = type(weight)
    return weight if kind is nn.Parameter or kind is Tensor else None


def nothing_watches_all() -> bool:
    """Whether no hook is on all modules, and nn.Linear computes what torch has it compute."""
    return not _has_any_global_hook() and nn.Linear.forward is _FORWARD and F.linear is _LINEAR


def _is_plain_dropout(module: Any) -> bool:
    # The op does not drop everything.
    plain = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p < 1.0 and not module.inplace)
    return plain and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's forward; hooks on all modules are not asked for."""
    return "forward" in module.__dict__ or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
    )


def _masked_call(module: nn.Module, x: Tensor, mask: TiledMask | None) -> Tensor:
    """module(x), hooks and all; where there is a mask, its weight's gradient is zero outside it."""
    if mask is None or not torch.is_grad_enabled():
        return module(x)
    weight = cast(Tensor, module.weight)
    return torch.func.functional_call(module, {"weight": torch.where(mask.mask, weight, weight.detach())}, (x,))


class FastLinear(FastLayer, Linear):
    """PEFT's LoRA layer of an `nn.Linear`, of a transformers `Conv1D`, or of what another adapter made of one."""
