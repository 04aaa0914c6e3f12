"""`gguf/` for llama.cpp and Ollama: the adapter, the merged model in f16 or q8_0, the base in f16, and Modelfiles.

The base's weights are read from its own checkpoint, a tensor at a time, whatever form training held them in: a base
trained in 4 bits is merged in its original weights, as `merged/` is. base + delta is summed in fp32 and rounded once.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from ..adapter.layers import ADAPTER, MaskedLinear, masked_layers
from ..adapter.merging import MADE_OF, PREFIX, checkpoint_file, merged_weight, weight_files
from ..errors import InputError
from ..files import atomic_folder, read_json, write_json
from ..model.generate import stop_tokens
from ..model.quantised import given_form
from .gguf_adapter import Factors, folded, write_adapter
from .gguf_model import (
    ROPE_FACTORS,
    add_hyperparameters,
    architecture,
    as_laid_out,
    check_model,
    rope_factors,
    say_what_differs,
    tensor_names,
)
from .gguf_tokenizer import add_tokenizer, check_tokenizer, say_other_tokens
from .modelfile import Asked, say_bos, write_modelfile

log = logging.getLogger("lorapar")
FILES = {"adapter": "adapter.gguf", "f16": "model-f16.gguf", "q8_0": "model-q8_0.gguf", "base": "base-f16.gguf"}
FOLDER = "gguf"
F16_MOST = torch.finfo(torch.float16).max


def files_of(forms: Iterable[str]) -> list[str]:
    """What `export_gguf` writes into its folder for certain; a Modelfile for the adapter depends on the base."""
    forms = list(forms)
    return [FILES[form] for form in forms] + ["Modelfile"] * bool({"f16", "q8_0"} & set(forms))


def check_gguf(config: Any, tokenizer: Any, forms: Iterable[str]) -> None:
    """InputError, in one line, where these forms of this model or tokenizer are not made; no weight is read."""
    check_model(config)
    check_tokenizer(tokenizer)
    whole = sorted(set(forms) - {"adapter"})
    if whole and given_form(config) is not None:
        raise InputError(
            f"export.gguf: got {', '.join(whole)}, but the model holds its weights as {given_form(config)} alone; name "
            "the original model, or ask for adapter"
        )


def check_space(model: PeftModel, folder: Path, forms: Iterable[str], revision: str | None = None) -> None:
    """InputError where the disk of `folder` has no room for what `export_gguf` writes; no weight is read."""
    base: Any = model.get_base_model()
    whole = ["q8_0" if form == "q8_0" else "f16" for form in forms if form != "adapter"]
    needed = 0
    if "adapter" in forms:
        factors = (layer.factors(ADAPTER) for layer in masked_layers(model).values())
        needed += sum(4 * (a.numel() + b.numel()) for a, b, _ in factors)
    if whole:
        shapes = Checkpoint(str(base.name_or_path), revision).shapes
        tensors = [shapes[at] for at in tensor_names(base.config, list(shapes))]
        needed += sum(_nbytes(shape, _form(shape, form)) for form in whole for shape in tensors)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
    if needed > free:
        raise InputError(
            f"export.gguf: {', '.join(forms)} need {needed / 1e6:.0f} MB, and the disk of {folder} has "
            f"{free / 1e6:.0f} MB free; free some space, or ask for fewer forms"
        )


def export_gguf(
    model: PeftModel,
    tokenizer: Any,
    folder: Path,
    forms: Iterable[str],
    revision: str | None = None,
    asked: Asked = Asked(),  # noqa: B008 (a value)
    base_file: Path | None = None,
    adapter_sha256: str | None = None,
) -> None:
    """Write `folder`/gguf with the `forms` asked for, of "adapter", "f16", "q8_0" (the merged model) and "base" (f16).

    The folder then holds those alone: what an earlier export wrote there is removed.

    Args:
        model: the trained model with our layers; its base names the checkpoint that is read. revision: of that.
        asked: how training asked, for the Modelfiles. base_file: the .gguf that the base was made from, which the
            adapter's Modelfile names where "base" is not written.
        adapter_sha256: of the adapter's own file, recorded in lorapar.json beside the files made of it.

    Raises InputError for a model or tokenizer that is not converted, for a checkpoint that cannot be read or
    holds other weights than the model, and for a disk without room.
    """
    base: Any = model.get_base_model()
    config = base.config
    forms = list(forms)
    # A base quantised as it was loaded has plain weights in its checkpoint, which says so itself (`Checkpoint`).
    check_gguf(config, tokenizer, ["adapter"])
    say_what_differs(config)
    say_bos(tokenizer, asked)
    say_other_tokens(tokenizer, asked.chat)
    check_space(model, folder, forms, revision)
    called = str(getattr(base, "lorapar_origin", (base.name_or_path,))[0])
    layers = {f"{name.removeprefix(PREFIX)}.weight": layer for name, layer in masked_layers(model).items()}
    factors = {}
    for name, layer in layers.items():
        a, b, scaling = layer.factors(ADAPTER)
        a, b = (one.detach().to("cpu", torch.float32) for one in (a, b))
        factors[name] = Factors(a, b, scaling, layer.trainable_rank)
    stops, name = stop_tokens(base, tokenizer), Path(called).name
    weights = None if set(forms) == {"adapter"} else Checkpoint(str(base.name_or_path), revision)
    if weights is not None:
        _check_base(model, weights)
    with atomic_folder(folder / FOLDER) as temporary:
        if "adapter" in forms:
            ranks = write_adapter(temporary / FILES["adapter"], config, factors, f"{name} LoRA-PAR adapter")
            log.info("export: gguf: the adapter has %s", ranks)
        if weights is not None:
            for form in ("f16", "q8_0", "base"):
                if form in forms:
                    deltas = {} if form == "base" else folded(factors)
                    title = name if form == "base" else f"{name} LoRA-PAR"
                    write_model(temporary / FILES[form], config, tokenizer, weights, deltas,
                                "q8_0" if form == "q8_0" else "f16", title, asked.chat)  # fmt: skip
        whole = next((FILES[form] for form in ("q8_0", "f16") if form in forms), None)
        if whole is not None:
            write_modelfile(temporary / "Modelfile", f"./{whole}", None, tokenizer, stops, asked)
        if "adapter" in forms:
            source = f"./{FILES['base']}" if "base" in forms else base_file and str(base_file)
            if source:
                adapter = f"./{FILES['adapter']}"
                write_modelfile(temporary / "Modelfile.adapter", source, adapter, tokenizer, stops, asked)
            else:
                log.info("export: gguf: no Modelfile.adapter: Ollama adds the adapter to a base in GGUF; add base to "
                         "export.gguf")  # fmt: skip
        if adapter_sha256 is not None:
            write_json(temporary / MADE_OF, {"adapter_sha256": adapter_sha256})
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.gguf"))}
        removed = sorted({path.name for path in (folder / FOLDER).glob("*.gguf")} - set(sizes))
    if removed:
        log.warning("export: gguf: %s of an earlier export removed: the folder holds what was asked for last",
                    ", ".join(removed))  # fmt: skip
    log.info("export: gguf: %s", ", ".join(f"{file} ({size / 1e6:.0f} MB)" for file, size in sizes.items()))


class Checkpoint:
    """The safetensors of a model (a folder, or a hub id at `revision`), each tensor read as it is asked for."""

    def __init__(self, name: str, revision: str | None = None):
        config = checkpoint_file(name, "config.json", revision)
        if config is not None and "quantization_config" in read_json(config):
            raise InputError(f"export.gguf: {name} holds quantised weights alone; name the original model to convert")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for path in weight_files(name, revision)[1]:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    self.files[key], self.shapes[key] = path, list(file.get_slice(key).get_shape())
        self.name = name
        if not self.files:
            raise InputError(f"export.gguf: {name} has no safetensors, and a GGUF is made from those")

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def _check_base(model: PeftModel, weights: Checkpoint) -> None:
    """InputError unless the checkpoint holds what is beneath the adapter; a quantised layer cannot be compared."""
    for name, layer in masked_layers(model).items():
        at = f"{name.removeprefix(PREFIX)}.weight"
        if at not in weights.files:
            raise InputError(f"export.gguf: the checkpoint lacks {at}, which the adapter adds to")
        if isinstance(layer, MaskedLinear):
            held = cast(nn.Linear, layer.base_layer).weight.detach()
            if not torch.equal(weights.read(at).to(held.dtype), held.cpu()):
                raise InputError(
                    f"export.gguf: {at} in {weights.files[at]} is not what the adapter was trained on; a GGUF is made "
                    "from the base's checkpoint, which has changed since it was loaded"
                )


def write_model(
    path: Path,
    config: Any,
    tokenizer: Any,
    weights: Checkpoint,
    deltas: Mapping[str, Factors],
    form: str,
    name: str,
    chat: bool = True,
) -> None:
    """Write one whole GGUF model, a tensor at a time; `form`: "f16", "q8_0" or, to compare by, "f32".

    deltas: {parameter: factors, folded} that are added to the checkpoint's weights. chat: as for `add_tokenizer`.
    As llama.cpp's converter does, vectors stay fp32, and of a matrix whose rows are no whole blocks of 32 q8_0 is f16.
    Raises InputError where rounding leaves no layer most of its change.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    add_hyperparameters(writer, config)
    kinds = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
             "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}  # fmt: skip
    writer.add_file_type(kinds[form])
    add_tokenizer(writer, tokenizer, config.vocab_size, chat)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    called, factors = tensor_names(config, list(weights.shapes)), rope_factors(config)
    forms = {at: _form(weights.shapes[at], form) for at in called}
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, cast(Any, factors.numpy().dtype), factors.nbytes)
    for at, label in called.items():
        _add_info(writer, label, weights.shapes[at], forms[at])
    # What the file holds is known before any weight is read, so none has to wait in memory.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    kept = []
    for at in called:
        base, delta = weights.read(at), deltas.get(at)
        weight = base.float()
        if delta is not None:
            weight = merged_weight(base, delta.a, delta.b, delta.scaling, torch.float32)
        if forms[at] == gguf.GGMLQuantizationType.F16 and not (weight.abs() <= F16_MOST).all():
            raise InputError(f"export.gguf: {at} holds numbers beyond f16's {F16_MOST:.0f}; leave f16 and base out")
        array = as_laid_out(config, at, weight).contiguous().numpy()
        packed = gguf.quants.quantize(array, forms[at])
        writer.write_tensor_data(packed)
        if delta is not None:
            kept += _kept(as_laid_out(config, at, base.float()).contiguous().numpy(), array, packed, forms[at])
    writer.close()
    lost = sum(share < 0.5 for share in kept)
    if kept and lost == len(kept):
        raise InputError(
            f"export.gguf: {form} is too coarse to merge into: it rounds most of the adapter's change away in every "
            "layer; use adapter and base"
        )
    if lost:
        log.warning("export: gguf: rounding to %s takes most of the adapter's change from %d of %d layers; adapter and "
                    "base keep all", form, lost, len(kept))  # fmt: skip


def _kept(base: Any, merged: Any, packed: Any, form: Any) -> list[float]:
    """[the share of the adapter's change to a weight that is left once base and sum are rounded]; [] without a change.

    About 1 where rounding only adds noise; 0 where the base's weights are numbers of the form, and the change is too
    small to reach the next ones.
    """
    import gguf

    delta = merged - base
    if not delta.any():
        return []
    rounded = gguf.quants.dequantize(gguf.quants.quantize(base, form), form)
    left = (gguf.quants.dequantize(packed, form) - rounded) * delta
    return [float(left.sum() / (delta * delta).sum())]


def _form(shape: list[int], form: str) -> Any:
    import gguf

    if len(shape) == 1 or form == "f32":
        return gguf.GGMLQuantizationType.F32
    if form == "q8_0" and shape[-1] % 32 == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _nbytes(shape: list[int], form: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[form]
    return math.prod(shape) // block * size


def _add_info(writer: Any, name: str, shape: list[int], form: Any) -> None:
    import gguf
    import numpy as np

    if form == gguf.GGMLQuantizationType.Q8_0:
        stored, dtype = gguf.quant_shape_to_byte_shape(shape, form), np.dtype(np.uint8)
    else:
        stored, dtype = shape, np.dtype(np.float32 if form == gguf.GGMLQuantizationType.F32 else np.float16)
    writer.add_tensor_info(name, stored, dtype, _nbytes(shape, form), raw_dtype=form)
