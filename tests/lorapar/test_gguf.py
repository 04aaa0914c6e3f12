"""GGUF files: what they hold, read by transformers' own reader, what is refused, and how the stage writes them."""

import json
import logging
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, Qwen3Config

from lorapar.adapter.attach import attach
from lorapar.adapter.layers import ADAPTER, masked_layers
from lorapar.adapter.merging import merged_weight
from lorapar.errors import InputError
from lorapar.exporting import gguf as exporting
from lorapar.exporting.gguf import FILES, Checkpoint, check_gguf, export_gguf, files_of
from lorapar.exporting.gguf_adapter import Factors, fold_twins, write_adapter
from lorapar.exporting.gguf_model import as_laid_out, tensor_names
from lorapar.exporting.gguf_tokenizer import add_tokenizer, say_other_tokens
from lorapar.files import sha256_file
from tests.lorapar import ggufs
from tests.lorapar.driver import lorapar, recipe_values, refused, succeeds, tree, write_recipe
from tests.tiny import tiny_tokenizer

ALL = ["adapter", "f16", "q8_0", "base"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ggufs.save(tmp_path_factory.mktemp("gguf") / "tiny")


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    return {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        for one in gguf.GGUFReader(path).tensors
    }


# Folding


def twin(rank, rows, columns, seed=0):
    """A and B of a twin start, [2r, columns] and [rows, 2r]."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * 0.01 for shape in ((rank, columns), (rows, rank)))
    return torch.cat([a, a]), torch.cat([b, -b], dim=1)


def product(a, b):
    return b.double() @ a.double()


def test_folding_drops_and_joins_slices_and_keeps_the_product_to_the_bit():
    a, b = twin(4, 24, 40)
    # A power of two times what was there, and steps on the same grid: differences are exact.
    a[1], b[:, 2] = a[1] * 2, b[:, 2] * 1.5
    folded = fold_twins(a, b, 4)
    assert [list(one.shape) for one in folded] == [[2, 40], [24, 2]]
    assert torch.equal(folded[0][1], a[2])
    assert torch.equal(folded[1][:, 0], b[:, 1])
    # One slice is the difference of two, exactly; sums of products in another order are not.
    torch.testing.assert_close(product(*folded), product(a, b), rtol=0, atol=1e-17)
    a[3, 0] += 1
    b[0, 3] += 1
    assert fold_twins(a, b, 4)[0].shape[0] == 4


def test_a_difference_that_is_no_number_of_fp32_is_not_folded():
    a, b = twin(2, 24, 40)
    b[:, 0] += 0.1 * torch.randn(24)
    kept = fold_twins(a, b, 2)
    differs = b[:, 0].double() + b[:, 2].double()
    assert not torch.equal(differs.float().double(), differs)
    assert [kept[0].shape[0], kept[1].shape[1]] == [2, 2]
    assert torch.equal(product(*kept), b[:, [0, 2]].double() @ a[[0, 2]].double())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("by", ["rank", "element"])
def test_folding_is_exact_on_random_partitions(by, seed):
    """Trained elements of A and of B are drawn, by slice or alone; moves small and large, fp32 and on bf16's grid."""
    generator = torch.Generator().manual_seed(seed)
    rank = 6
    a, b = twin(rank, 16, 32, seed)
    if seed % 2:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    for factor, axis in ((a, 0), (b, 1)):
        part = factor.narrow(axis, 0, rank)
        shape = [rank if i == axis else 1 for i in range(2)] if by == "rank" else list(part.shape)
        active = torch.rand(shape, generator=generator) < 0.4
        step = torch.randn(part.shape, generator=generator) * 10.0 ** -(seed % 5)
        new = part + active * step
        part.copy_(torch.where(active, new.bfloat16().float() if seed % 2 else new, part))
    folded_a, folded_b = fold_twins(a, b, rank)
    assert folded_a.shape[0] == folded_b.shape[1] <= 2 * rank
    scale = float(b.double().abs().max() * a.double().abs().max())
    torch.testing.assert_close(product(folded_a, folded_b), product(a, b), rtol=0, atol=1e-14 * scale)
    still = sum(bool((a[i] == a[rank + i]).all() and (b[:, i] == -b[:, rank + i]).all()) for i in range(rank))
    assert folded_a.shape[0] <= 2 * (rank - still)
    if by == "rank" and seed % 2:
        assert folded_a.shape[0] < 2 * rank


def test_a_start_without_a_twin_is_written_as_it_is():
    a, b = torch.randn(3, 8), torch.randn(5, 3)
    assert all(map(torch.equal, fold_twins(a, b, 3), (a, b)))


def test_ranks_and_scalings_that_differ_are_multiplied_into_b(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    names = [f"model.layers.0.mlp.{one}_proj.weight" for one in ("gate", "up")]
    layers = {
        names[0]: Factors(torch.randn(3, 64), torch.randn(96, 3), 0.5, 3),
        names[1]: Factors(torch.randn(5, 64), torch.randn(96, 5), 2.0, 5),
    }
    assert write_adapter(tmp_path / "a.gguf", config, layers, "x") == "rank 3 to 5 of the 5 that training holds"
    found, alpha = tensors(tmp_path / "a.gguf"), fields(tmp_path / "a.gguf")["adapter.lora.alpha"]
    for at, called in tensor_names(config, names).items():
        a, b = found[f"{called}.lora_a"], found[f"{called}.lora_b"]
        delta = alpha / a.shape[0] * product(a, b)
        torch.testing.assert_close(delta, layers[at].scaling * product(layers[at].a, layers[at].b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_the_adapter_s_file_holds_the_deltas(folder, tmp_path, keys):
    model = ggufs.moved(folder, **keys)
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ["adapter"])
    path = tmp_path / "gguf" / "adapter.gguf"
    assert [item.name for item in path.parent.iterdir()] == ["adapter.gguf"]
    found, said = tensors(path), fields(path)
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    config = model.get_base_model().config
    layers = masked_layers(model)
    assert len(found) == 2 * len(layers) == 28
    for name, layer in layers.items():
        a, b, scaling = layer.factors(ADAPTER)
        at = name.removeprefix("base_model.model.") + ".weight"
        called = tensor_names(config, [at])[at]
        got_a, got_b = found[f"{called}.lora_a"], found[f"{called}.lora_b"]
        # The slice that has not moved is gone. Most other differences are no numbers of fp32.
        assert 3 <= got_a.shape[0] <= 6
        wanted = as_laid_out(config, at, scaling * product(a.detach(), b.detach()))
        got = said["adapter.lora.alpha"] / got_a.shape[0] * product(got_a, got_b)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)


# The whole model


def merged_in(layer, weight):
    """base + delta in fp32, by the folded factors: a layer that has not moved is the base's to the bit."""
    a, b, scaling = layer.factors(ADAPTER)
    summed = merged_weight(weight, *fold_twins(a.detach(), b.detach(), layer.trainable_rank), scaling)
    whole = weight.double() + scaling * product(a.detach(), b.detach())
    torch.testing.assert_close(summed.double(), whole, rtol=1e-6, atol=1e-6)
    return summed


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits.float()


@pytest.mark.parametrize("architecture", ggufs.CONFIGS)
def test_transformers_reads_the_base_back_with_its_logits(architecture, tmp_path):
    """transformers undoes what llama.cpp's converter does. It reads no biases, factors of frequencies, odd heads."""
    folder = ggufs.save(tmp_path / "model", architecture)
    model = ggufs.moved(folder)
    export_gguf(model, AutoTokenizer.from_pretrained(folder), tmp_path, ["base", "f16"])
    files = tmp_path / "gguf"
    read = fields(files / "base-f16.gguf")
    config = model.get_base_model().config
    assert read["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert len(read["tokenizer.ggml.tokens"]) == config.vocab_size
    base, merged = tensors(files / "base-f16.gguf"), tensors(files / "model-f16.gguf")
    weights = Checkpoint(str(folder))
    names = tensor_names(config, list(weights.shapes))
    assert set(base) - {"rope_freqs.weight"} == set(merged) - {"rope_freqs.weight"} == set(names.values())
    assert ("rope_freqs.weight" in base) == (architecture == "llama 3")
    layers = {name.removeprefix("base_model.model."): layer for name, layer in masked_layers(model).items()}
    for at, called in names.items():
        wanted = as_laid_out(config, at, weights.read(at))
        assert torch.equal(base[called], wanted if wanted.ndim == 1 else wanted.half().float()), at
        layer = layers.get(at.removesuffix(".weight"))
        if layer is not None:
            # Summed in fp32 and rounded once.
            summed = as_laid_out(config, at, merged_in(layer, weights.read(at)))
            assert torch.equal(merged[called], summed.half().float()), at
    if architecture in ("llama", "mistral", "qwen2"):
        back = AutoModelForCausalLM.from_pretrained(files, gguf_file="base-f16.gguf", dtype=torch.float32)
        tokens = torch.randint(ggufs.SIZE, (2, 30))
        with model.disable_adapter():
            torch.testing.assert_close(logits(back, tokens), logits(model, tokens), rtol=0, atol=0.05)


def test_q8_0_is_the_sum_quantised_once(folder, tmp_path):
    model = ggufs.moved(folder)
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ["q8_0"])
    path = tmp_path / "gguf" / "model-q8_0.gguf"
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert {kind for name, kind in kinds.items() if name.endswith("norm.weight")} == {"F32"}
    assert {kind for name, kind in kinds.items() if not name.endswith("norm.weight")} == {"Q8_0"}
    at = "model.layers.1.mlp.down_proj"
    layer = masked_layers(model)[f"base_model.model.{at}"]
    summed = merged_in(layer, Checkpoint(str(folder)).read(f"{at}.weight")).numpy()
    form = gguf.GGMLQuantizationType.Q8_0
    wanted = gguf.quants.dequantize(gguf.quants.quantize(summed, form), form)
    assert np.array_equal(tensors(path)["blk.1.ffn_down.weight"].numpy(), wanted)


def test_a_base_held_in_4_bits_is_merged_in_its_original_weights(folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = ggufs.moved(folder)
    plain = {one: exporting.FILES[one] for one in ("f16",)}
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path / "plain", list(plain))
    from lorapar.adapter.attach import load_adapter, save_adapter
    from lorapar.model.load import load_model
    from lorapar.recipe.sections import ModelConfig

    save_adapter(model, tmp_path / "adapter")
    held = load_adapter(load_model(ModelConfig(name=str(folder), dtype="float32"), "nf4"), tmp_path / "adapter")
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in held.modules())
    export_gguf(held, ggufs.tokenizer_of("gpt-2"), tmp_path / "nf4", ["f16"])
    one, other = (tensors(tmp_path / form / "gguf" / "model-f16.gguf") for form in ("plain", "nf4"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_weights_are_read_and_written_one_at_a_time(folder, tmp_path, monkeypatch):
    """Each tensor is on the disk before the next is read: a model need not fit into memory twice."""
    order, read, write = [], Checkpoint.read, gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: order.append("read") or read(self, name))
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda *args, **keys: order.append("write") or write(*args, **keys)
    )
    export_gguf(ggufs.moved(folder), ggufs.tokenizer_of("gpt-2"), tmp_path, ["f16"])
    # Those that the adapter adds to are compared with the model's first.
    compared = order.index("write") - 1
    assert compared == 14
    assert order[compared:] == ["read", "write"] * len(Checkpoint(str(folder)).shapes)


def test_numbers_beyond_f16_are_refused_and_nothing_is_left(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(copy)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight holds numbers beyond f16"):
        export_gguf(ggufs.moved(copy), ggufs.tokenizer_of("gpt-2"), tmp_path / "out", ["adapter", "f16"])
    assert list((tmp_path / "out").iterdir()) == []


def on_a_grid(folder, place):
    """A copy of the model whose matrices are numbers of q8_0."""
    model = AutoModelForCausalLM.from_pretrained(shutil.copytree(folder, place))
    form = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), form)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, form)))
    model.save_pretrained(place)
    return place


def test_an_adapter_that_rounding_takes_away_is_refused_or_said(folder, tmp_path, caplog):
    """A change below q8_0's spacing moves the average of weights that lie anywhere, and none that lie on its grid."""
    tokenizer = ggufs.tokenizer_of("gpt-2")
    place = on_a_grid(folder, tmp_path / "model")
    for at, small, large in (("a", 2e-3, 0.0), ("b", 2e-3, 1.0)):
        models = [ggufs.moved(one) for one in (folder, place)]
        for model in models:
            with torch.no_grad():
                for number, layer in enumerate(masked_layers(model).values()):
                    layer.factors(ADAPTER)[1].mul_(large if large and not number else small)
        with caplog.at_level(logging.WARNING, "lorapar"):
            export_gguf(models[0], tokenizer, tmp_path / at / "anywhere", ["q8_0"])
            assert not caplog.records
            if large:
                export_gguf(models[1], tokenizer, tmp_path / at, ["q8_0"])
                assert "takes most of the adapter's change from 13 of 14 layers" in caplog.text
            else:
                with pytest.raises(InputError, match="q8_0 is too coarse to merge into"):
                    export_gguf(models[1], tokenizer, tmp_path / at, ["q8_0"])
                assert not (tmp_path / at / "gguf").exists()


def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_line(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no safetensors"):
        Checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(InputError, match="holds quantised weights alone"):
        Checkpoint(str(tmp_path))
    with pytest.raises(InputError, match=r"the checkpoint's model\.layers\.0\.x\.weight has no place"):
        tensor_names(AutoConfig.from_pretrained(folder), ["model.layers.0.x.weight"])


@pytest.fixture(scope="module")
def clean(folder, tmp_path_factory):
    """The tensors of f16 and base of the model as it is saved."""
    place = tmp_path_factory.mktemp("clean")
    export_gguf(ggufs.moved(folder), ggufs.tokenizer_of("gpt-2"), place, ["f16", "base"])
    return {form: tensors(place / "gguf" / FILES[form]) for form in ("f16", "base")}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("stray", ["model_backup.safetensors", "consolidated.safetensors", "a.safetensors"])
def test_other_weights_beside_the_model_s_are_not_read(folder, clean, tmp_path, shards, stray):
    """A copy of earlier weights; Mistral's own repositories hold the same weights under other names."""
    place = shutil.copytree(folder, tmp_path / "model")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(place / "model.safetensors").items()}
    if shards:
        (place / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(place, max_shard_size="100KB")
        assert len(list(place.glob("model-*.safetensors"))) > 2
    other = {"layers.0.wq.weight": torch.zeros(2, 2)} if stray.startswith("consolidated") else zeros
    save_file(other, place / stray, metadata={"format": "pt"})
    export_gguf(ggufs.moved(place), ggufs.tokenizer_of("gpt-2"), tmp_path, ["f16", "base"])
    for form, wanted in clean.items():
        got = tensors(tmp_path / "gguf" / FILES[form])
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_a_checkpoint_that_has_changed_since_it_was_loaded_is_refused(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "model")
    model = ggufs.moved(place)
    tensors = load_file(place / "model.safetensors")
    at = "model.layers.1.mlp.up_proj.weight"
    tensors[at] = tensors[at].clone()
    tensors[at][3, 4] += 1e-3
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(at)} in .* is not what the adapter was trained on"):
        export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ["base"])
    assert not (tmp_path / "gguf").exists()
    # The adapter alone is made of nothing else.
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ["adapter"])


def test_a_disk_without_room_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    model, usage = ggufs.moved(folder), shutil.disk_usage(tmp_path)
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path / "out", ALL)
    weights = sum(one.n_bytes for form in ALL for one in gguf.GGUFReader(tmp_path / "out/gguf" / FILES[form]).tensors)
    before = tree(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage._replace(free=weights - 1))
    with pytest.raises(InputError, match=r"adapter, f16, q8_0, base need 1 MB, and the disk of .* has \d MB free"):
        export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path / "out", ALL)
    assert tree(tmp_path) == before


def test_a_window_that_llama_cpp_leaves_out_is_said(caplog):
    from transformers import MistralConfig, Qwen2Config

    with caplog.at_level(logging.WARNING, "lorapar"):
        exporting.say_what_differs(Qwen2Config(sliding_window=64, max_position_embeddings=256))
        assert not caplog.records
        exporting.say_what_differs(MistralConfig(sliding_window=64, max_position_embeddings=256))
    assert "attends to the last 64 tokens" in caplog.text


# Tokenizers


@pytest.mark.parametrize("kind", ggufs.KINDS)
def test_a_tokenizer_is_recognised_by_how_it_splits(kind, tmp_path):
    tokenizer = ggufs.tokenizer_of(kind)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, tokenizer, ggufs.SIZE + 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    said = fields(tmp_path / "t.gguf")
    types = said["tokenizer.ggml.token_type"]
    assert len(said["tokenizer.ggml.tokens"]) == len(types) == ggufs.SIZE + 8
    if kind == "llama":
        assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("llama", "default")
        assert types[:4] == [2, 3, 3, 6]
        assert said["tokenizer.ggml.add_space_prefix"] is True
        assert len(said["tokenizer.ggml.scores"]) == ggufs.SIZE + 8
    else:
        assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", kind)
        assert types[:3] == [3, 3, 3]
        assert types[ggufs.SIZE] == gguf.TokenType.USER_DEFINED  # <think>
        assert len(said["tokenizer.ggml.merges"]) == ggufs.SIZE - 3 - 256
        assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert types[-1] == gguf.TokenType.UNUSED
    assert said["tokenizer.ggml.add_bos_token"] is (kind in ("llama", "llama-bpe"))
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_the_token_that_ends_a_turn_is_named_beside_another_eos(tmp_path):
    tokenizer = ggufs.tokenizer_of("gpt-2")
    tokenizer.eos_token = "<|endoftext|>"
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, tokenizer, ggufs.SIZE + 8)
    keys = writer.kv_data[0]
    assert (keys["tokenizer.ggml.eos_token_id"].value, keys["tokenizer.ggml.eot_token_id"].value) == (0, 2)


def test_tokenizers_that_split_otherwise_are_refused_in_one_line(folder):
    config, tokenizer = AutoConfig.from_pretrained(folder), ggufs.tokenizer_of("gpt-2")
    with pytest.raises(InputError, match="has no merges"):
        check_gguf(config, tiny_tokenizer(), ["adapter"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"splits text as none of gpt-2, smollm, .* of llama\.cpp does"):
        check_gguf(config, tokenizer, ["adapter"])
    tokenizer = ggufs.tokenizer_of("llama")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="unlike SentencePiece"):
        check_gguf(config, tokenizer, ["adapter"])


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_before_text_is_told_so_that_prompts_keep_their_tokens(scheme, tmp_path, caplog):
    """The end-to-end tests hold what is expected of llama.cpp here against llama.cpp."""
    for chat, asked, told, same in (
        (None, True, True, True), ("mistral", True, scheme == "always", True), ("mistral", False, True, True),
        ("zephyr", True, True, scheme == "always"), ("words", True, True, True),
    ):  # fmt: skip
        tokenizer = ggufs.metaspace(scheme, chat)
        writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lorapar"):
            add_tokenizer(writer, tokenizer, ggufs.SIZE + 8, asked)
            say_other_tokens(tokenizer, asked)
        found = writer.kv_data[0]["tokenizer.ggml.add_space_prefix"].value, not caplog.records
        assert (chat, *found) == (chat, told, same)
    caplog.clear()
    for kind in ggufs.KINDS:
        say_other_tokens(ggufs.tokenizer_of(kind), True)
    assert not caplog.records


def test_added_tokens_that_llama_cpp_finds_elsewhere_are_said(caplog):
    odd = [AddedToken("<mask>", lstrip=True, special=True), AddedToken("<fn>", rstrip=True),
           AddedToken("word", single_word=True), AddedToken("<plain>", normalized=False)]  # fmt: skip
    for kind, wanted in (("qwen2", "<mask>, <fn>, word "), ("llama", "<mask>, <fn>, word ")):
        tokenizer = ggufs.tokenizer_of(kind)
        tokenizer.add_tokens(odd)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lorapar"):
            say_other_tokens(tokenizer, True)
        assert wanted in caplog.text
    # Looked for in text with ▁ before it.
    tokenizer = ggufs.tokenizer_of("llama")
    tokenizer.add_tokens([AddedToken("<new>", normalized=True)])
    with caplog.at_level(logging.WARNING, "lorapar"):
        say_other_tokens(tokenizer, True)
    assert "takes <new> wherever" in caplog.text


# The stage


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """(recipe, output folder) of a run of the tiny model whose tokenizer llama.cpp has, without GGUF."""
    place = tmp_path_factory.mktemp("run")
    recipe = write_recipe(place / "recipe.yaml", recipe_values(folder) | {"output_dir": str(place / "out")})
    succeeds("run", recipe)
    return recipe, place / "out"


def test_export_writes_every_form_and_does_it_again_where_a_file_is_cut_short(whole_run, tmp_path):
    recipe, made = whole_run
    out = shutil.copytree(made, tmp_path / "out")
    before = tree(out, "stages.json", "recipe.yaml")
    words = ("export", recipe, "--output_dir", out, "--gguf", ",".join(ALL))
    said = succeeds(*words)
    assert "export: gguf: the adapter has rank" in said
    names = sorted(path.name for path in (out / "gguf").iterdir())
    assert names == sorted([*FILES.values(), "Modelfile", "Modelfile.adapter", "lorapar.json"])
    assert set(files_of(ALL)) == set(names) - {"Modelfile.adapter", "lorapar.json"}
    assert not list(out.rglob("*.tmp"))
    after = tree(out, "stages.json", "recipe.yaml")
    assert {name for name in after if name not in before} == {f"gguf/{name}" for name in names}
    assert "export: done before, skipped" in succeeds(*words)
    path = out / "gguf" / "model-f16.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "export: done before" not in succeeds(*words)
    assert path.read_bytes() == whole
    # What was trained, and not the base.
    assert whole != (out / "gguf" / "base-f16.gguf").read_bytes()


def test_a_form_that_is_not_known_and_a_model_that_is_not_converted_are_refused_before_any_work(
    whole_run, tiny_folder, tmp_path
):
    recipe, _ = whole_run
    refused("run", recipe, "--output_dir", tmp_path / "a", "--gguf", "q4_0", says=("export.gguf", "q4_0", "q8_0"))
    neox = tmp_path / "neox"
    AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=520, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).save_pretrained(neox)
    ggufs.tokenizer_of("gpt-2").save_pretrained(neox)
    other = write_recipe(tmp_path / "neox.yaml", recipe_values(neox) | {"export": {"gguf": ["adapter"]}})
    refused("run", other, "--output_dir", tmp_path / "b",
            says=("export.gguf", "GPTNeoXForCausalLM", "LlamaForCausalLM", "convert_hf_to_gguf.py"))  # fmt: skip
    plain = write_recipe(tmp_path / "plain.yaml", recipe_values(tiny_folder))
    refused("run", plain, "--output_dir", tmp_path / "c", "--gguf", "base", says=("the tokenizer", "merges"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neox", "neox.yaml", "plain.yaml"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic is not"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0,
                              "original_max_position_embeddings": 128}}, "with beta_fast 16.0 is not"),
        ({"hidden_act": "gelu"}, "with hidden_act gelu is not"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "with partial_rotary_factor 0.5 is not"),
    ],
)  # fmt: skip
def test_what_llama_cpp_is_not_told_here_is_refused(folder, tmp_path, change, says):
    values = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=says):
        check_gguf(AutoConfig.from_pretrained(tmp_path), ggufs.tokenizer_of("gpt-2"), ["adapter"])


def test_a_qwen3_with_biases_is_refused():
    """llama.cpp has no such tensors, and does not load the file."""
    config = Qwen3Config(**ggufs.SMALL, head_dim=32, architectures=["Qwen3ForCausalLM"])
    check_gguf(config, ggufs.tokenizer_of("gpt-2"), ["adapter"])
    config.attention_bias = True
    with pytest.raises(InputError, match="a Qwen3 with attention_bias true"):
        check_gguf(config, ggufs.tokenizer_of("gpt-2"), ["adapter"])


def test_a_base_of_which_there_are_4_bits_alone_gives_the_adapter_alone(folder):
    config, tokenizer = AutoConfig.from_pretrained(folder), ggufs.tokenizer_of("gpt-2")
    config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    check_gguf(config, tokenizer, ["adapter"])
    with pytest.raises(InputError, match=r"got base, f16, but the model holds its weights as nf4 alone"):
        check_gguf(config, tokenizer, ["f16", "adapter", "base"])


def test_a_layer_that_has_not_moved_is_the_base_s_to_the_bit(folder, tmp_path):
    model = ggufs.moved(folder)
    still = masked_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        a, b, _ = still.factors(ADAPTER)
        a[:4], b[:, :4] = a[4:], -b[:, 4:]
    export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ALL)
    base, merged = (tensors(tmp_path / "gguf" / FILES[form]) for form in ("base", "f16"))
    assert {name for name in base if torch.equal(base[name], merged[name])} == {
        "blk.0.attn_q.weight", "token_embd.weight", "output.weight", *(name for name in base if "norm" in name)
    }  # fmt: skip
    assert not any("blk.0.attn_q" in name for name in tensors(tmp_path / "gguf" / "adapter.gguf"))


def test_an_adapter_as_it_started_is_nothing_to_write(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = attach(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), start="twin")
    with pytest.raises(InputError, match="as it started"):
        export_gguf(model, ggufs.tokenizer_of("gpt-2"), tmp_path, ["adapter"])
    assert not (tmp_path / "gguf").exists()


def test_without_gguf_a_finished_run_stays_finished(whole_run, tmp_path):
    recipe, made = whole_run
    out = shutil.copytree(made, tmp_path / "out")
    code, _, err = lorapar("export", recipe, "--output_dir", out)
    assert code == 0
    assert "export: done before, skipped" in err
    assert not (out / "gguf").exists()


@pytest.mark.slow
def test_what_was_made_of_an_earlier_adapter_is_said(whole_run, tmp_path):
    """gguf/ and merged/ of another adapter stay, and are named; those of the same one are not."""
    recipe, made = whole_run
    out = shutil.copytree(made, tmp_path / "out")
    words = ("export", recipe, "--output_dir", out)
    succeeds(*words, "--gguf", "adapter", "--export.merged", "true", "--update")
    digest = sha256_file(out / "adapter" / "adapter_model.safetensors")
    for name in ("gguf", "merged"):
        assert json.loads((out / name / "lorapar.json").read_text()) == {"adapter_sha256": digest}
    assert "was not made of this adapter" not in succeeds(*words, "--update")
    said = succeeds("run", recipe, "--output_dir", out, "--update", "--sft.max_steps", "3")
    assert sha256_file(out / "adapter" / "adapter_model.safetensors") != digest
    for name in ("gguf", "merged"):
        assert f"export: {name}/ was not made of this adapter" in said
    again = succeeds("export", recipe, "--output_dir", out, "--update", "--sft.max_steps", "3", "--gguf", "q8_0")
    assert "export: gguf/ was" not in again
    assert "export: merged/ was not made of this adapter" in again
    assert "export: gguf: adapter.gguf of an earlier export removed" in again
    assert sorted(path.name for path in (out / "gguf").iterdir()) == ["Modelfile", "lorapar.json", "model-q8_0.gguf"]


def test_without_room_for_gguf_the_adapter_is_left_as_it_is(whole_run, tmp_path, monkeypatch):
    recipe, made = whole_run
    out = shutil.copytree(made, tmp_path / "out")
    usage, before = shutil.disk_usage(out), (out / "adapter" / "lorapar.json").stat().st_mtime_ns
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused("export", recipe, "--output_dir", out, "--gguf", "f16", says=("export.gguf", "free some space"))
    assert (out / "adapter" / "lorapar.json").stat().st_mtime_ns == before
    assert not (out / "gguf").exists()
