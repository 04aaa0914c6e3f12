"""How the LoRA layers are attached, what a stage may change, and the proof that nothing else changed.

The layers themselves are in layers.py.

A start with a twin (`twin`, `pissa`, `olora`) gives the adapter rank 2r at the same scaling: rows r..2r of A hold A₀,
and columns r..2r of B hold −B₀, inactive for ever. They cancel the start, so the model's function is the base's until
training moves it, and the base is never written. (Departure from the paper, which re-draws A and B from N(0, 0.01²) and
so shifts the base before the first step; that start is `paper`.)
"""

import copy
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_json, write_json
from ..recipe.checks import check_lora
from ..recipe.sections import Start
from .layers import ADAPTER, MaskedLayer, MaskedLinear

if TYPE_CHECKING:
    from ..partitioning.partition import Partition

TWIN_STARTS = ("twin", "pissa", "olora")
START_STD = 0.01  # of the paper's re-drawn A and B (released script)


class FrozenElementsChanged(RuntimeError):
    """A stage wrote something it was to leave alone, or moved nothing at all."""


def attach(
    model: nn.Module, lora_config: LoraConfig, start: Start = "paper", seed: int = 0, svd_device: str | None = None
) -> PeftModel:
    """PEFT's `get_peft_model` with our layers and the start asked for; the base is not written.

    Args:
        model: a transformers model. lora_config: PEFT's; not changed. Its r is the trainable rank.
        start: "paper": A, B from N(0, 0.01²), which shifts the base; "twin": the same beside its frozen negative;
            "pissa", "olora": PEFT's formulas for A and B, with the twin in place of a changed base;
            "peft": whatever `init_lora_weights` says (B = 0 by default: it cannot be scored).
        seed: of the random starts, drawn on the CPU so that every device gets the same.

    Raises InputError for a LoRA option our layers do not have, or target modules that match nothing or no nn.Linear.
    """
    defaults = LoraConfig().to_dict()
    given = {key: value for key, value in lora_config.to_dict().items() if value != defaults[key]}
    # PEFT keeps the names of modules in sets.
    check_lora({key: sorted(value) if isinstance(value, set) else value for key, value in given.items()})
    config = copy.deepcopy(lora_config)
    config.task_type = config.task_type or "CAUSAL_LM"
    rank = config.r
    if start == "peft":
        if config.init_lora_weights not in (True, "gaussian", "orthogonal"):
            raise InputError(
                f"lora.init_lora_weights: got {config.init_lora_weights!r}, which changes the base; "
                "use start: pissa or olora, or init_lora_weights: true, gaussian or orthogonal"
            )
    else:
        config.init_lora_weights = True
    if start in TWIN_STARTS:
        config.r = 2 * rank
        # The same scaling at rank 2r; PEFT takes a float too.
        config.lora_alpha = cast(int, config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2))
    _register(config, model)
    try:
        peft_model = cast(PeftModel, get_peft_model(cast(Any, model), config))
    except ValueError as error:
        raise InputError(f"lora.target_modules: got {lora_config.target_modules!r}: {error}") from error
    layers = masked_layers(peft_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.trainable_rank = rank
            if start != "peft":
                _start_layer(layer, start, rank, generator, svd_device)
    return peft_model


def _register(config: LoraConfig, model: nn.Module) -> None:
    """PEFT does not persist this, so it is done again on load. The first class that a layer is an instance of wins."""
    quantised: dict[Any, Any] = {}
    if importlib.util.find_spec("bitsandbytes"):
        from .layers_bnb import LAYERS

        quantised = dict(LAYERS)
    take_over_products(model)
    config._register_custom_module({**quantised, nn.Linear: MaskedLinear})


def take_over_products(model: nn.Module) -> None:
    """Have every 4-bit and 8-bit layer of `model` compute as layers_bnb.py says; other layers are left alone."""
    if importlib.util.find_spec("bitsandbytes"):
        from .layers_bnb import take_over

        take_over(model)


def _start_layer(
    layer: MaskedLayer, start: Start, rank: int, generator: torch.Generator, svd_device: str | None
) -> None:
    a, b, scaling = layer.factors(ADAPTER)
    if start in ("paper", "twin"):
        a0 = torch.randn((rank, a.shape[1]), generator=generator) * START_STD
        b0 = torch.randn((b.shape[0], rank), generator=generator) * START_STD
    elif min(a.shape[1], b.shape[0]) < rank:
        raise InputError(
            f"lora.r: got {rank}, more than the {min(a.shape[1], b.shape[0])} singular values of a target module"
        )
    elif start == "pissa":
        # Meng et al. 2024 (arXiv 2404.02948), eq. 2-3: the top-r singular triplets, halves of Σ in A and B.
        u, sigma, vh = torch.linalg.svd(_plain_weight(layer, svd_device), full_matrices=False)
        root = (sigma[:rank] / scaling).sqrt()
        a0, b0 = root[:, None] * vh[:rank], u[:, :rank] * root
    else:
        # Büyükakyüz 2024 (arXiv 2406.01775): the first r columns of Q and rows of R.
        q, r = torch.linalg.qr(_plain_weight(layer, svd_device))
        a0, b0 = r[:rank], q[:, :rank]
    a0, b0 = a0.to(a), b0.to(b)
    a[:rank], b[:, :rank] = a0, b0
    if start in TWIN_STARTS:
        a[rank:], b[:, rank:] = a0, -b0


def _plain_weight(layer: MaskedLayer, device: str | None) -> Tensor:
    """The base's weight in fp32; a 4-bit or 8-bit one dequantised."""
    base = cast(nn.Linear, layer.get_base_layer())
    weight: Tensor = base.weight
    if not isinstance(layer, MaskedLinear):
        from .layers_bnb import dequantised

        weight = dequantised(base, torch.float32).clone()
    return weight.detach().to(device or weight.device, torch.float32)


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


def check_fits(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], what: str) -> None:
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


def save_adapter(model: PeftModel, folder: Path, **facts: Any) -> None:
    """A plain PEFT adapter folder, with `facts` (start, stage, ...) and the trainable rank in lorapar.json."""
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER])
    rank = next(iter(masked_layers(model).values())).trainable_rank
    write_json(folder / "lorapar.json", {"rank": rank, **facts})


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """`PeftModel.from_pretrained` with our layers, trainable; InputError where the folder is not whole."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: not an adapter folder (adapter_model.safetensors is missing)")
    facts = read_json(folder / "lorapar.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("rank"), int):
        raise InputError(f"{folder / 'lorapar.json'}: corrupt: it holds no rank")
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'adapter_config.json'}: missing, corrupt or truncated ({error})") from error
    _register(config, model)
    try:
        peft_model = PeftModel.from_pretrained(cast(Any, model), str(folder), config=config, is_trainable=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{folder}: does not fit the model or is corrupt ({error})") from error
    for layer in masked_layers(peft_model).values():
        layer.trainable_rank = facts["rank"]
    return peft_model


@dataclass
class Snapshot:
    """What a model held before a stage: the LoRA elements themselves, and a checksum of every other parameter."""

    lora: dict[str, Tensor]
    others: dict[str, int]

    @classmethod
    def take(cls, model: nn.Module) -> "Snapshot":
        lora = {name: parameter.detach().clone() for name, parameter in lora_parameters(model).items()}
        return cls(lora, checksums(model))


def checksums(model: nn.Module) -> dict[str, int]:
    """An order-sensitive 64-bit checksum of the bits of every parameter that is no adapter's."""
    return {name: _checksum(p.detach()) for name, p in model.named_parameters() if ".lora_" not in name}


def _checksum(tensor: Tensor) -> int:
    total = 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.reshape(-1).view(kinds[tensor.element_size()])
    # In chunks, so that the int64 copies stay small beside the model.
    for number, chunk in enumerate(flat.split(1 << 22)):
        weights = torch.arange(1, chunk.numel() + 1, device=chunk.device) * 2654435761 + number
        total += int((chunk.long() * weights).sum())
    return total % (1 << 64)


def verify(
    model: nn.Module, before: Snapshot, partition: "Partition", stage: Literal["sft", "grpo"]
) -> dict[str, float]:
    """Compare the whole model, bit for bit, with what it was before `stage`.

    Returns {"active": count, "moved": count of active elements that changed}. Raises FrozenElementsChanged where an
    inactive element or any other parameter differs, or where not one active element moved.
    """
    after = checksums(model)
    for name, checksum in before.others.items():
        if after.get(name) != checksum:
            raise FrozenElementsChanged(f"{stage}: {name} of the frozen base changed")
    n_active = n_moved = 0
    for name, parameter in lora_parameters(model).items():
        mask = partition.active(stage)[name].to(parameter.device)
        changed = parameter.detach().view(torch.uint8) != before.lora[name].to(parameter).view(torch.uint8)
        changed = changed.view(*parameter.shape, -1).any(-1)
        stray = int((changed & ~mask).sum())
        if stray:
            raise FrozenElementsChanged(f"{stage}: {stray} inactive elements of {name} changed")
        n_active += int(mask.sum())
        n_moved += int(changed.sum())
    if n_moved == 0:
        raise FrozenElementsChanged(f"{stage}: not one of {n_active} active elements moved; nothing was trained")
    return {"active": n_active, "moved": n_moved}
