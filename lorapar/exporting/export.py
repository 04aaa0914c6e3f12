"""The finished adapter as any PEFT installation loads it, and, where asked for, the model with the adapter merged in.

Both are loaded again with plain PEFT and plain transformers, and their logits held against ours: merged is not the
adapter (peft#2321), so what is written is what is checked.

A base that training held in 4 or 8 bits is not merged into: that would round base + delta to 4 bits anew. The merged
model is made from the original weights, a shard at a time, and checked against the adapter on those; how far that is
from the model that was trained is said.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from ..adapter.attach import save_adapter, take_over_products
from ..adapter.layers import ADAPTER, lora_parameters
from ..adapter.merging import MADE_OF, PREFIX, merge_checkpoint, merged_weight
from ..errors import InputError
from ..files import atomic_folder, read_json, sha256_file, write_json
from ..model.generate import stop_tokens
from ..model.load import auto_class
from ..model.locate import ALIAS_ORIGIN, ALIAS_WEIGHTS
from ..model.quantised import given_form
from .card import QUESTION, write_card

log = logging.getLogger("lorapar")

# What a multimodal model reads images, sound and film with.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
                   "audio_tokenizer_config.json")  # fmt: skip

# Largest tolerated logit difference, in units of the logits' own standard deviation, by the precision that rounds them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
# The largest of millions of logits can pass that by rounding alone: in bf16, 2 × 24 tokens of SmolLM2-135M after the
# quickstart's stage 2, 0.56 (ours is 0.26 from PEFT's layers in fp32, PEFT's in bf16 0.60). Then the root mean square
# decides, as a share of what the adapter does to the base's logits: 0.26 there, and 1 where the adapter is lost.
SHARE = 0.4
# An adapter that does no more than rounding does has no such share: after five steps in bf16 a logit was 0.509 off.
# There the root mean square itself decides, a fifth of the largest of millions of normal errors; that the tensors are
# the adapter's was checked before, bit by bit.
LARGEST = 5
# A merged model is held in fp32 against the adapter in fp32, so that nothing but the rounding of its weights is between
# them, and that by no more than this share of what the adapter does. From less than half of that on the share is said.
MERGED_SHARE = 0.5
SAID_SHARE = 0.2
# A merged layer is as near to base + delta as rounding once is, and has its bits, but for the order of a sum.
ROUNDED_ONCE = 1.05
OTHER_BITS = 1e-4
# In a mixture of experts, rounding moves the choice of an expert here and there, and with it a token's logits by any
# amount. There it decides that every tensor is what it should be.
HALF = (torch.float16, torch.bfloat16)


class ExportDiffers(RuntimeError):
    """What was written does not compute what the trained model computes."""


def export(
    model: PeftModel,
    tokenizer: Any,
    folder: Path,
    merged: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    prompt: str | list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Write `folder`/adapter (plain PEFT) and, where `merged`, `folder`/merged (plain transformers).

    Args:
        model: the trained model with our layers. dtype: of the merged weights; None: the base's, bf16 where quantised.
        revision, trust_remote_code: of the base, as it was loaded for training.
        prompt: shown on the cards as the model was asked; None: a made-up question.

    Returns the largest logit differences, {"adapter": d, "merged": d}, in units of the logits' standard deviation; of
    a quantised base also "merged_from_trained", from the merged model to the trained one: what leaving 4 bits costs.
    Raises ExportDiffers where one passes `TOLERANCE`, in half precision where it passes `SHARE` as well, and where the
    adapter's tensors or the merged model's are others than they should be; InputError where `dtype` rounds so much of
    the adapter away that the merged model would not be the trained one.
    """
    base = model.get_base_model()
    base_dtype = next(p.dtype for n, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in n)
    form = given_form(base.config)
    probe = _probe_tokens(model, tokenizer)
    ours = _logits(model, probe)
    differences = {}
    stops = stop_tokens(base, tokenizer)
    if prompt is None:
        prompt = QUESTION if tokenizer.chat_template is None else [{"role": "user", "content": QUESTION}]
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with atomic_folder(folder / "adapter") as temporary:
        save_adapter(model, temporary, stage="final", stop_tokens=stops)
        tokenizer.save_pretrained(temporary)
        # The base where it was loaded from, and what the adapter calls it, which another machine finds.
        name = str(base.name_or_path)
        called = read_json(temporary / "adapter_config.json")["base_model_name_or_path"]
        kind = _auto_class(name, source).__name__
        weights = ALIAS_WEIGHTS if called == ALIAS_ORIGIN != name else ""
        write_card(temporary, called, tokenizer, prompt, stops, merged=False, auto_class=kind, weights=weights)
        plain = PeftModel.from_pretrained(_load_plain(name, base_dtype, source, base if form else None), str(temporary))
        if form is None:
            plain = plain.to(probe.device)
        else:
            # LLM.int8() rounds what a layer is given too, and a CPU with AVX512-BF16 computes 4-bit products in bf16
            # whatever the dtype: no properties of the adapter (lorapar_kernels/bnb_weights.py).
            take_over_products(plain)
        with plain.disable_adapter():
            without = _logits(plain, probe)
        _check_adapter(model, plain)
        differences["adapter"] = _check("adapter", ours, _logits(plain, probe), base_dtype, without,
                                        lambda: _has_experts(base) and _same_adapter(model, plain))  # fmt: skip
    if merged and form is not None:
        del plain
        differences |= _merge_original(
            folder, name, called, ours, probe.cpu(), tokenizer, dtype or torch.bfloat16, form, source, stops, prompt
        )
    elif merged:
        target = dtype or base_dtype
        with atomic_folder(folder / "merged") as temporary:
            # In fp32, so that the sum is rounded once, to the dtype that is written.
            plain = plain.to(torch.float32)
            adapted = _with_and_without(plain, probe)
            whole = cast(Any, plain).merge_and_unload(safe_merge=True).to(target)
            whole.generation_config.eos_token_id = stops or None
            whole.save_pretrained(str(temporary), safe_serialization=True)
            del plain, whole
            tokenizer.save_pretrained(temporary)
            _copy_processor(name, temporary, tokenizer, revision)
            write_card(temporary, called, tokenizer, prompt, stops, merged=True, auto_class=kind)
            _write_made_of(temporary, folder / "adapter")
            back = _load_plain(str(temporary), target, {**source, "revision": None}).to(probe.device)
            rounded = _check_merged_weights(model, back, target)
            differences["merged"] = _check(
                "merged", ours, _logits(back, probe), max((target, base_dtype), key=_coarseness), without,
                lambda: _has_experts(base),
            )  # fmt: skip
            _check_nearer(adapted, back, probe, rounded)
    return differences


def _merge_original(
    folder: Path,
    name: str,
    called: str,
    ours: torch.Tensor,
    probe: torch.Tensor,
    tokenizer: Any,
    dtype: torch.dtype,
    form: str,
    source: dict[str, Any],
    stops: list[int],
    prompt: Any,
) -> dict[str, float]:
    """`folder`/merged from the original weights; on the CPU, since a card that trained in 4 bits may not hold them."""
    with atomic_folder(folder / "merged") as temporary:
        # In fp32 as it is merged, whatever form its checkpoint has: base + delta is rounded once.
        original = _load_plain(name, torch.float32, source)
        stored = {at: _stored_name(original, at) for at, _ in original.named_parameters()}
        size = merge_checkpoint(name, folder / "adapter", temporary, dtype, source["revision"], stored)
        settings = temporary / "generation_config.json"
        write_json(settings, {**(read_json(settings) if settings.is_file() else {}), "eos_token_id": stops or None})
        tokenizer.save_pretrained(temporary)
        kind = _auto_class(name, source).__name__
        write_card(temporary, called, tokenizer, prompt, stops, merged=True, auto_class=kind)
        _write_made_of(temporary, folder / "adapter")
        _copy_processor(name, temporary, tokenizer, source["revision"])
        adapted = PeftModel.from_pretrained(original, str(folder / "adapter"))
        back = _load_plain(str(temporary), dtype, {**source, "revision": None})
        logits = _logits(back, probe)
        rounded = _check_merged_weights(adapted, back, dtype)
        difference = _check("merged", _logits(adapted, probe), logits, dtype, same=lambda: _has_experts(back))
        wide = _with_and_without(adapted, probe)
        del adapted, original
        _check_nearer(wide, back, probe, rounded)
    from_trained = float((logits - ours.cpu()).abs().max() / ours.std())
    log.info(
        "export: merged from the original weights in %s (%d MB), not into the %s base, which would round base + delta "
        "to it anew; its logits are up to %.2g standard deviations from those of the model that was trained",
        _name(dtype), size // 10**6, form, from_trained,
    )  # fmt: skip
    return {"merged": difference, "merged_from_trained": from_trained}


def _write_made_of(folder: Path, adapter: Path) -> None:
    write_json(folder / MADE_OF, {"adapter_sha256": sha256_file(adapter / "adapter_model.safetensors")})


def _load_plain(name: str, dtype: torch.dtype, source: dict[str, Any], quantised_as: Any = None) -> Any:
    """The base as plain transformers loads it; `quantised_as`: in the form and on the device of that model."""
    options = dict(source)
    if quantised_as is not None:
        device = next(quantised_as.parameters()).device
        options |= {"quantization_config": quantised_as.config.quantization_config, "device_map": {"": str(device)}}
    with _as_input_error(name):
        return _auto_class(name, source).from_pretrained(name, dtype=dtype, use_safetensors=True, **options)


def _auto_class(name: str, source: dict[str, Any]) -> Any:
    with _as_input_error(name):
        return auto_class(AutoConfig.from_pretrained(name, **source))


@contextlib.contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"model.name: the base {name!r} cannot be loaded ({error})") from None


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _stored_name(model: Any, name: str) -> str:
    """What a parameter is called in the model's checkpoints: transformers renames those of some wrappers."""
    return next(iter(revert_weight_conversion(model, {name: model.get_parameter(name)})))


def _copy_processor(name: str, folder: Path, tokenizer: Any, revision: str | None) -> None:
    """Put what the base `name` (a folder or a hub id) reads images with beside a merged model; its text has one."""
    template = [] if tokenizer.chat_template else ["chat_template.json"]
    for file in (*PROCESSOR_FILES, *template):
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if found is not None:
            shutil.copy(found, folder / file)


def _probe_tokens(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    config = cast(Any, model).config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(len(tokenizer), text.vocab_size), (2, 24), generator=generator)
    if text is not config:
        # The places of images, without an image.
        media = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
        tokens[torch.isin(tokens, torch.tensor([value for value in media if isinstance(value, int)]))] = 2
    return tokens.to(next(model.parameters()).device)


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.eval()
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    model.train(training)
    return logits


def _has_experts(model: nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())


def _same_adapter(model: PeftModel, plain: PeftModel) -> bool:
    """Whether two models have the same tensors, bit for bit, and layers of the same scaling."""
    ours, scalings = dict(model.named_parameters()), _scalings(model)
    same = all(name in ours and torch.equal(tensor, ours[name]) for name, tensor in plain.named_parameters())
    return same and scalings == _scalings(plain)


def _scalings(model: nn.Module) -> dict[str, float]:
    return {name: layer.scaling[ADAPTER] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _check_adapter(model: PeftModel, plain: PeftModel) -> None:
    """ExportDiffers unless `plain` has the trained adapter: PEFT warns where it finds no weights, and goes on."""
    theirs = dict(plain.named_parameters())
    for name, tensor in lora_parameters(model).items():
        if name not in theirs or not torch.equal(theirs[name].to(tensor), tensor):
            raise ExportDiffers(f"adapter: loaded by PEFT, {name} is not as it was trained")
    if _scalings(model) != _scalings(plain):
        raise ExportDiffers("adapter: loaded by PEFT, its layers have another scaling than in training")


@dataclass
class Rounded:
    """What rounding to `dtype` does to a merge: how many of the adapted elements stay as they were, from how many of
    the layers it takes most of the delta, and whether the base's own weights are numbers of that dtype."""

    dtype: torch.dtype
    on_grid: bool
    elements: int = 0
    still: int = 0
    layers: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"the adapter's change is below the spacing of {_name(self.dtype)} and rounded away in "
            f"{self.still / self.elements:.0%} of the elements, and most of it in {self.lost} of {self.layers} layers"
        )


@torch.no_grad()
def _check_merged_weights(model: PeftModel, merged: Any, dtype: torch.dtype) -> Rounded:
    """ExportDiffers unless each tensor of a merged model is the base's with the adapter's delta, rounded once."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    found = Rounded(dtype, on_grid=True)
    for name, tensor in model.named_parameters():
        if ".lora_" in name:
            continue
        plain_name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        got = merged.get_parameter(plain_name).to(tensor.device)
        base = tensor.to(dtype)
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is None:
            if not torch.equal(got.float(), base.float()):
                raise ExportDiffers(f"merged: {plain_name} is not the base's, and the adapter does not change it")
            continue
        a, b = (cast(Any, factors)[ADAPTER].weight for factors in (layer.lora_A, layer.lora_B))
        wanted = merged_weight(tensor.float(), a, b, layer.scaling[ADAPTER])
        rounded, delta = wanted.to(dtype), wanted - tensor.float()
        error, least = (float((one.float() - wanted).norm()) for one in (got, rounded))
        # fp32 sums in another order too.
        wrong = error > ROUNDED_ONCE * least + 4 * torch.finfo(torch.float32).eps * float(wanted.norm())
        if dtype in HALF:
            others, changed = int((got != rounded).sum()), int((rounded != base).sum())
            wrong |= others > 0.05 * changed + OTHER_BITS * got.numel() + 2
        if wrong or not math.isfinite(error):
            raise ExportDiffers(
                f"merged: {plain_name} is not base + delta rounded to {_name(dtype)}: it is off by {error:.3g} (norm), "
                f"where rounding explains {least:.3g} and the delta is {float(delta.norm()):.3g}"
            )
        kept = float(((rounded.float() - base.float()) * delta).sum())
        found.elements += got.numel()
        found.still += int(((rounded == base) & (delta != 0)).sum())
        found.layers += 1
        found.lost += kept < float(delta.square().sum()) / 2
        found.on_grid &= torch.equal(base.float(), tensor.float())
    return found


def _with_and_without(model: PeftModel, probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits with the adapter, logits of the base)"""
    with model.disable_adapter():
        base = _logits(model, probe)
    return _logits(model, probe), base


def _check_nearer(adapted: tuple[torch.Tensor, torch.Tensor], merged: Any, probe: torch.Tensor, found: Rounded) -> None:
    """InputError where a merged model lies not much nearer to the adapter than the base does; `merged` becomes fp32."""
    with_adapter, base = adapted
    effect = float((with_adapter - base).norm())
    share = 0.0
    # Rounding moves the choice of experts, and logits by any amount with it; and what an adapter does may be less than
    # the rounding of fp32. Then the weights alone decide.
    if not _has_experts(merged) and effect > 1e-5 * float(with_adapter.norm()):
        share = float((_logits(merged.to(torch.float32), probe) - with_adapter).norm()) / effect
    name = _name(found.dtype)
    # A base of more precision than is written is rounded itself, as it would be without an adapter.
    if found.lost == found.layers or (share > MERGED_SHARE and found.on_grid):
        of = f"; the logits move by {share:.0%} of what the adapter does" if share else ""
        raise InputError(
            f"export.dtype: {name} is too coarse to merge into: {found}{of}; set export.dtype: float32, or leave "
            "export.merged out and use adapter/, which is written and whole"
        )
    if share > SAID_SHARE or found.lost:
        log.warning("export: merged: rounding to %s moves the logits by %.0f %% of what the adapter does, and %s; "
                    "export.dtype: float32 keeps all, as adapter/ does", name, 100 * share, found)  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    what: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    dtype: torch.dtype,
    without: torch.Tensor | None = None,
    same: Callable[[], bool] = lambda: False,
) -> float:
    """The largest difference in standard deviations; ExportDiffers where rounding to `dtype` does not explain it.

    without: the base's logits, for `SHARE`. same: whether the difference can only be rounding's.
    """
    difference = float((ours - theirs).abs().max() / ours.std())
    if difference <= TOLERANCE[dtype]:
        return difference
    if without is not None and dtype in HALF:
        share = float((ours - theirs).norm() / (ours - without).norm())
        if share <= SHARE:
            log.info(
                "export: %s: a logit is %.2g standard deviations off by rounding to %s; in the root mean square it is "
                "%.2g of what the adapter does", what, difference, _name(dtype), share,
            )  # fmt: skip
            return difference
    rms = float((ours - theirs).square().mean().sqrt() / ours.std())
    if dtype in HALF and rms <= TOLERANCE[dtype] / LARGEST:
        log.info("export: %s: a logit is %.2g standard deviations off by rounding to %s, the root mean square is %.2g",
                 what, difference, _name(dtype), rms)  # fmt: skip
        return difference
    if dtype in HALF and same():
        log.info(
            "export: %s: a logit is %.2g standard deviations off though every tensor is as it should be: rounding to "
            "%s has moved the choice of experts", what, difference, _name(dtype),
        )  # fmt: skip
        return difference
    raise ExportDiffers(
        f"{what}: its logits differ from the trained model's by {difference:.3g} standard deviations, "
        f"more than the {TOLERANCE[dtype]} that {dtype} explains"
    )
