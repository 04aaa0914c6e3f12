"""W + s · B A without touching a base: for weights handed to another engine, and for merged checkpoints.

The sum is taken in fp32 and rounded once, to the dtype that W had; one layer's temporary is all that is held. Nothing
is written into the model, so a base cannot drift however often this is done (merging and unmerging a bf16 base rounds
it twice a time: trl#6688).
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..distributed.sharding import whole_modules
from ..errors import InputError
from ..files import read_json, write_json
from .layers import ADAPTER, MaskedLayer, MaskedLinear

log = logging.getLogger("lorapar")
PREFIX = "base_model.model."  # what PEFT puts before a module's name
MADE_OF = "lorapar.json"  # in merged/ and gguf/: which adapter they were made of


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight [out, in] + scaling · b [out, r] a [r, in], summed in fp32: a new tensor, `dtype` or weight's."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a_, b_ = a.to(weight.device, wide), b.to(weight.device, wide)
    return torch.addmm(weight.to(wide), b_, a_, alpha=scaling).to(dtype or weight.dtype)


@torch.no_grad()
def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of a PEFT model's base by the name it has there, an adapted layer's with its delta added.

    The tensors of adapted and of quantised layers (in the model's own dtype) and of a sharded base are temporaries:
    each is given up as the next is asked for. Of every other parameter the tensor itself is given, not to be written.
    A sharded base is gathered a block at a time, by every process: all of them go through all parameters.
    """
    plain_dtype = next(p.dtype for n, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in n)
    seen = set()  # a tied head is the embedding again
    for name, module in whole_modules(model):
        if isinstance(module, MaskedLayer):
            yield from _of_layer(name, module, plain_dtype)
            continue
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            full = f"{name}.{own}".removeprefix(PREFIX)
            if own == "weight" and _is_quantised(module):
                yield full, _dequantised(module, plain_dtype)
            else:
                yield full, parameter.data


def _of_layer(name: str, layer: MaskedLayer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    base = cast(nn.Linear, layer.mergeable())
    if base is not layer.base_layer:
        kind = type(layer.base_layer).__name__
        raise InputError(f"lora: {name} adapts a {kind}, another adapter; merge or unload that one first")
    weight = base.weight.data if isinstance(layer, MaskedLinear) else _dequantised(base, torch.float32)
    out = weight.dtype if isinstance(layer, MaskedLinear) else dtype
    yield f"{name}.weight".removeprefix(PREFIX), merged_weight(weight, *layer.factors(ADAPTER), dtype=out)
    if base.bias is not None:
        yield f"{name}.bias".removeprefix(PREFIX), base.bias.data


def _is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # Codes of 4 bits may be stored in a floating dtype; their layer knows what they mean.
    return isinstance(weight, Tensor) and (
        not weight.is_floating_point() or getattr(module, "quant_state", None) is not None
    )


def _dequantised(module: nn.Module, dtype: torch.dtype) -> Tensor:
    from lorapar_kernels.bnb_weights import dequantised

    # A copy of its own: the buffer that it comes in is written over by the next product.
    return dequantised(module, dtype).clone()


def checkpoint_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model (a folder, or a hub id at `revision`), fetched where need be; None where there is none."""
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)  # fmt: skip
    return None if found is None else Path(found)


def weight_files(name: str, revision: str | None = None) -> tuple[Path | None, list[Path]]:
    """(the index, the safetensors) that transformers reads of a model, fetched where need be; index None for one file.

    Others may lie beside them, which are not the model that was trained: a copy of earlier weights, the same weights
    under other names (Mistral's consolidated.safetensors). [] where there are none that transformers reads.
    """
    config = checkpoint_file(name, "config.json", revision)
    named = None if config is None else read_json(config).get("transformers_weights")
    names = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    first = next((found for file in names if (found := checkpoint_file(name, file, revision))), None)
    if first is None:
        return None, []
    if first.suffix != ".json":
        return None, [first]
    return first, [Path(shard) for shard in get_checkpoint_shard_files(name, str(first), revision=revision)[0]]


def merge_checkpoint(
    name: str,
    adapter: Path,
    out: Path,
    dtype: torch.dtype,
    revision: str | None = None,
    stored: Mapping[str, str] | None = None,
) -> int:
    """Write the model `name` (a folder, or a hub id at `revision`) with the adapter in `adapter` merged in.

    A shard at a time. The model's own weights are read, in whatever form training held them, and written in `dtype`.
    stored: a parameter's name in the loaded model → its name in the checkpoint, where transformers renames it.
    Returns their bytes.
    Raises InputError where they are no plain safetensors, or lack one that the adapter adds to.
    """
    index, shards = weight_files(name, revision)
    if not shards:
        raise InputError(f"export.merged: {name} has no safetensors, and a quantised base is merged from those")
    base = shards[0].parent
    config = read_json(base / "config.json")
    if "quantization_config" in config:
        raise InputError(f"export.merged: {base} holds quantised weights alone; name the original model to merge into")
    settings = read_json(adapter / "adapter_config.json")
    root = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
    scaling, total, merged = settings["lora_alpha"] / root, 0, 0
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as factors:
        names = set(factors.keys())
        loaded = {at: parameter for parameter, at in (stored or {}).items()}
        for shard in shards:
            tensors = {}
            with safe_open(str(shard), framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (no mapping)
                    tensor = weights.get_tensor(key)
                    module = f"{PREFIX}{str(loaded.get(key, key)).removesuffix('.weight')}"
                    if f"{module}.lora_A.weight" in names:
                        a, b = (factors.get_tensor(f"{module}.lora_{side}.weight") for side in "AB")
                        tensor, merged = merged_weight(tensor, a, b, scaling, dtype), merged + 1
                    tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if merged * 2 != len(names):
        raise InputError(
            f"export.merged: {base} holds {merged} of the {len(names) // 2} weights that the adapter adds to"
        )
    settings = checkpoint_file(name, "generation_config.json", revision)
    if settings is not None:
        shutil.copy(settings, out / settings.name)
    if index is not None:
        write_json(out / index.name, read_json(index) | {"metadata": {"total_size": total}})
    write_json(out / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    return total
