"""What export says of serving an adapter by vLLM, which is not needed for it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lorapar
from lorapar.adapter.attach import save_adapter
from lorapar.exporting.serving import MAX_RANKS, check_vllm
from tests.architectures import ARCHITECTURES, make

from .driver import records


def exported(name: str, folder: Path, start: Any = "twin", **keys: Any) -> Any:
    """The base of a tiny model whose adapter is in `folder`."""
    model = lorapar.attach(make(name), LoraConfig(**{"r": 4, "lora_alpha": 8} | keys), start=start)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder, stage="final")
    return model.get_base_model()


def changed(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def with_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "looped"])
def test_what_is_adapted_by_default_is_served(name: str, tmp_path: Path):
    base = exported(name, tmp_path)
    found = check_vllm(tmp_path, base)
    assert found["problems"] == []
    assert (found["served"], found["rank"], found["max_lora_rank"]) == (True, 8, 8)
    assert found["architecture"] == type(base).__name__


def test_an_architecture_that_is_not_known_is_said_to_be_so(tmp_path: Path, caplog):
    base = exported("looped", tmp_path)
    with caplog.at_level(logging.INFO, "lorapar"):
        found = check_vllm(tmp_path, base)
    assert (found["served"], found["problems"]) == (None, [])
    assert "whether vLLM serves adapters of LoopedForCausalLM is not known here" in caplog.text


@pytest.mark.parametrize(("rank", "start", "needed"), [(8, "paper", 8), (8, "twin", 16), (9, "twin", 32),
                                                       (33, "paper", 64), (140, "twin", 320), (256, "twin", 512),
                                                       (257, "twin", None)])  # fmt: skip
def test_the_maximal_rank_is_one_that_vllm_takes(rank, start, needed, tmp_path: Path):
    found = check_vllm(tmp_path, exported("llama", tmp_path, start, r=rank))
    assert found["rank"] == (2 * rank if start == "twin" else rank)
    assert found["max_lora_rank"] == needed
    assert needed in (None, *MAX_RANKS)
    assert found["served"] is (needed is not None)
    assert needed is not None or "above 512" in found["problems"][0]


def test_ranks_that_differ_by_layer_count_by_the_largest(tmp_path: Path):
    base = exported("llama", tmp_path)
    with_tensors(tmp_path, wide)
    found = check_vllm(tmp_path, base)
    assert (found["rank"], found["max_lora_rank"], found["served"]) == (24, 32, True)


def test_the_command_is_in_the_log(tmp_path: Path, caplog):
    base = exported("llama", tmp_path)
    changed(tmp_path, base_model_name_or_path="owner/model", revision="v2")
    with caplog.at_level(logging.INFO, "lorapar"):
        check_vllm(tmp_path, base)
    command = f"vllm serve owner/model --revision v2 --enable-lora --max-lora-rank 8 --lora-modules adapter={tmp_path}"
    assert caplog.messages[-1] == f"export: vLLM serves it: {command}"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_dora": True}, "it does not know DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "trained biases (bias: all)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa, a start that changes the base"),
    ],
)
def test_configurations_that_vllm_refuses_are_named(tmp_path: Path, caplog, keys, says):
    base = exported("llama", tmp_path)
    changed(tmp_path, **keys)
    with caplog.at_level(logging.WARNING, "lorapar"):
        found = check_vllm(tmp_path, base)
    assert found["served"] is False
    assert says in caplog.text
    assert says in found["problems"][0]
    back = dict.fromkeys(keys) | {"bias": "none", "init_lora_weights": "gaussian", "use_rslora": True}
    changed(tmp_path, **back)
    assert check_vllm(tmp_path, base)["served"] is True


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(258, 64)


def wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(24, 64)
    tensors[f"{LAYER}.lora_B.weight"] = torch.zeros(64, 24)


def half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"] = torch.zeros(63, 8)


def elsewhere(tensors: dict[str, torch.Tensor]) -> None:
    for factor in "AB":
        tensors[f"base_model.model.model.layers.9.self_attn.q_proj.lora_{factor}.weight"] = tensors.pop(
            f"{LAYER}.lora_{factor}.weight"
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (head, "base_model.model.lm_head.weight: no tensor of LoRA"),
        (half, "model.layers.0.self_attn.q_proj: one of lora_A and lora_B is missing"),
        (narrow, "B·A is 63 × 64 of ranks 8 and 8, the layer 64 × 64"),
        (elsewhere, "model.layers.9.self_attn.q_proj: no linear layer of the base"),
    ],
)
def test_tensors_that_vllm_does_not_take_are_named(tmp_path: Path, change, says):
    base = exported("llama", tmp_path)
    with_tensors(tmp_path, change)
    found = check_vllm(tmp_path, base)
    assert found["served"] is False
    assert any(says in problem for problem in found["problems"]), found["problems"]


def test_modules_of_a_tower_are_named(tmp_path: Path):
    """They end in names that the language model's have too, and vLLM leaves them out without a word."""
    both = r".*(vision_tower|language_model).*\.q_proj"
    found = check_vllm(tmp_path, exported("gemma3_multimodal", tmp_path, target_modules=both))
    assert found["served"] is False
    assert "vision_tower" in found["problems"][0]


def test_layers_that_take_no_lora_in_an_architecture_are_named(tmp_path: Path):
    base = exported("llama", tmp_path)
    base.config.architectures = ["Phi3ForCausalLM"]  # which has q, k and v in one layer
    problem = check_vllm(tmp_path, base)["problems"][0]
    assert problem == "gate_proj, k_proj, q_proj, up_proj, v_proj: no linear layer that takes LoRA there"


def test_a_run_s_record_and_log_have_it(finished: Path):
    assert records(finished)["export"]["vllm"] == {
        "architecture": "LlamaForCausalLM", "served": True, "rank": 8, "max_lora_rank": 8, "problems": [],
    }  # fmt: skip
    log = (finished / "run.log").read_text()
    assert "export: vLLM serves it: vllm serve " in log
