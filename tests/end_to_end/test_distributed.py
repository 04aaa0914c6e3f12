"""Two processes on the CPU (gloo) train the SFT stage as one process does at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lorapar
from tests.tiny import TARGETS

RECIPE = {
    "data": {
        "sources": [
            {
                "name": "reasoning_gym:chain_sum",
                "size": 150,
                "config": {"min_terms": n, "max_terms": n, "min_digits": 1, "max_digits": 1},
            }
            for n in (2, 3)
        ],
        "held_out": 10,
    },
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "score": {"examples": 8},
    "stages": ["sft"],
    "sft": {
        "max_steps": 5,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        # Less than a process's batch, so that it goes through in parts and gradients are exchanged after the last.
        "micro_batch_tokens": 100,
    },
}  # fmt: skip


def write_recipe(path: Path, tiny_folder: Path, batch: int) -> Path:
    recipe = {"model": {"name": str(tiny_folder), "dtype": "float32"}, **RECIPE}
    recipe["sft"] = RECIPE["sft"] | {"per_device_train_batch_size": batch}
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in json.loads((folder / "sft" / "log_history.json").read_text()) if "loss" in e]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, tiny_folder):
    outputs = {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        recipe = write_recipe(tmp_path / f"{processes}.yaml", tiny_folder, 8 // processes)
        for verb in ("label", "score", "partition"):
            assert lorapar.run(lorapar.load_recipe(recipe, [("output_dir", str(folder))]), only=verb) == folder
        # Without a GPU accelerate starts several processes only when asked as for several GPUs.
        several = ["--multi_gpu"] if processes > 1 else []
        launch = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
        command = [*launch, "-m", "lorapar", "sft", str(recipe), "--output_dir", str(folder)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[processes] = folder
    one, two = losses(outputs[1]), losses(outputs[2])
    assert len(one) == 5
    assert two == pytest.approx(one, rel=1e-4)
    adapters = [_adapter(folder) for folder in outputs.values()]
    made = lorapar.Partition.load(outputs[2] / "partition.safetensors").active("sft")
    start = _adapter(outputs[2], "start")
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(tensor, adapters[0][name], rtol=1e-3, atol=1e-5)
        mask = made[name.replace(".weight", ".default.weight")]
        assert torch.equal(tensor[~mask], start[name][~mask])
        assert not torch.equal(tensor[mask], start[name][mask]) or not mask.any()
    record = json.loads((outputs[2] / "stages.json").read_text())["sft"]
    assert record["optimizer_state_bytes"] == 8 * record["active"]


def _adapter(folder: Path, stage: str = "sft") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / stage / "adapter_model.safetensors")
