"""How the LoRA layers are attached to a model and started, saved and loaded.

A start with a twin (`twin`, `pissa`, `olora`) gives the adapter rank 2r at the same scaling: rows r..2r of A hold A₀,
and columns r..2r of B hold −B₀, inactive for ever. They cancel the start, so the model's function is the base's until
training moves it, and the base is never written. (Departure from the paper, which re-draws A and B from N(0, 0.01²) and
so shifts the base before the first step; that start is `paper`.)
"""

import copy
import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from ..distributed.sharding import is_part, whole_modules
from ..errors import InputError
from ..files import read_json, read_text, why_not_whole, write_json, write_text
from ..recipe.checks import check_lora
from ..recipe.sections import Start
from . import targets
from .layers import ADAPTER, MaskedLayer, MaskedLinear, check_fits, lora_parameters, masked_layers

log = logging.getLogger("lorapar")
TWIN_STARTS = ("twin", "pissa", "olora")
START_STD = 0.01  # of the paper's re-drawn A and B (released script)


def attach(
    model: nn.Module, lora_config: LoraConfig, start: Start = "paper", seed: int = 0, svd_device: str | None = None
) -> PeftModel:
    """PEFT's `get_peft_model` with our layers and the start asked for; the base is not written.

    What is adapted, its share of the weights, and what is left out and why, is one line of the log "lorapar".

    Args:
        model: whatever `get_peft_model` takes; the result is of the class that it returns for `task_type`.
        lora_config: PEFT's; not changed. Its r is the trainable rank. Without target_modules the paper's six
            projections are adapted, or every linear layer where the model lacks one (targets.py).
        start: "paper": A, B from N(0, 0.01²), which shifts the base; "twin": the same beside its frozen negative;
            "pissa", "olora": PEFT's formulas for A and B, with the twin in place of a changed base;
            "peft": whatever `init_lora_weights` says (B = 0 by default: it cannot be scored).
        seed: of the random starts, drawn on the CPU so that every device gets the same.

    Raises InputError for a LoRA option our layers do not have, and for a name among target_modules, exclude_modules
    and layers_to_transform that matches nothing or no nn.Linear.
    """
    check_options(lora_config)
    chosen = targets.resolve(model, lora_config)
    config = chosen.config
    rank = config.r
    if start == "peft" or config.init_lora_weights not in (False, start):
        _check_peft_start(config)
    if start != "peft":
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
    log.info("lora: %s", chosen.line)
    layers = masked_layers(peft_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Starts of the base's weights read them; of a sharded base, a block at a time.
        for name, _ in whole_modules(peft_model) if start in ("pissa", "olora") else peft_model.named_modules():
            if name in layers:
                layers[name].trainable_rank = rank
                layers[name].leave_meta()
                if start != "peft":
                    _start_layer(layers[name], start, rank, generator, svd_device)
    return peft_model


def check_options(lora_config: LoraConfig) -> None:
    """InputError for a LoRA option that our layers do not have, and for an adapter that is not LoRA."""
    if lora_config.peft_type != PeftType.LORA:
        raise InputError(f"lora: the adapter must be a LoraConfig, got {type(lora_config).__name__}")
    defaults = LoraConfig().to_dict()
    given = {key: value for key, value in lora_config.to_dict().items() if value != defaults[key]}
    # PEFT keeps the names of modules in sets.
    check_lora({key: sorted(value) if isinstance(value, set) else value for key, value in given.items()})


def with_our_layers(lora_config: LoraConfig) -> LoraConfig:
    """A copy from which `get_peft_model` makes our layers, for a trainer that calls it itself; it starts as PEFT's do.

    Raises InputError for an option that our layers do not have.
    """
    check_options(lora_config)
    _check_peft_start(lora_config)
    config = copy.deepcopy(lora_config)
    _register(config, None)
    return config


def _check_peft_start(config: LoraConfig) -> None:
    if config.init_lora_weights not in (True, "gaussian", "orthogonal"):
        raise InputError(
            f"lora.init_lora_weights: got {config.init_lora_weights!r}, which changes the base; "
            "use start: pissa or olora, or init_lora_weights: true, gaussian or orthogonal"
        )


def _register(config: LoraConfig, model: nn.Module | None) -> None:
    """PEFT does not persist this, so it is done again on load. The first class that a layer is an instance of wins."""
    quantised: dict[Any, Any] = {}
    if importlib.util.find_spec("bitsandbytes"):
        from .layers_bnb import LAYERS

        quantised = dict(LAYERS)
    if model is not None:
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
    base = cast(nn.Linear, layer.mergeable())
    weight: Tensor = base.weight
    if not isinstance(layer, MaskedLinear):
        from lorapar_kernels.bnb_weights import dequantised

        weight = dequantised(base, torch.float32).clone()
    return weight.detach().to(device or weight.device, torch.float32)


def save_adapter(model: PeftModel, folder: Path, **facts: Any) -> None:
    """A plain PEFT adapter folder, with `facts` (start, stage, ...) and the trainable rank in lorapar.json.

    Raises InputError for an adapter that is sharded.
    It calls its base what `load_model` has found as its origin; of a model that came otherwise, what PEFT says.
    """
    if any(map(is_part, lora_parameters(model).values())):
        raise InputError("lora: the adapter is sharded; gather it (full_tensor) before it is saved")
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER])
    name, revision = getattr(model.get_base_model(), "lorapar_origin", (None, None))
    if name is not None:
        path, card = folder / "adapter_config.json", folder / "README.md"
        settings = read_json(path)
        write_json(path, settings | {"base_model_name_or_path": name, "revision": revision})
        write_text(card, read_text(card).replace(settings["base_model_name_or_path"], name))
    rank = next(iter(masked_layers(model).values())).trainable_rank
    write_json(folder / "lorapar.json", {"rank": rank, **facts})


def load_adapter(model: nn.Module, folder: Path | str) -> PeftModel:
    """`PeftModel.from_pretrained` with our layers, trainable; InputError where the folder is not whole or not of it.

    model: the base itself, loaded; what the folder calls its base is not looked at.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {model!r}, expected the loaded base model, which "
                         "AutoModelForCausalLM.from_pretrained returns")  # fmt: skip
    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: not an adapter folder (adapter_model.safetensors is missing)")
    facts = read_json(folder / "lorapar.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("rank"), int):
        raise InputError(f"{folder / 'lorapar.json'}: corrupt: it holds no rank")
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'adapter_config.json'}: missing, corrupt or truncated ({error})") from error
    # PEFT looks the base up under this name whenever it saves; the name of its origin would be asked of the hub.
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    config.revision = None
    _register(config, model)
    try:
        peft_model = PeftModel.from_pretrained(cast(Any, model), str(folder), config=config, is_trainable=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{folder}: does not fit the model or is corrupt ({error})") from error
    # PEFT warns where names differ, and goes on with an adapter that does nothing.
    check_fits(lora_parameters(peft_model), saved_shapes(folder), str(folder))
    for layer in masked_layers(peft_model).values():
        layer.trainable_rank = facts["rank"]
    return peft_model


def restore_factors(model: nn.Module, folder: Path) -> None:
    """Write a saved adapter's factors into those of a model that has it, bit for bit; the parameters stay the same.

    Raises InputError where the folder's file is missing, not whole, or of other parameters.
    """
    path = folder / "adapter_model.safetensors"
    fault = why_not_whole(path)
    if fault:
        raise InputError(f"{folder}: {fault}")
    saved, parameters = load_file(path), lora_parameters(model)
    given = {f"{name.removesuffix('.weight')}.{ADAPTER}.weight": tensor for name, tensor in saved.items()}
    check_fits(parameters, given, str(folder))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(given[name])


def saved_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Zeros of the saved adapter's shapes under the names the loaded model gives its parameters."""
    ends = ((".lora_A.weight", f".lora_A.{ADAPTER}.weight"), (".lora_B.weight", f".lora_B.{ADAPTER}.weight"))
    shapes = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        for saved, loaded in ends:
            if name.endswith(saved):
                shapes[name.removesuffix(saved) + loaded] = torch.zeros(tensor.shape)
    return shapes
