"""What export writes is loaded by plain PEFT and plain transformers and computes what the trained model computes."""

import importlib

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from transformers import AutoModelForCausalLM

import lorapar
from lorapar.adapter.layers import lora_parameters
from lorapar.errors import InputError
from lorapar.exporting.export import ExportDiffers
from tests.architectures import save
from tests.lorapar.test_adapter import STARTS, config, logits
from tests.tiny import tiny_tokenizer


def trained(tiny_folder, start, dtype=torch.float32, size=0.05, **keys):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    model = lorapar.attach(base, config(**keys), start=start)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * size)
    return model


@pytest.mark.parametrize("start", STARTS)
def test_adapter_and_merged_model_give_our_logits(tiny_folder, tmp_path, start):
    model = trained(tiny_folder, start)
    differences = lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True)
    assert set(differences) == {"adapter", "merged"}
    assert max(differences.values()) < 1e-3
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(tiny_folder, tmp_path, dtype):
    model = trained(tiny_folder, "twin", dtype)
    lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype


def lost(self, *_, **__):
    return self.unload()


def twice(self, *args, **keys):
    for layer in _layers(self):
        layer.scaling["default"] *= 2
    return MERGE(self, *args, **keys)


def half_of_the_layers(self, *args, **keys):
    for layer in _layers(self)[::2]:
        layer.scaling["default"] = 0.0
    return MERGE(self, *args, **keys)


def more_than_it_should(self, *args, **keys):
    for layer in _layers(self):
        layer.scaling["default"] *= 1.25
    return MERGE(self, *args, **keys)


def one_layer_less(self, *args, **keys):
    _layers(self)[-1].scaling["default"] = 0.0
    return MERGE(self, *args, **keys)


MERGE = LoraModel.merge_and_unload


def _layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("fault", [lost, twice, half_of_the_layers, more_than_it_should, one_layer_less])
@pytest.mark.parametrize(
    ("dtype", "target", "size"),
    [
        (torch.bfloat16, None, 0.05),
        # Its effect on the logits is a few hundredths of a standard deviation, less than bf16 rounds them by.
        (torch.bfloat16, None, 0.002),
        (torch.bfloat16, torch.float32, 0.002),
        (torch.float32, None, 2e-5),
        (torch.float32, torch.bfloat16, 0.002),
        (torch.float16, None, 5e-4),
    ],
)
def test_a_merge_that_is_not_the_adapter_is_found_out(tiny_folder, tmp_path, monkeypatch, fault, dtype, target, size):
    model = trained(tiny_folder, "twin", dtype, size)
    monkeypatch.setattr(LoraModel, "merge_and_unload", fault)
    with pytest.raises(ExportDiffers, match=r"merged: model.layers.* is not base \+ delta rounded to"):
        lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True, dtype=target)
    assert not (tmp_path / "merged").exists()


def test_what_bf16_rounds_away_is_said_and_refused_where_the_adapter_is_lost(tiny_folder, tmp_path, caplog):
    model = trained(tiny_folder, "twin", torch.bfloat16, 0.005)
    with caplog.at_level("WARNING", "lorapar"):
        lorapar.export(model, tiny_tokenizer(), tmp_path / "some", merged=True)
    assert "rounding to bfloat16 moves the logits by" in caplog.text
    model = trained(tiny_folder, "twin", torch.bfloat16, 1e-4)
    said = r"^export.dtype: bfloat16 is too coarse to merge into: .* 9\d% of the elements, and most of it in 12 of 12 l"
    with pytest.raises(InputError, match=said):
        lorapar.export(model, tiny_tokenizer(), tmp_path / "all", merged=True)
    assert not (tmp_path / "all" / "merged").exists()
    assert (tmp_path / "all" / "adapter" / "adapter_model.safetensors").exists()
    caplog.clear()
    lorapar.export(model, tiny_tokenizer(), tmp_path / "wide", merged=True, dtype=torch.float32)
    assert not caplog.records
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "wide" / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).float()
    plain = PeftModel.from_pretrained(base, tmp_path / "wide" / "adapter")
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_peft_does_not_load_is_found_out(tiny_folder, tmp_path, monkeypatch):
    """PEFT warns of missing weights, and goes on with its start: the base again."""
    load = PeftModel.from_pretrained

    def forgetful(base, folder):
        plain = load(base, folder)
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name:
                parameter.data.zero_()
        return plain

    model = trained(tiny_folder, "twin", torch.bfloat16, 0.002)
    monkeypatch.setattr(PeftModel, "from_pretrained", forgetful)
    with pytest.raises(ExportDiffers, match="adapter: loaded by PEFT, .*lora_B.* is not as it was trained"):
        lorapar.export(model, tiny_tokenizer(), tmp_path)


def test_the_trained_model_is_left_as_it_was(tiny_folder, tmp_path):
    model = trained(tiny_folder, "twin")
    before = logits(model)
    lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True)
    assert torch.equal(logits(model), before)
    assert model.training is False


def test_in_half_precision_a_lone_large_difference_is_rounding_and_a_lost_adapter_is_not():
    """As after the quickstart's stage 2 in bf16: one logit of millions 0.56 standard deviations off."""
    export = importlib.import_module("lorapar.exporting.export")
    generator = torch.Generator().manual_seed(0)
    without, effect, noise = (torch.randn(48, 4096, generator=generator) for _ in range(3))
    ours = without + 0.3 * effect
    theirs = ours + 0.05 * noise
    theirs[7, 7] += 0.6
    assert 0.5 < export._check("adapter", ours, theirs, torch.bfloat16, without) < 1.0
    for wrong in (without, without + 0.05 * noise, ours + 0.2 * noise, ours * float("nan")):
        with pytest.raises(ExportDiffers, match="adapter: its logits differ"):
            export._check("adapter", ours, wrong, torch.bfloat16, without)
    # An adapter that does less than rounding: its tensors have been compared, and rounding alone is between the logits.
    faint = without + 0.02 * effect
    rounded = faint + 0.06 * noise
    rounded[7, 7] += 0.6
    assert 0.5 < export._check("adapter", faint, rounded, torch.bfloat16, without) < 1.0
    with pytest.raises(ExportDiffers, match="adapter: its logits differ"):
        export._check("adapter", faint, faint + 0.12 * noise + (noise == noise.max()), torch.bfloat16, without)
    # Nothing but rounding of half precision is that large.
    with pytest.raises(ExportDiffers, match=r"more than the 0\.001"):
        export._check("adapter", ours, theirs, torch.float32, without)


@pytest.mark.parametrize(
    ("name", "lost"), [("gpt_oss", ""), ("gpt_oss", "adapter"), ("gpt_oss", "merged"), ("qwen3", "")]
)
def test_rounding_that_moves_the_choice_of_experts_is_told_from_a_lost_adapter(tmp_path, monkeypatch, name, lost):
    """As if rounding had moved the logits out of every tolerance: with experts the tensors decide."""
    exporting = importlib.import_module("lorapar.exporting.export")
    monkeypatch.setitem(exporting.TOLERANCE, torch.bfloat16, -1.0)
    monkeypatch.setattr(exporting, "SHARE", -1.0)
    save(name, tmp_path / "base")
    model = trained(tmp_path / "base", "twin", torch.bfloat16, target_modules=["q_proj", "v_proj"])
    if lost == "merged":
        monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    if lost == "adapter":
        load = PeftModel.from_pretrained

        def forgetful(base, folder):
            plain = load(base, folder)
            next(p for n, p in plain.named_parameters() if ".lora_B." in n).data[0, 0] += 1e-3
            return plain

        monkeypatch.setattr(PeftModel, "from_pretrained", forgetful)
    if name == "gpt_oss" and not lost:
        lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True)
    else:
        with pytest.raises(ExportDiffers, match="its logits differ|is not as it was|is not base"):
            lorapar.export(model, tiny_tokenizer(), tmp_path, merged=True)
