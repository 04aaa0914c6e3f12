"""What a launch may ask for, and what its processes exchange."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from lorapar.distributed import launch, processes
from lorapar.errors import InputError
from lorapar.training.sft import in_so_many
from tests.launched import ROOT
from tests.launched import launch as start

# As `accelerate launch --use_fsdp --fsdp_version 2` sets it.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed (ZeRO-1 to 3), which flattens"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context or pipeline parallel"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version: got 1, expected 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: got 1, expected 2"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "the decoder block is the unit: PEFT's"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: got true, expected false: hold the base in 4"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: got false, expected true"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set sft.gradient_checkpointing"),
        (FSDP2 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "fsdp_sharding_strategy: got HYBRID_SHARD"),
    ],
)
def test_an_engine_that_cannot_train_a_partition_is_refused_in_a_line_that_says_what_to_do(environment, says):
    with pytest.raises(InputError) as refused:
        launch.check(environment)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("environment", [{}, FSDP2, {"ACCELERATE_USE_DEEPSPEED": "false"}])
def test_ddp_and_fsdp2_are_not(environment):
    launch.check(environment)


def test_engines_name_fsdp2_instead():
    for name in launch.ENGINES:
        with pytest.raises(InputError, match="FSDP2 where the base is too large for one device"):
            launch.check({name: "true"})


def test_the_recipe_and_not_accelerate_says_the_precision(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch.join(on_cpu=True)
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert "mixed_precision: bf16 of accelerate's configuration is not heeded" in caplog.text


@pytest.mark.slow
def test_the_page_s_script_trains_in_two_processes(tiny_folder, tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    code = page.split("## In a script of your own")[1].split("```python\n")[1].split("```")[0]
    rows = [[{"prompt": f"{i} and {i + k} is", "completion": f" {2 * i + k}"} for i in range(8)] for k in (1, 2)]
    given = f"""
from datasets import Dataset
NAME, FOLDER = {str(tiny_folder)!r}, {str(tmp_path / "out")!r}
SYSTEM1, SYSTEM2 = (Dataset.from_list(rows) for rows in {rows!r})
"""
    script = tmp_path / "script.py"
    script.write_text(given + code)
    done = start(2, [str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7
    refused = start(2, [str(script)], **FSDP2)
    assert refused.returncode != 0
    assert "shard the base with lorapar.distributed.sharding.shard" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_averaged_gradients_are_those_of_a_dense_all_reduce(tmp_path, count):
    done = start(count, ["-m", "tests.lorapar.exchanging", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads((tmp_path / "worst.json").read_text())
    assert worst["0"] < 1e-6
    assert worst["1"] < 2e-2  # bf16
    assert worst["2"] < 1e-6


def test_a_thread_that_is_about_to_say_the_end_is_waited_for(monkeypatch):
    """The watching thread had seen the other process's death and claimed the line; SIGTERM ended the main thread, and
    with it the process, before it had spoken."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(launch, "_is_first", lambda why: True)
    monkeypatch.setattr(launch, "_ending", None)
    monkeypatch.setattr(launch, "_said", False)
    claimed, said = threading.Event(), []

    def watching() -> None:
        assert launch.claim("process 1 of 2 ended")
        claimed.set()
        time.sleep(0.3)
        said.append(launch.say_end("process 1 of 2 ended"))

    thread = threading.Thread(target=watching)
    thread.start()
    assert claimed.wait(10)
    assert not launch.say_end("stopped (SIGTERM)")
    assert said == [True]
    thread.join()


def test_one_process_waits_for_nobody():
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.gather("x") == ["x"]
    assert processes.from_main(lambda: 3) == 3
    assert processes.share(range(5)) == [0, 1, 2, 3, 4]
    tensors = [torch.ones(2)]
    assert processes.sum_in_order(tensors)[0] is tensors[0]


def test_parts_are_halved_until_there_are_enough():
    ids = torch.arange(12).view(6, 2)
    parts = [{"input_ids": ids[:1], "n": 6}, {"input_ids": ids[1:], "n": 6}]
    for count in range(2, 7):
        made = in_so_many(parts, count)
        assert len(made) == count
        assert torch.equal(torch.cat([part["input_ids"] for part in made]), ids)
        assert all(part["n"] == 6 for part in made)
