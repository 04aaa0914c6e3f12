"""LoRA layers that are handed the same tensor one after the other (q, k and v; gate and up) are computed by one op.

They are found at run time, by the identity and version of x and never by name. In a layer's first call it is computed
alone, and joins the layer called before it if that one had the same x. From the next call on, the first member's call
computes all of the group, and the others take what is theirs: x is read once, and autograd adds up no gradients of x. A
call that does not match is computed alone, which is right whatever is called in whatever order; such a group is then
given up, with one line in the log. LORAPAR_SIBLINGS=0 in the environment computes every layer alone.

A sibling takes its output only if nothing has changed since it was computed: x and its version (a write through
`.data` goes unnoticed, as in torch), grad mode, autocast, CUDA stream, region of gradient checkpointing, and the state
of its layer (adapter, merged, disabled, dropout, scaling, masks, hooks, its tensors and their versions). Nothing is
shared under torch.compile, torch.func, tracing, forward-mode differentiation and inference mode (whose tensors have no
version), nor by layers whose factors have hooks: those would be called for an output that nothing used.

Gradient checkpointing calls the layers again in the backward, and has to meet the same saved tensors and draw the same
seeds as in the forward. So a group changes its way only outside a backward, while no graph that was made in the other
way can still go through one. With dropout and without a gradient (the first pass of the reentrant kind) layers are
computed alone, so that each draws its seed where its recompute does.

Trade-offs: where a backward does not reach a sibling's output, x stays until another one does or the graph is gone;
such a group is given up. If the forward is interrupted between siblings, the outputs not taken stay until any adapted
layer's next call in that thread, or until the model is gone.
"""

import functools
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .lora_layer import FrozenWeight, LoraLayer
from .lora_linear import as_autocast, check_layer, lora_layers
from .tiles import TiledMask

log = logging.getLogger("lorapar_kernels")
SHARING = os.environ.get("LORAPAR_SIBLINGS", "1") != "0"
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # there in a build for CUDA or ROCm
_hooks_after = attrgetter("_post_accumulate_grad_hooks")
LEARNING, SHARED, ALONE = "learning", "shared", "alone"
MANY_TRACES = 64  # of a group, before those that are gone are sorted out

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


class Terms(NamedTuple):
    """What one adapter adds to its base, scaling · drop(x) Aᵀ Bᵀ, and where its gradients may be other than zero."""

    a: Tensor
    b: Tensor
    scaling: float
    mask_a: TiledMask | None = None
    mask_b: TiledMask | None = None


# A base's weight and bias, where its output is their product with x and nothing else.
Frozen: TypeAlias = tuple[Tensor | FrozenWeight, Tensor | None]


class Part(NamedTuple):
    """What one layer's call is computed of, where that is one op.

    Attributes:
        layer: a FastLayer; name: its one active adapter. p: of the dropout, 0 in evaluation.
        factors: the adapter's two weights, of which `terms` may hold a part.
    """

    layer: Any
    name: str
    frozen: Frozen
    terms: Terms
    p: float
    factors: tuple[Tensor, ...] = ()


def computed(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Each layer's output for x, by one op; dropout seeds are drawn in their order."""
    p, layers = parts[0].p, []
    autocast, traced = torch._C._is_any_autocast_enabled(), _is_traced()
    for part in parts:
        weight, bias = part.frozen
        if autocast:
            x, weight, bias = in_autocast(x, weight, bias)
        a, b, scaling, mask_a, mask_b = part.terms
        seed = draw_seed(x.device) if p > 0.0 else None
        layer = LoraLayer(weight, bias, None, *as_wide(x, a, b), scaling, mask_a, mask_b, seed)
        if traced:
            check_layer(x, layer, p)
        else:
            check_once(part.layer, x, layer, p)
        layers.append(layer)
    return lora_layers(x, layers, p)


def draw_seed(device: torch.device) -> Tensor:
    """A seed out of torch's generator, so that recompute under checkpointing repeats it."""
    return torch.randint(2**62, (1,), device=device)


def as_wide(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B at least as wide as x, as the ops take them; PEFT narrows x instead."""
    size = x.dtype.itemsize
    return a if a.dtype.itemsize >= size else a.to(x.dtype), b if b.dtype.itemsize >= size else b.to(x.dtype)


def in_autocast(
    x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None
) -> tuple[Tensor, Tensor | FrozenWeight, Tensor | None]:
    """x and the base's tensors in the dtype that they are computed in."""
    dense = weight if isinstance(weight, Tensor) else None
    x_, weight_, bias_ = as_autocast(x, dense, bias)
    assert x_ is not None
    return x_, weight if weight_ is None else weight_, bias_


def check_once(owner: Any, x: Tensor, layer: LoraLayer, p: float) -> None:
    """`check_layer`, unless `owner`'s last arguments were accepted and all that it asks about is the same."""
    weight, bias, _, a, b, _, mask_a, mask_b, _ = layer
    assert weight is not None
    # A base that is trained does not come here (`frozen`), and a mask stays as it is.
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device)
    of_base = weight.shape, weight.device, getattr(weight, "dtype", None), of_bias
    facts = x.shape[-1], x.dtype, x.device, p, a.shape, a.dtype, a.device, b.shape, b.dtype, b.device, *of_base
    last = owner._accepted
    if last is not None and last[0] is mask_a and last[1] is mask_b and last[2] == facts:
        return
    check_layer(x, layer, p)
    owner._accepted = mask_a, mask_b, facts


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def can_share() -> bool:
    """Whether calls are made one by one, on tensors that stand for themselves."""
    return SHARING and not (
        _is_traced() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


class _Thread(threading.local):
    """What a thread remembers of the last calls; nothing that would keep a tensor alive."""

    last: "tuple[weakref.ref[Tensor], Any, weakref.ref[Any]] | None" = None  # a call of a learning layer: x, key, layer
    pending: "weakref.ref[_Pending] | None" = None


_thread = _Thread()


class _Pending:
    """Outputs that siblings of the layer just called will take; kept alive by their group alone."""

    __slots__ = ("__weakref__", "at", "group", "key", "outs", "states", "x")

    def __init__(self, group: "Siblings", x: Tensor, key: Any, parts: Sequence[Part], outs: list[Tensor | None]):
        self.group, self.x, self.key, self.outs, self.at = group, weakref.ref(x), key, outs, 1
        # The first has its own already.
        self.states = [None, *(part.layer.state(part.name, *part.factors, part.p) for part in parts[1:])]

    def fits(self, layer: Any, x: Tensor) -> bool:
        is_next = self.x() is x and self.group.members[self.at]() is layer
        return is_next and self.key == _key(x) and layer.stands(x, self.states[self.at])


class Siblings:
    """Layers whose calls followed one another with one x; a copy of a layer has none, and learns its own.

    Attributes:
        members: weak, in the order of their calls.
        mode: LEARNING: each computes alone, and layers may join until the first is called again; SHARED; ALONE: for
            good.
        misfit: a call did not match, so the group is to be given up.
        traces: weak; nodes made in this mode and checkpoints around them, that a backward may go through.
        pending: what is not taken yet, of any thread.
    """

    __slots__ = ("__weakref__", "members", "misfit", "mode", "pending", "traces")

    def __init__(self, first: Any):
        self.members = [weakref.ref(first)]
        self.mode, self.misfit = LEARNING, False
        self.traces: list[weakref.ref[Any]] = []
        self.pending: set[_Pending] = set()

    def __reduce__(self) -> Any:
        return type(None), ()

    def settle(self) -> None:
        """The first member is called again, outside a backward: the mode may change."""
        if self.mode == LEARNING:
            if len(self.members) == 1:
                self.mode = ALONE
            elif not self.in_flight():
                self.mode = SHARED
        elif (self.misfit or self.in_parts()) and not self.in_flight():
            self.mode = ALONE
            _say(", ".join(_described(member()) for member in self.members))

    def in_flight(self) -> bool:
        """Whether a graph made in this mode can still go through a backward."""
        self.traces = [trace for trace in self.traces if _can_run(trace())]
        return bool(self.traces)

    def in_parts(self) -> bool:
        """Whether a backward did not reach every output, and keeps x for those that it did not."""
        return any(getattr(trace(), "kept", None) is not None for trace in self.traces)

    def watch(self, y: Tensor, hooks: Any) -> None:
        """Remember the graph of y, and the region of non-reentrant checkpointing that it is made in."""
        if y.grad_fn is None:
            return
        if len(self.traces) >= MANY_TRACES:
            self.in_flight()
        self.traces.append(weakref.ref(y.grad_fn))
        if hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint":
            self.traces.append(weakref.ref(hooks[0]))

    def opened(self, x: Tensor, key: Any, part: Part) -> Tensor | None:
        """The first member's output, the others' pending; None where they cannot be computed together now."""
        parts = [part]
        for member in self.members[1:]:
            sibling = member()
            if sibling is None or sibling.__dict__.get("_siblings") is not self:
                # Gone, or PEFT's own again.
                self.misfit = True
                return None
            other = None if sibling.is_intercepted() else sibling.part(x)
            if other is None or other.p != part.p:
                return None
            parts.append(other)
        for a, b in (part.factors for part in parts):
            if a._backward_hooks or b._backward_hooks or _hooks_after(a) or _hooks_after(b):
                return None
        try:
            outs: list[Tensor | None] = [*computed(x, parts)]
        except (TypeError, ValueError):
            # Whoever's arguments these were says so in its own call.
            return None
        y, outs[0] = outs[0], None
        assert y is not None
        self.watch(y, key[-1])
        pending = _Pending(self, x, key, parts, outs)
        self.pending.add(pending)
        _thread.pending = weakref.ref(pending)
        return y


def taken(layer: Any, x: Tensor, plain: bool) -> Tensor | None:
    """What a sibling's call just made for this call of `layer`, None where nothing; then what is pending is dropped.

    plain: the call has no argument beside x.
    """
    pending = None if _thread.pending is None else _thread.pending()
    if pending is None:
        _thread.pending = None
        return None
    at = pending.at
    if plain and pending.fits(layer, x):
        y, pending.outs[at] = pending.outs[at], None
        pending.at = at + 1
        if pending.at == len(pending.outs):
            _close(pending)
        return y
    _close(pending)
    # A recompute in a backward may end before it reaches the siblings.
    if torch._C._current_graph_task_id() == -1:
        pending.group.misfit = True
    return None


def _close(pending: _Pending) -> None:
    _thread.pending = None
    pending.group.pending.discard(pending)


def called(x: Tensor, part: Part) -> Tensor:
    """The output for x of `part`'s layer, which no sibling's call has made."""
    layer, group = part.layer, part.layer._siblings
    if group is not None and group.mode == ALONE:
        return computed(x, [part])[0]
    key = _key(x)
    in_backward = torch._C._current_graph_task_id() != -1
    if key is None or (in_backward and group is None):
        return computed(x, [part])[0]
    if group is None:
        group = layer._siblings = _joined(layer, x, key[:-1])
    elif not in_backward and group.members[0]() is layer:
        group.settle()
    first = group.members[0]() is layer
    grad, hooks = key[0], key[-1]
    # With dropout a recompute has to draw as its forward did (the reentrant kind has no hooks).
    may_share = part.p == 0.0 or (grad and (not in_backward or hooks is not None))
    y = group.opened(x, key, part) if first and group.mode == SHARED and may_share else None
    if y is None:
        y = computed(x, [part])[0]
        if group.mode == LEARNING:
            group.watch(y, hooks)
    return y


def _joined(layer: Any, x: Tensor, key: Any) -> Siblings:
    """The group of the layer called before, where that had the same x and can be joined; else a new one."""
    last, _thread.last = _thread.last, (weakref.ref(x), key, weakref.ref(layer))
    if last is not None and last[0]() is x and last[1] == key:
        before = last[2]()
        group = None if before is None else before._siblings
        if group is not None and group.mode == LEARNING and group.members[-1]() is before:
            group.members.append(weakref.ref(layer))
            return group
    return Siblings(layer)


def _key(x: Tensor) -> Any:
    """What has to be the same for x's product to be the same; None for a tensor without a version."""
    if torch.is_inference_mode_enabled():
        return None
    try:
        of_x = x._version, x.data_ptr(), x.requires_grad, x.is_leaf
    except RuntimeError:
        return None
    autocast = None
    if torch._C._is_any_autocast_enabled():
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    grad = torch.is_grad_enabled()
    # The hooks stand for the region of checkpointing.
    # Another stream would read what is not there yet.
    stream = _raw_stream(x.get_device()) if x.is_cuda else None
    return grad, of_x, stream, autocast, _top_hooks(True) if grad else None


def _can_run(trace: Any) -> bool:
    """Whether a backward can go through a node, or a checkpoint's hook is alive: as long as what it recomputes is."""
    if trace is None or not hasattr(trace, "next_functions"):
        return trace is not None
    try:
        # Not unpacked, as `saved_tensors` are: that would recompute.
        return trace._raw_saved_tensors is not None
    except RuntimeError:  # freed by a backward
        return False


def _described(layer: Any) -> str:
    return "a layer that is gone" if layer is None else f"{layer.in_features}→{layer.out_features}"


@functools.cache
def _say(layers: str) -> None:
    log.info(
        "LoRA layers %s compute one by one from now on: a call did not follow the one before with the same input, "
        "or a backward did not go through all of them",
        layers,
    )
