"""The edges of a run: settings that only the stage's own configuration shows, places to write to, signals."""

import importlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import lorapar as lorapar_package
from lorapar import InputError
from lorapar.adapter.attach import save_adapter
from lorapar.model.locate import origin
from lorapar.recipe.sections import ModelConfig
from tests.tiny import tiny_tokenizer

from . import driver
from .driver import in_child, lorapar, records, refused, succeeds
from .test_adapter import config


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sft.fp16", "true", "sft.fp16: got True, expected false on a CPU"),
        ("sft.save_strategy", "best", "sft.save_strategy: got 'best', expected steps, epoch or no"),
        ("sft.lr_scheduler_kwargs", "{num_cycles: 2}", "sft.lr_scheduler_kwargs: got {'num_cycles': 2}: "),
        ("sft.report_to", "tensorboard", "sft.report_to: 'tensorboard' is not installed here"),
        ("sft.use_liger_kernel", "true", "liger-kernel, which is not installed"),
        ("grpo.use_vllm", "true", "vllm, which is not installed"),
        ("grpo.loss_type", "bogus", "grpo.loss_type"),
        ("grpo.num_generations", "3", "num_generations (3)"),
        ("grpo.cache_implementation", "foo", "Invalid `cache_implementation` (foo)"),
        ("grpo.generation_kwargs", "{temperature: 0}", "grpo.generation_kwargs: got {'temperature': 0}: `temperature`"),
        ("grpo.generation_kwargs", "{num_return_sequences: 2}", "{'num_return_sequences': 2}, expected settings that"),
        ("grpo.generation_kwargs", "{return_dict_in_generate: true}", "expected settings that give a prompt one compl"),
        ("grpo.generation_kwargs", "{top_k: 0.5}", "grpo.generation_kwargs: got {'top_k': 0.5}: `top_k` has to be"),
        ("grpo.generation_kwargs", "{bad_words_ids: 3}", "`bad_words_ids` has to be a non-empty list"),
        ("grpo.generation_kwargs", "{max_new_tokens: 0}", "`max_new_tokens` must be greater than 0"),
        ("grpo.generation_kwargs", "{typo: 1}", "grpo.generation_kwargs.typo: unknown key; "),
        ("sft.tf32", "true", "sft.tf32 requires"),
        ("sft.push_to_hub", "true", "sft.push_to_hub: got True: a run uploads nothing"),
    ],
)
def test_a_setting_of_a_trainer_that_cannot_work_here_is_refused_before_a_byte_is_written(
    recipe_file, tmp_path, key, value, says
):
    refused("run", recipe_file, "--output_dir", tmp_path / "run", f"--{key}", value, says=(says,), alone=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("sft.report_to", "tensorboard"), ("sft.use_liger_kernel", "true"), ("grpo.use_vllm", "true"),
     ("sft.lr_scheduler_kwargs", "{num_cycles: 2}"), ("sft.push_to_hub", "true"), ("grpo.reward_weights", "[1, 2]")],
)  # fmt: skip
def test_the_plan_refuses_it_as_the_run_does(recipe_file, key, value):
    refused("plan", recipe_file, f"--{key}", value, says=(key,), alone=True)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"grpo": {"per_device_train_batch_size": 400}}, "prompts do not fill a generation batch of 400 completions"),
        ({"grpo": {"gradient_accumulation_steps": 100}}, "steps_per_generation (now 100"),
        ({"sft": {"max_length": 3}}, "sft.max_length: got 3, shorter than every row ("),
        ({"sft": {"dataloader_drop_last": True, "per_device_train_batch_size": 1000}}, "rows do not fill one batch of"),
        (
            {"grpo": {"max_completion_length": 8190}},
            "grpo.max_completion_length: 8190 tokens behind the prompt are more",
        ),
    ],
)
def test_rows_that_a_later_stage_cannot_use_are_refused_once_they_are_labelled(
    changed_recipe, tmp_path, sections, says
):
    refused("run", changed_recipe(**sections), "--output_dir", tmp_path / "run", says=(says,))
    assert list(records(tmp_path / "run")) == ["label"]


# Where to write


def test_a_folder_in_the_home_is_there_and_not_in_a_folder_called_tilde(changed_recipe, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    recipe = changed_recipe(output_dir="~/of the recipe")
    succeeds("label", recipe)
    succeeds("label", recipe, "--output_dir=~/of the command")
    assert all((home / name / "labels.jsonl").is_file() for name in ("of the command", "of the recipe"))
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("x" * 300, "cannot be written (File name too long)"),
        ("/proc/lorapar", "/proc/lorapar: cannot be written (No such file or directory)"),
        ("a_file", "a_file is a file; give a folder"),
        ("a_file/run", "a_file is a file; give a folder"),
        ("~nobody_of_that_name/run", "output_dir: got '~nobody_of_that_name/run', but there is no such user"),
        ("loop/run", "cannot be written"),
    ],
)
def test_a_place_that_nothing_can_be_written_to_is_one_line(recipe_file, tmp_path, monkeypatch, place, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    refused("label", recipe_file, "--output_dir", place, says=(says,), alone=True)


def test_a_recipe_by_a_name_that_is_too_long(tmp_path):
    refused("run", tmp_path / ("x" * 300 + ".yaml"), says=("no such recipe",), alone=True)
    (tmp_path / "r.yaml").write_text(f"extends: {'x' * 300}.yaml\n")
    refused("run", tmp_path / "r.yaml", says=("cannot be read (File name too long)",), alone=True)


@pytest.mark.parametrize("key", ["model.name", "label.store", "data.sources"])
def test_the_home_of_nobody_is_told_with_its_key(recipe_file, tmp_path, key):
    value = "[~nobody_of_that_name/x]" if key == "data.sources" else "~nobody_of_that_name/x"
    says = f"{key}[0].name" if key == "data.sources" else key
    refused("label", recipe_file, "--output_dir", tmp_path / "run", f"--{key}", value, says=(says, "no such user"))


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_with_one_line_and_its_status(recipe_file, tmp_path, number, status):
    command = "run", recipe_file, "--output_dir", tmp_path / "run"
    code, log = in_child(driver.kill_at_step, ("sft", 3, number), *command)
    assert code == status, log
    assert log.splitlines()[-1] == f"lorapar: stopped ({number.name}); the same command resumes from here"
    assert all(line.startswith("lorapar: ") for line in log.splitlines()), log
    assert f"stopped: Stopped('{number.name}')" in (tmp_path / "run" / "run.log").read_text()
    if number == signal.SIGTERM:
        code, log = in_child(driver.kill_in_checkpoint, ("sft", 4, number), "sft", *command[1:])
        assert code == status, log
        assert "checkpoint-4: not whole (optimizer.pt" in succeeds("sft", *command[1:])
        assert records(tmp_path / "run")["sft"]["resumed_from"] == "checkpoint-2"


def test_a_signal_ahead_of_the_run_and_a_handler_of_the_callers(recipe_file, monkeypatch):
    monkeypatch.setattr("lorapar.cli._recipe", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = lorapar("run", recipe_file)
    assert (code, out, err) == (143, "", "lorapar: stopped (SIGTERM); the same command resumes from here\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    taken = []
    signal.signal(signal.SIGTERM, lambda *_: taken.append(1))
    try:
        with pytest.raises(TypeError):  # of None, the recipe that was not read
            lorapar("run", recipe_file)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert taken == [1]
    # In another process of a distributed launch nothing is said twice.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lorapar("run", recipe_file) == (143, "", "")


# Where the base is


def test_a_base_and_its_adapters_move_and_the_recipe_says_where_to(finished, recipe_file, tiny_folder, tmp_path):
    moved = Path(shutil.copytree(tiny_folder, tmp_path / "moved"))
    for folder in ("sft", "grpo"):
        settings = json.loads((finished / folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tiny_folder.resolve())
        (finished / folder / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": "/gone"})
        )
    succeeds("export", recipe_file, "--output_dir", finished, "--update", "--model.name", moved)
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(moved.resolve())
    log = refused("export", recipe_file, "--output_dir", finished, "--update", "--model.name", tmp_path / "gone")
    assert "model.name: " in log


def test_an_adapter_names_its_bases_origin_and_nothing_of_ours_asks_the_hub_for_it(tiny_folder, tmp_path, monkeypatch):
    loading = importlib.import_module("lorapar.model.load")
    monkeypatch.setattr(loading, "origin", lambda name, revision: ("owner/tiny", "0123abc"))
    for asks in (
        "peft.utils.save_and_load.check_file_exists_on_hf_hub",
        "peft.utils.other.check_file_exists_on_hf_hub",
    ):
        monkeypatch.setattr(asks, lambda *_: pytest.fail("the hub was asked"))
    run = ModelConfig(str(tiny_folder), dtype="float32")
    model = lorapar_package.attach(loading.load_model(run), config(), start="twin")
    save_adapter(model, tmp_path / "one")
    again = lorapar_package.load_adapter(loading.load_model(run), str(tmp_path / "one"))
    save_adapter(again, tmp_path / "two")
    lorapar_package.export(again, tiny_tokenizer(), tmp_path, merged=True)
    for folder in ("one", "two", "adapter"):
        settings = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/tiny", "0123abc")
    for folder in ("one", "adapter", "merged"):
        assert str(tiny_folder) not in (tmp_path / folder / "README.md").read_text()
    assert "base_model: owner/tiny" in (tmp_path / "adapter" / "README.md").read_text()


def test_what_an_adapter_calls_its_base(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path))
    alias = Path(shutil.copytree(tiny_folder, tmp_path / "models" / "smollm2-135m"))
    commit = "0123456789" * 4
    snapshot = Path(shutil.copytree(tiny_folder, tmp_path / "hub" / "models--owner--a-name.1" / "snapshots" / commit))
    for name, called in (
        ("smollm2-135m", ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        (str(alias), ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        (str(snapshot), ("owner/a-name.1", commit)),
        ("owner/name", ("owner/name", "main")),
        (str(tiny_folder), (str(tiny_folder.resolve()), None)),
    ):
        assert origin(name, "main") == called


def test_an_adapter_is_loaded_onto_a_model_and_not_onto_a_name(tmp_path):
    with pytest.raises(InputError, match=r"^model: got 'a str', expected the loaded base model"):
        lorapar_package.load_adapter("a str", tmp_path)
