"""Exported GGUF files in llama.cpp itself: its logits beside ours, and its tokens beside our tokenizer's.

llama.cpp runs in a process of its own (llama_worker.py). Where `llama_cpp` is not installed it is built once, from its
source in the package llama-cpp-python, into the cache folder: about three minutes on two cores. Without a C++ compiler
or the package index the tests are skipped; in CI they fail.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapar.adapter.layers import ADAPTER, masked_layers
from lorapar.adapter.merging import merged_weight
from lorapar.exporting.gguf import Checkpoint, export_gguf, write_model
from lorapar.exporting.gguf_adapter import Factors
from lorapar.exporting.gguf_tokenizer import _encoded_by_llama_cpp, _parts, _prompts, _space_prefix
from lorapar.model.load import load_tokenizer
from lorapar.model.locate import ALIAS, _brought_alias, _download_alias, cache_folder, resolve
from lorapar.recipe.sections import ModelConfig
from tests.lorapar import ggufs

PACKAGE = "llama-cpp-python==0.3.36"
# llama.cpp's library alone, without its programs.
CMAKE = " ".join(
    f"-D{option}=OFF" for option in ("LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS",
                                     "LLAMA_BUILD_SERVER", "LLAMA_CURL")
)  # fmt: skip
WORKER = Path(__file__).with_name("llama_worker.py")
TEXTS = [
    "Hello world", "  3 spaces 12345 and\n\n\ttabs 3.14, I'm don't", "<|im_start|>user\nHi<|im_end|>\n", "a  1",
    "naïve café 🚀 한국어 ไทย  12", " x\r\n y ", "DON'T won'T they'LL", "f(x) = x**2 + 10_000;", "<think>so</think>",
    "license agreement, copyright 2004", "\n\n\n", "a", "…—“quotes”¡", "1234567890 12 1 000",
]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def unavailable(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"llama.cpp could not be built: {why}")
    pytest.skip(f"llama.cpp could not be built: {why}")


@pytest.fixture(scope="session")
def llama() -> list[str]:
    """What the worker adds to its path: nothing where llama_cpp is installed, else the folder that it was built in."""
    if importlib.util.find_spec("llama_cpp"):
        return []
    folder = cache_folder() / "tests" / PACKAGE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            if shutil.which("c++") is None:
                unavailable("there is no C++ compiler (c++)")
            parts = folder.with_name(f"{folder.name}.parts")
            shutil.rmtree(parts, ignore_errors=True)
            built = subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--target", parts, PACKAGE],
                env={**os.environ, "CMAKE_ARGS": CMAKE}, capture_output=True, text=True,
            )  # fmt: skip
            if built.returncode:
                unavailable(built.stderr[-2000:])
            parts.rename(folder)
    return [str(folder)]


def in_llama_cpp(llama: list[str], folder: Path, jobs: list[dict]) -> list:
    """What llama_worker.py finds for each job: logits [tokens, vocabulary], or a list of each text's tokens."""
    for number, job in enumerate(jobs):
        job |= {"out": str(folder / f"{number}.{'json' if 'texts' in job else 'npy'}"), "model": str(job["model"])}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, WORKER, folder / "jobs.json", *llama], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        json.loads(Path(job["out"]).read_text()) if "texts" in job else torch.from_numpy(np.load(job["out"]))
        for job in jobs
    ]


@torch.no_grad()
def logits(model, ids: list[list[int]]) -> torch.Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([one])).logits[0].float() for one in ids])


def off(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The root mean square of the difference, in standard deviations of the logits."""
    return float((theirs - ours).square().mean().sqrt() / ours.std())


def agreement(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The share of tokens after which both expect the same one."""
    return float((theirs.argmax(1) == ours.argmax(1)).float().mean())


def figures(what: str, theirs: torch.Tensor, ours: torch.Tensor) -> str:
    rms, most = off(theirs, ours), float((theirs - ours).abs().max() / ours.std())
    return f"{what}: rms {rms:.2e}, largest {most:.2e} standard deviations, argmax {agreement(theirs, ours):.1%}"


def quantised(tensor: torch.Tensor, form: str) -> torch.Tensor:
    if form == "f16":
        return tensor.half().float()
    kind, array = gguf.GGMLQuantizationType.Q8_0, tensor.contiguous().numpy()
    packed = gguf.quants.quantize(array, kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(array.shape).copy())


def _product(weight, bias, delta, form, x):
    y = functional.linear(quantised(x, form), weight, bias)
    if delta is None:
        return y
    return y + delta.scaling * functional.linear(functional.linear(x, delta.a), delta.b)


def quantised_model(folder: Path | str, form: str, deltas: dict[str, Factors], merged: bool) -> nn.Module:
    """The model as llama.cpp computes with it: weights rounded to `form`, and so is what each product is given.

    The adapter's own product, where it is not merged in, is in fp32.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight, delta = layer.weight.detach(), deltas.get(f"{name}.weight")
        if delta is not None and merged:
            weight, delta = merged_weight(weight, delta.a, delta.b, delta.scaling), None

        layer.forward = functools.partial(_product, quantised(weight, form), layer.bias, delta, form)
    embedding = model.get_input_embeddings().weight
    embedding.data = quantised(embedding.data, form)
    return model


def factors_of(model) -> dict[str, Factors]:
    found = {}
    for name, layer in masked_layers(model).items():
        a, b, scaling = layer.factors(ADAPTER)
        factors = Factors(a.detach().clone(), b.detach().clone(), scaling, layer.trainable_rank)
        found[f"{name.removeprefix('base_model.model.')}.weight"] = factors
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of every form of SmolLM2 and an adapter that has moved, the model, its tokenizer)"""
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = load_tokenizer(ModelConfig(name=ALIAS))
    model = ggufs.moved(resolve(ALIAS))
    export_gguf(model, tokenizer, folder, ["adapter", "f16", "q8_0", "base"])
    # No form that a recipe can ask for; what is left between it and ours is the order of sums.
    weights, config = Checkpoint(str(resolve(ALIAS))), model.get_base_model().config
    write_model(folder / "gguf" / "base-f32.gguf", config, tokenizer, weights, {}, "f32", "base")
    return folder / "gguf", model, tokenizer


def test_smollm2_s_logits_are_llama_cpp_s(exported, llama, tmp_path):
    folder, model, tokenizer = exported
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], add_generation_prompt=True)
    ids = [
        tokenizer.encode("The 12 quick brown foxes jumped over 345 lazy dogs, didn't they?"),
        list(chat["input_ids"]),
    ]
    adapter = {"lora": str(folder / "adapter.gguf")}
    jobs = [
        {"model": folder / "base-f32.gguf"}, {"model": folder / "base-f32.gguf", **adapter},
        {"model": folder / "base-f16.gguf"}, {"model": folder / "base-f16.gguf", **adapter},
        {"model": folder / "model-f16.gguf"}, {"model": folder / "model-q8_0.gguf"},
    ]  # fmt: skip
    found = in_llama_cpp(llama, tmp_path, [{**job, "ids": ids} for job in jobs])
    ours = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    effect = off(base, ours)
    print(f"what the adapter does to the base: rms {effect:.2e} standard deviations")
    assert effect > 0.1
    # In fp32 they are the same function.
    for what, theirs, wanted in (("base", found[0], base), ("base and adapter", found[1], ours)):
        print(figures(f"f32, {what}", theirs, wanted))
        assert (theirs - wanted).abs().max() / wanted.std() < 1e-4
    # In f16 and q8_0 llama.cpp rounds what each product is given, and a difference in the last bit moves roundings in
    # every layer after it: two such computations agree no more closely than each does with the exact one.
    deltas = factors_of(model)
    for what, form, merged, theirs, wanted in (
        ("base", "f16", False, found[2], base), ("base and adapter", "f16", False, found[3], ours),
        ("merged", "f16", True, found[4], ours), ("merged", "q8_0", True, found[5], ours),
    ):  # fmt: skip
        rounding = quantised_model(resolve(ALIAS), form, {} if what == "base" else deltas, merged)
        explained = off(logits(rounding, ids), wanted)
        print(figures(f"{form}, {what}", theirs, wanted), f"(that rounding, computed here: rms {explained:.2e})")
        assert off(theirs, wanted) < 2 * explained < (0.01 if form == "f16" else 0.3)
        assert agreement(theirs, wanted) > 0.85
        other = ours if what == "base" else base
        assert off(theirs, wanted) < 0.5 * off(theirs, other)


def test_llama_cpp_tokenises_as_smollm2_s_tokenizer_does(exported, llama, tmp_path):
    folder, _, tokenizer = exported
    (tokens,) = in_llama_cpp(llama, tmp_path, [{"model": folder / "base-f16.gguf", "texts": TEXTS}])
    assert tokens == [tokenizer.encode(text) for text in TEXTS]


def test_smollm2_s_keys_are_those_of_llama_cpp_s_converter(exported, tmp_path):
    """The alias's own file was made by it: ours has its keys, but for those of a card, and its tensors."""
    file = _brought_alias() or _download_alias(tmp_path)
    theirs, ours = gguf.GGUFReader(file), gguf.GGUFReader(exported[0] / "base-f16.gguf")
    values = [{name: field.contents() for name, field in reader.fields.items()} for reader in (theirs, ours)]
    card = {f"general.{name}" for name in ("name", "organization", "finetune", "basename", "size_label", "license",
                                           "languages")}  # fmt: skip
    differ = {name for name in values[0] | values[1] if values[0].get(name) != values[1].get(name)}
    # transformers reads the file's tokenizer without its splitting of digits ("smollm"), so the model has been trained
    # with "gpt-2", and that is what ours says.
    assert differ - card == {"GGUF.kv_count", "general.file_type", "tokenizer.ggml.pre"}
    assert [values[i]["tokenizer.ggml.pre"] for i in range(2)] == ["smollm", "gpt-2"]
    shapes = [{one.name: one.shape.tolist() for one in reader.tensors} for reader in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("architecture", ggufs.CONFIGS)
def test_every_architecture_is_the_same_function_in_llama_cpp(architecture, llama, tmp_path):
    folder = ggufs.save(tmp_path / "model", architecture)
    model, tokenizer = ggufs.moved(folder, use_rslora=True), AutoTokenizer.from_pretrained(folder)
    export_gguf(model, tokenizer, tmp_path, ["adapter"])
    weights, config, deltas = Checkpoint(str(folder)), model.get_base_model().config, factors_of(model)
    for name, added in (("base", {}), ("merged", deltas)):
        write_model(tmp_path / f"{name}.gguf", config, tokenizer, weights, added, "f32", name)
    # Far enough for Llama 3's low frequencies to differ.
    ids = [torch.randint(ggufs.SIZE, (200,)).tolist()]
    adapter = {"lora": str(tmp_path / "gguf" / "adapter.gguf")}
    jobs = [{"model": tmp_path / "base.gguf"}, {"model": tmp_path / "base.gguf", **adapter},
            {"model": tmp_path / "merged.gguf"}]  # fmt: skip
    found = in_llama_cpp(llama, tmp_path, [{**job, "ids": ids} for job in jobs])
    ours = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    assert off(base, ours) > 0.05
    for what, theirs, wanted in zip(("base", "base and adapter", "merged"), found, (base, ours, ours)):
        print(figures(f"{architecture}, {what}", theirs, wanted))
        assert (theirs - wanted).abs().max() / wanted.std() < 1e-4


@pytest.mark.parametrize("kind", ggufs.KINDS)
def test_llama_cpp_tokenises_as_each_kind_of_tokenizer_does(kind, llama, tmp_path):
    folder = ggufs.save(tmp_path / "model", "llama", kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    write_model(tmp_path / "base.gguf", config, tokenizer, Checkpoint(str(folder)), {}, "f16", "base")
    (tokens,) = in_llama_cpp(llama, tmp_path, [{"model": tmp_path / "base.gguf", "texts": TEXTS}])
    assert tokens == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_llama_cpp_tokenises_a_prompt_as_we_expect_of_it(scheme, llama, tmp_path):
    """SentencePiece tokenizers as transformers 5 makes them: where prompts are other tokens than in training, we know.

    llama.cpp knows a space before every text between special tokens, or before none.
    """
    folder, jobs, wanted = ggufs.save(tmp_path / "model"), [], []
    config = AutoModelForCausalLM.from_pretrained(folder).config
    for number, (chat, asked) in enumerate([(None, True), ("mistral", False), *((one, True) for one in ggufs.CHATS)]):
        tokenizer = ggufs.metaspace(scheme, chat)
        path, parts = tmp_path / f"{number}.gguf", _parts(tokenizer)
        write_model(path, config, tokenizer, Checkpoint(str(folder)), {}, "f16", "base", asked)
        prompts = _prompts(tokenizer, asked)
        told, same = _space_prefix(tokenizer, parts, asked)
        expected = _encoded_by_llama_cpp(parts, prompts, told)
        assert (expected == [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]) == same
        jobs.append({"model": path, "texts": prompts})
        # llama.cpp puts its BOS before all that.
        wanted.append([[tokenizer.bos_token_id, *ids] for ids in expected])
    assert in_llama_cpp(llama, tmp_path, jobs) == wanted
