"""Several processes on the CPU (gloo) train as one process does at the same global batch, sharded or not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lorapar
from tests.launched import command, environment, launch
from tests.lorapar.driver import recipe_values

pytestmark = pytest.mark.slow
FSDP, NF4 = ("--model.fsdp", "true"), ("--lora.base", "nf4")


@dataclasses.dataclass
class Runs:
    """Output folders with everything up to the partition, made once for each form of the base."""

    folder: Path
    values: dict[str, Any]

    def recipe(self, processes: int) -> Path:
        """The same rows a step for any number of processes; the smaller batch of two goes through in parts."""
        values = json.loads(json.dumps(self.values))
        for stage in ("sft", "grpo"):
            values[stage]["per_device_train_batch_size"] = 8 // processes
        path = self.folder / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def begun(self, base: tuple[str, ...]) -> Path:
        folder = self.folder / ("begun" + "".join(base).replace("--", "-"))
        if not folder.exists():
            overrides = [("output_dir", str(folder)), *([("lora.base", "nf4")] if base else [])]
            recipe = lorapar.load_recipe(self.recipe(1), overrides)
            for verb in ("label", "score", "partition"):
                lorapar.run(recipe, only=verb)
        return folder

    def copy(self, name: str, of: Path) -> Path:
        return Path(shutil.copytree(of, self.folder / name))

    def arguments(self, folder: Path, processes: int, options: tuple[str, ...], stages: str = "sft,grpo") -> list[str]:
        # --update: the recipe's batch is another one.
        run = ["-m", "tests.end_to_end.in_processes", str(self.recipe(processes)), str(folder), stages, "--update"]
        return [*run, *options]

    def trained(self, name: str, processes: int, *options: str) -> Path:
        """A copy with both stages trained by so many processes."""
        folder = self.folder / name
        if not folder.exists():
            self.copy(name, self.begun(NF4 if "nf4" in options else ()))
            done = launch(processes, self.arguments(folder, processes, options))
            assert done.returncode == 0, done.stderr[-3000:]
        return folder


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    values = recipe_values(tiny_folder)
    values["sft"] |= {"max_steps": 5, "micro_batch_tokens": 138}
    values["grpo"] |= {"max_steps": 5, "scale_rewards": "none"}
    values["partition"] = {"theta": 0.88}
    return Runs(tmp_path_factory.mktemp("runs"), values)


def logged(folder: Path, stage: str, key: str) -> list[float]:
    history = json.loads((folder / stage / "log_history.json").read_text())
    return [entry[key] for entry in history if key in entry]


def adapter(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "adapter_model.safetensors")


def flat(folder: Path, stage: str) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).double() for _, tensor in sorted(adapter(folder, stage).items())])


KEYS = {"sft": ("loss", "grad_norm"), "grpo": ("reward", "grad_norm", "kl")}


def check_same(one: Path, other: Path, stages: str = "sft,grpo") -> None:
    """Losses, gradients and rewards of every step, and the adapters after each stage."""
    for stage in stages.split(","):
        for key in KEYS[stage]:
            wanted = logged(one, stage, key)
            assert len(wanted) == 5
            assert logged(other, stage, key) == pytest.approx(wanted, rel=1e-3, abs=1e-5), (stage, key)
        # By norms: Adam makes steps of their full size of gradients that are rounding alone.
        made, given, start = flat(other, stage), flat(one, stage), flat(one, "start")
        assert float((made - given).norm()) < 5e-3 * float((given - start).norm())


def check_proof(folder: Path, stages: str = "sft,grpo") -> None:
    """What is inactive is as it was before the stage, to the bit, and the counts are of the whole adapter."""
    partition = lorapar.Partition.load(folder / "partition.safetensors")
    records = json.loads((folder / "stages.json").read_text())
    for stage in stages.split(","):
        before = {"sft": "start", "grpo": "sft"}[stage]
        masks, was, became = partition.active(stage), adapter(folder, before), adapter(folder, stage)  # type: ignore[arg-type]
        for name, tensor in became.items():
            inactive = ~masks[name.replace(".weight", ".default.weight")]
            assert torch.equal(tensor[inactive], was[name][inactive])
        active = sum(int(mask.sum()) for mask in masks.values())
        assert records[stage]["active"] == active
        assert active * 0.9 < records[stage]["moved"] <= active
        assert records[stage]["optimizer_state_bytes"] == 8 * active


@pytest.mark.parametrize(
    ("name", "options", "like"),
    [("ddp", (), "one"), ("fsdp", FSDP, "one"), ("nf4-ddp", NF4, "one-nf4"), ("nf4-fsdp", NF4 + FSDP, "one-nf4")],
)
def test_two_processes_train_as_one_does(runs, name, options, like):
    one = runs.trained(like, 1, *(NF4 if "nf4" in like else ()))
    two = runs.trained(name, 2, *options)
    check_same(one, two)
    check_proof(two)


def test_a_sharded_base_gives_the_very_bits(runs):
    # The same arithmetic in the same order: a block is whole while it computes.
    plain, sharded = runs.trained("ddp", 2), runs.trained("fsdp", 2, *FSDP)
    for stage in ("sft", "grpo"):
        assert logged(plain, stage, "loss") == logged(sharded, stage, "loss")
        for name, tensor in adapter(plain, stage).items():
            assert torch.equal(tensor, adapter(sharded, stage)[name])


def test_active_gradients_alone_are_exchanged(runs):
    folder = runs.trained("ddp", 2)
    partition = lorapar.Partition.load(folder / "partition.safetensors").summary()
    share, elements = partition["fraction"]["active_sft"], json.loads((folder / "stages.json").read_text())["sft"]
    assert 0.38 < share < 0.42
    # Half of the elements are the start's frozen twin, which a dense exchange could leave out too.
    dense = 4 * elements["elements"] / 2
    exchanged = json.loads((folder / "exchanged.json").read_text())
    assert len(exchanged) == 10  # one a step of either stage, though a batch of sft goes through in parts
    assert max(exchanged) <= 0.45 * dense
    assert min(exchanged) >= share * dense


@pytest.mark.parametrize(
    ("begun_by", "goes_on_in", "stage"), [(2, 1, "sft"), (1, 2, "sft"), (2, 1, "grpo"), (1, 2, "grpo")]
)
def test_another_number_of_processes_resumes(runs, begun_by, goes_on_in, stage):
    undisturbed = runs.trained("one", 1)
    folder = runs.copy(f"killed-{begun_by}-{stage}", runs.begun(()))
    stages = "sft" if stage == "sft" else "sft,grpo"
    arguments = runs.arguments(folder, begun_by, (), stages)
    began = time.monotonic()
    stopped = launch(begun_by, arguments, END="killed", END_IN=stage, END_RANK=str(begun_by - 1))
    assert stopped.returncode != 0
    assert time.monotonic() - began < 60 + 60  # the first minute is for getting there
    if begun_by > 1:
        ours = [line for line in stopped.stderr.splitlines() if "resumes from here" in line]
        assert ours == ["lorapar: process 1 of 2 ended without a word (killed?); the same command resumes from here"]
    done = launch(goes_on_in, [word for word in arguments if word != "--update"])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((folder / "stages.json").read_text())[stage]
    assert record["resumed_from"] == "checkpoint-2"
    assert f"begun in another number of processes, and gone on with in {goes_on_in} at the same rows" in done.stderr
    check_same(undisturbed, folder, stages)
    check_proof(folder, stages)


def test_a_process_that_is_refused_ends_all_with_its_line(runs):
    folder = runs.copy("refused", runs.begun(()))
    began = time.monotonic()
    done = launch(2, runs.arguments(folder, 2, ()), END="refused", END_IN="sft", END_RANK="1")
    assert done.returncode != 0
    assert time.monotonic() - began < 60 + 60  # the first minute is for getting there
    last = [line for line in done.stderr.splitlines() if line.startswith("lorapar: ")][-1]
    assert last == "lorapar: error: row 17: refused for the test"
    assert done.stderr.count("lorapar: error:") == 1
    assert "resumes from here" not in done.stderr


def test_an_adapter_that_drifts_apart_is_found_before_its_checkpoint_is_written(runs):
    folder = runs.copy("drifts", runs.begun(()))
    done = launch(2, runs.arguments(folder, 2, (), "sft"), END="drifts", END_IN="sft", END_RANK="1")
    assert done.returncode != 0
    assert "AdaptersDiffer: sft: the adapter of process 1 is not that of process 0" in done.stderr
    assert [path.name for path in folder.glob("sft/checkpoint-*")] == ["checkpoint-2"]


def test_control_c_is_said_once(runs):
    folder = runs.copy("interrupted", runs.begun(()))
    arguments = runs.arguments(folder, 2, ("--sft.max_steps", "100000"), "sft")
    process = subprocess.Popen(
        command(2, arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(),
        process_group=0,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "went first" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    said = process.stderr.read()
    process.wait(60)
    assert said.count("resumes from here") == 1, said
    assert "lorapar: interrupted; the same command resumes from here" in said


STAGES = ("label", "score", "partition", "sft", "grpo", "evaluate", "export", "report")


def test_a_run_that_loses_a_process_in_every_stage_is_finished_by_the_same_command(runs):
    folder = runs.folder / "losing"
    arguments = runs.arguments(folder, 2, (), "run")
    for place, stage in enumerate(STAGES):
        rank, began = place % 2, time.monotonic()
        stopped = launch(2, arguments, END="killed", END_IN=stage, END_RANK=str(rank))
        assert stopped.returncode != 0, stage
        assert time.monotonic() - began < 60 + 60, stage  # the first minute is for getting there
        ours = [line for line in stopped.stderr.splitlines() if line.startswith("lorapar: ")]
        lost = f"lorapar: process {rank} of 2 ended without a word (killed?); the same command resumes from here"
        assert [line for line in ours if "resumes from here" in line] == [lost], stopped.stderr[-3000:]
        assert "finished" not in json.loads((folder / "stages.json").read_text())[stage]
    done = launch(2, arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(folder / "report.html")]
    undisturbed = runs.folder / "undisturbed"
    assert launch(2, runs.arguments(undisturbed, 2, (), "run")).returncode == 0
    for name in ("labels.jsonl", "partition.safetensors", "answers.jsonl"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    check_same(undisturbed, folder)
    check_proof(folder)


def test_what_one_process_does_alone_is_not_awaited_in_a_collective(runs):
    """Three stages take the main process longer than a collective may take."""
    folder, began = runs.folder / "patient", time.monotonic()
    done = launch(2, runs.arguments(folder, 2, (), "run"), PAUSE="20", LIMIT="15")
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - began > 3 * 20
    assert set(json.loads((folder / "stages.json").read_text())) == set(STAGES)
