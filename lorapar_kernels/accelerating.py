"""`accelerate`: the LoRA layers of an existing PEFT model compute with this package; `restore` undoes it.

A layer is taken over by its class: `lora.Linear` becomes `FastLinear`, a subclass with another forward. Nothing else
changes: the module, its parameters, their names and what holds them are the same objects, so saving, loading, merging,
adding, deleting and disabling adapters, optimizers that exist already and DDP go on as they were. PEFT is imported when
a function here is called, so the package itself does not need it.

What PEFT's layer computes and ours do not (the dropout's bits are other ones, so two runs with dropout differ): x stays
in its dtype beside fp32 factors, where PEFT casts it up; an 8-bit base is computed with x as it is (bnb_weights.py).
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .siblings import ALONE

log = logging.getLogger("lorapar_kernels")
Model = TypeVar("Model", bound=nn.Module)
_NUMBER = r"(?<![^.])\d+(?![^.])"  # a part of a module's name that is a number


def accelerate(model: Model) -> Model:
    """Have the LoRA layers of a PEFT model compute with this package from now on, in place; returns the model.

    Args:
        model: what has LoRA layers of PEFT's in it: a PeftModel, a PeftMixedModel, a model of transformers after
            `add_adapter`, or any module after `inject_adapter_in_model`; in training or loaded, of `nn.Linear`, 4-bit
            and 8-bit layers (bitsandbytes). One that DDP wraps too; FSDP and `torch.compile` come after this call.

    Layers that are left as PEFT's, and why, are one line of the log "lorapar_kernels". A layer that was taken over
    already stays so; an adapter that is added to one is computed by it too.

    Raises TypeError where `model` is no module, and ValueError where it has no LoRA layer that could be taken over.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    from peft.tuners.lora import LoraLayer

    from .peft_layers import FastLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"accelerate: {_without_lora(model)}")
    classes, left, taken = _classes(), Counter[str](), 0
    for name, layer in layers.items():
        if isinstance(layer, FastLayer):
            continue
        obstacle = _obstacle(layer, classes)
        if obstacle is None:
            _take_over(layer, classes[type(layer)])
            taken += 1
        else:
            # The layers of one kind in every block are named together.
            left[f"{re.sub(_NUMBER, '*', name.removeprefix('base_model.model.'))} ({obstacle})"] += 1
    ours = sum(isinstance(layer, FastLayer) for layer in layers.values())
    named = ", ".join(f"{count} {what}" for what, count in left.items())
    if ours == 0:
        raise ValueError(
            f"accelerate: none of the model's LoRA layers can be taken over: {named}; plain LoRA on nn.Linear, "
            "4-bit and 8-bit layers can"
        )
    if left:
        log.warning("accelerate: %d LoRA layers compute with lorapar_kernels; left as PEFT's: %s", ours, named)
    elif taken:
        log.info("accelerate: %d LoRA layers compute with lorapar_kernels", ours)
    else:
        log.info("accelerate: nothing to do, all %d LoRA layers compute with lorapar_kernels already", ours)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every LoRA layer that it took over is PEFT's again; returns the model.

    A model without such layers, `lorapar.attach`'s among them, is left as it is. Raises TypeError where `model` is no
    module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    of_peft = {fast: own for own, fast in _classes().items()}
    for module in model.modules():
        if type(module) in of_peft:
            _let_go(module, of_peft[type(module)])
    return model


def _classes() -> Mapping[type[nn.Module], type[nn.Module]]:
    """PEFT's class of a layer that can be taken over → ours."""
    from peft.import_utils import is_bnb_4bit_available
    from peft.tuners.lora import Linear

    from .peft_layers import FastLinear

    classes: dict[type[nn.Module], type[nn.Module]] = {Linear: FastLinear}
    if is_bnb_4bit_available():
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

        from .peft_layers_bnb import FastLinear4bit, FastLinear8bit

        classes |= {Linear4bit: FastLinear4bit, Linear8bitLt: FastLinear8bit}
    return classes


def _without_lora(model: nn.Module) -> str:
    """Why a model has no LoRA layer, and what to do."""
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, dict) else {}
    kinds = {name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in configs.items()}
    others = [f"{name!r} is {kind}" for name, kind in kinds.items() if kind != "LORA"]
    if others:
        return f"the adapter {', '.join(others)}; LoRA alone is computed here (peft.LoraConfig)"
    return "the model has no LoRA layer; make one first (peft.get_peft_model, or PeftModel.from_pretrained)"


def _obstacle(layer: Any, classes: Mapping[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why a LoRA layer of PEFT's cannot be taken over; None where it can."""
    if type(layer) not in classes:
        if isinstance(layer, tuple(classes)):
            return f"a {type(layer).__name__}, made of PEFT's class; accelerate before it is wrapped"
        return f"PEFT's {type(layer).__name__}"
    if "forward" in layer.__dict__ and not _own_forwards(layer):
        return "a forward of its own was put on it"
    weight = getattr(layer.get_base_layer(), "weight", None)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return "bitsandbytes repacked its 4-bit weight in an evaluation on this CPU; load the model anew"
    obstacles = {name: _adapter_obstacle(layer, name) for name in layer.lora_A}
    if None in obstacles.values() or not obstacles:
        # Another adapter of it is computed by PEFT's arithmetic.
        return None
    return ", ".join(f"adapter {name!r}: {obstacle}" for name, obstacle in obstacles.items())


def _adapter_obstacle(layer: Any, name: str) -> str | None:
    """Why one adapter's share is not s · drop(x) Aᵀ Bᵀ; None where it is."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')}, a variant"
    return "lora_bias" if layer.lora_bias[name] else None


def _own_forwards(layer: Any) -> list[str]:
    """Where the instance holds its class's forward: what the package accelerate's hook on it calls, or left behind."""
    held = {name: layer.__dict__.get(name) for name in ("forward", "_old_forward")}
    return [name for name, method in held.items() if getattr(method, "__func__", None) is type(layer).forward]


def _take_over(layer: Any, fast: type[nn.Module]) -> None:
    _change_class(layer, fast)
    base = layer.get_base_layer()
    if hasattr(base, "support_avx512bf16_for_cpu"):
        # bitsandbytes would repack the weight in place in an evaluation on such a CPU, and nobody could read it then.
        layer._repacked_by_bnb, base.support_avx512bf16_for_cpu = base.support_avx512bf16_for_cpu, False


def _let_go(layer: Any, own: type[nn.Module]) -> None:
    siblings = layer.__dict__.pop("_siblings", None)
    if siblings is not None:
        # Those that stay, where a part of a model is restored, are computed alone.
        siblings.mode = ALONE
    layer.__dict__.pop("_accepted", None)
    _change_class(layer, own)
    if "_repacked_by_bnb" in layer.__dict__:
        layer.get_base_layer().support_avx512bf16_for_cpu = layer.__dict__.pop("_repacked_by_bnb")


def _change_class(layer: Any, to: type[nn.Module]) -> None:
    names = _own_forwards(layer)
    layer.__class__ = to
    for name in names:
        layer.__dict__[name] = to.forward.__get__(layer)
