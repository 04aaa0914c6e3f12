"""A run that was stopped goes on with the same command; nothing that is finished is done again."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import driver
from .driver import done, in_child, records, refused, skipped, succeeds, tree

ORDER = ["label", "score", "partition", "sft", "grpo", "evaluate", "export", "report"]
KILLS = [
    ("label", driver.kill_before_rename, ("labels.jsonl",)),
    ("score", driver.kill_before_rename, ("scores.safetensors",)),
    ("partition", driver.kill_before_rename, ("partition.safetensors",)),
    ("sft", driver.kill_at_step, ("sft", 3)),
    ("sft", driver.kill_in_checkpoint, ("sft", 4)),
    ("grpo", driver.kill_at_step, ("grpo", 3)),
    ("evaluate", driver.kill_before_rename, ("metrics.json",)),
    ("export", driver.kill_before_rename, ("adapter_config.json",)),
    ("report", driver.kill_before_rename, ("report.html",)),
]


def losses(folder: Path, stage: str) -> dict[int, float]:
    history = json.loads((folder / stage / "log_history.json").read_text())
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def assert_same_training(folder: Path, other: Path, stage: str, steps: int = 4) -> None:
    assert losses(folder, stage) == losses(other, stage)
    assert len(losses(folder, stage)) == steps
    one, two = (load_file(f / stage / "adapter_model.safetensors") for f in (folder, other))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.slow
def test_kill_9_in_every_stage(recipe_file: Path, finished_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    before: dict = {}
    for stage, patch, arguments in KILLS:
        code, log = in_child(patch, arguments, "run", recipe_file, "--output_dir", folder)
        assert code == -signal.SIGKILL, f"{stage}: {log}"
        assert done(folder) == ORDER[: ORDER.index(stage)]
        assert skipped(log) == list(before), f"{stage}: {log}"
        now = records(folder)
        assert {name: now[name] for name in before} == before
        before = {name: now[name] for name in done(folder)}
    log = succeeds("run", recipe_file, "--output_dir", folder)
    assert skipped(log) == ORDER[:-1]
    now = records(folder)
    assert list(now) == ORDER
    # The second kill left half of checkpoint-4.
    assert now["sft"]["resumed_from"] == "checkpoint-2"
    assert now["grpo"]["resumed_from"] == "checkpoint-2"
    assert not list(folder.rglob(".*.tmp")), "what the killed processes left is cleared away"
    for name in ("labels.jsonl", "scores.safetensors", "partition.safetensors"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes()
    assert_same_training(folder, finished_run, "sft")
    assert_same_training(folder, finished_run, "grpo")
    same = "accuracy", "interval", "n", "partition", "optimizer_state_bytes"
    metrics, uninterrupted = (json.loads((f / "metrics.json").read_text()) for f in (folder, finished_run))
    assert {key: metrics[key] for key in same} == {key: uninterrupted[key] for key in same}
    assert set(metrics["seconds"]) == set(ORDER) - {"report"}


@pytest.mark.parametrize(
    ("stage", "keys", "killed", "resumed", "steps"),
    [
        ("grpo", {"steps_per_generation": 3}, 3, "checkpoint-2", 4),
        # Two steps an epoch: in the second one, in the second pass over its completions.
        ("grpo", {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 3,
                  "per_device_train_batch_size": 64, "save_steps": 3}, 4, "checkpoint-3", 4),
        # Two steps an epoch as well, with an order that is drawn anew for each.
        ("sft", {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 3,
                 "per_device_train_batch_size": 8, "save_steps": 3}, 4, "checkpoint-3", 4),
    ],
)  # fmt: skip
def test_a_stage_killed_anywhere_ends_bit_for_bit_as_one_that_was_not(
    recipe_file: Path, finished_run: Path, tmp_path: Path, stage: str, keys: dict, killed: int, resumed: str, steps: int
):
    words = [word for key, value in keys.items() for word in (f"--{stage}.{key}", value)]
    if stage == "grpo":
        words += ["--grpo.max_completion_length", "2"]
    whole, folder = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("whole", "killed"))
    succeeds(stage, recipe_file, "--update", *words, "--output_dir", whole)
    command = stage, recipe_file, "--update", *words, "--output_dir", folder
    code, log = in_child(driver.kill_at_step, (stage, killed), *command)
    assert code == -signal.SIGKILL, log
    succeeds(*command)
    assert records(folder)[stage]["resumed_from"] == resumed
    assert_same_training(folder, whole, stage, steps)


def test_kill_9_between_two_batches_of_scoring(changed_recipe, tmp_path: Path):
    """In the second system's second batch: the first system's sums and the second's first batch are not done again."""
    recipe = changed_recipe(score={"examples": 8, "batch_size": 2})
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for verb in ("label", "score"):
        succeeds(verb, recipe, "--output_dir", whole)
    succeeds("label", recipe, "--output_dir", folder)
    # Four batches at least a system, and a save at its end.
    code, log = in_child(driver.kill_while_scoring, (7,), "score", recipe, "--output_dir", folder)
    assert code == -signal.SIGKILL, log
    sums = sorted(path.name for path in folder.glob("scoring-*"))
    assert sums == ["scoring-system1.safetensors", "scoring-system2.safetensors"]
    log = succeeds("score", recipe, "--output_dir", folder)
    assert "score: going on after 8 examples" in log
    assert log.count("score: going on after") == 2
    assert (folder / "scores.safetensors").read_bytes() == (whole / "scores.safetensors").read_bytes()
    assert not list(folder.glob("scoring-*"))


def test_sums_of_another_recipe_are_removed(changed_recipe, tmp_path: Path):
    folder = tmp_path / "run"
    recipe = changed_recipe(score={"batch_size": 2})
    succeeds("label", recipe, "--output_dir", folder)
    assert in_child(driver.kill_while_scoring, (2,), "score", recipe, "--output_dir", folder)[0] == -signal.SIGKILL
    log = succeeds("score", recipe, "--output_dir", folder, "--seed", "1", "--update")
    assert "scoring-system1.safetensors: made from other inputs, removed" in log
    assert "going on after" not in log


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("trainer_state.json", truncate),
        ("optimizer.pt", truncate),
        ("optimizer.pt", Path.unlink),
        ("rng_state.pth", truncate),
        ("scheduler.pt", Path.unlink),
        ("adapter_model.safetensors", truncate),
        ("lorapar_partition.safetensors", Path.unlink),
    ],
)
def test_a_half_written_checkpoint_falls_back_to_the_one_before(
    finished: Path, finished_run: Path, recipe_file: Path, file: str, damage
):
    (finished / "sft" / "adapter_model.safetensors").unlink()
    damage(finished / "sft" / "checkpoint-4" / file)
    log = succeeds("sft", recipe_file, "--output_dir", finished)
    assert f"checkpoint-4: not whole ({file}" in log
    assert records(finished)["sft"]["resumed_from"] == "checkpoint-2"
    assert_same_training(finished, finished_run, "sft")


def test_without_a_whole_checkpoint_a_stage_starts_over(finished: Path, finished_run: Path, recipe_file: Path):
    (finished / "sft" / "adapter_model.safetensors").unlink()
    for step in (2, 4):
        (finished / "sft" / f"checkpoint-{step}" / "trainer_state.json").write_text("")
    succeeds("sft", recipe_file, "--output_dir", finished)
    assert records(finished)["sft"]["resumed_from"] is None
    assert_same_training(finished, finished_run, "sft")


def test_a_finished_stage_whose_adapter_was_deleted_is_taken_from_its_last_checkpoint(
    finished: Path, finished_run: Path, recipe_file: Path
):
    (finished / "grpo" / "adapter_model.safetensors").unlink()
    log = succeeds("run", recipe_file, "--output_dir", finished)
    assert records(finished)["grpo"]["resumed_from"] == "checkpoint-4"
    assert_same_training(finished, finished_run, "grpo")
    assert skipped(log) == [name for name in ORDER if name not in ("grpo", "report")]


def test_checkpoints_of_other_inputs_are_not_gone_on_from(finished: Path, recipe_file: Path):
    changed = "run", recipe_file, "--output_dir", finished, "--sft.learning_rate", "2e-3", "--update"
    log = succeeds(*changed)
    assert "checkpoint-4: made from other inputs, removed" in log
    assert records(finished)["sft"]["resumed_from"] is None
    assert skipped(log) == ["label", "score", "partition"]


def test_a_stage_that_cannot_fit_gives_up_no_checkpoint(finished: Path, recipe_file: Path, monkeypatch):
    from lorapar.memory import advice as remedies

    before, finished_stages = tree(finished, "recipe.yaml"), records(finished)
    monkeypatch.setattr(remedies, "available_bytes", lambda device: 1)
    changed = "run", recipe_file, "--output_dir", finished, "--sft.learning_rate", "2e-3", "--update"
    refused(*changed, says=("sft needs ",))
    assert tree(finished, "recipe.yaml") == before
    assert records(finished) == finished_stages


def test_rows_that_cannot_fit_cost_no_checkpoint(finished: Path, recipe_file: Path):
    before, finished_stages = tree(finished, "recipe.yaml"), records(finished)
    assert any("checkpoint-" in name for name in before)
    changed = "run", recipe_file, "--output_dir", finished, "--sft.max_length", "2", "--update"
    refused(*changed, says=("sft.max_length: got 2, shorter than every row",))
    assert tree(finished, "recipe.yaml") == before
    assert records(finished) == finished_stages
    # And with the old recipe there is nothing to do again.
    assert skipped(succeeds("run", recipe_file, "--output_dir", finished, "--update")) == ORDER


def test_a_second_run_skips_every_stage_and_touches_no_file(finished: Path, recipe_file: Path):
    # The copy stands in another place than the run it is a copy of, which the recipe in it says from now on.
    assert skipped(succeeds("run", recipe_file, "--output_dir", finished)) == ORDER
    before = tree(finished)
    log = succeeds("run", recipe_file, "--output_dir", finished)
    assert skipped(log) == ORDER
    assert tree(finished) == before


def test_a_finished_folder_can_be_moved(finished: Path, recipe_file: Path, tmp_path: Path):
    moved = Path(shutil.move(finished, tmp_path / "elsewhere"))
    assert skipped(succeeds("run", recipe_file, "--output_dir", moved)) == ORDER


def test_a_deleted_artefact_is_made_again_and_what_follows_is_kept(finished: Path, recipe_file: Path):
    before = tree(finished, "stages.json", "metrics.json", "report.html", "recipe.yaml")
    (finished / "partition.safetensors").unlink()
    log = succeeds("run", recipe_file, "--output_dir", finished)
    # Made again from the same scores it is the same file, so only the report, which tells the times, follows.
    assert skipped(log) == [name for name in ORDER if name not in ("partition", "report")]
    after = tree(finished, "stages.json", "metrics.json", "report.html", "recipe.yaml")
    for files in (before, after):
        for name in [n for n in files if n.startswith("figures")]:
            files.pop(name)
    assert after.pop("partition.safetensors")[1] == before.pop("partition.safetensors")[1]
    assert after == before


def test_ctrl_c_is_130_and_one_line(recipe_file: Path, tmp_path: Path):
    arguments = "sft", 3, signal.SIGINT
    code, log = in_child(driver.kill_at_step, arguments, "run", recipe_file, "--output_dir", tmp_path / "run")
    assert code == 130
    lines = log.splitlines()
    assert lines[-1] == "lorapar: interrupted; the same command resumes from here"
    assert all(line.startswith("lorapar: ") for line in lines), log
    assert "stopped: KeyboardInterrupt" in (tmp_path / "run" / "run.log").read_text()
    succeeds("sft", recipe_file, "--output_dir", tmp_path / "run")
    assert records(tmp_path / "run")["sft"]["resumed_from"] == "checkpoint-2"


def test_two_runs_in_one_folder_are_refused(finished: Path, recipe_file: Path):
    child = multiprocessing.get_context("forkserver").Process(target=_hold_the_log, args=(finished / "run.log",))
    child.start()
    held = finished / "held"
    while not held.exists():
        assert child.is_alive()
        time.sleep(0.01)
    refused("run", recipe_file, "--output_dir", finished, says=("another lorapar is running there",), alone=True)
    child.kill()
    child.join(60)
    held.unlink()
    # Killed, it holds nothing; the lock's file alone stays.
    succeeds("run", recipe_file, "--output_dir", finished)
    assert (finished / ".run.log.lock").exists()


def _hold_the_log(path: Path) -> None:
    from lorapar.logs import logging_to

    with logging_to(path):
        (path.parent / "held").write_text("")
        time.sleep(60)
