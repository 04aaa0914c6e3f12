"""Bad input gets one clear line and exit status 2, and what is finished stays as it is."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorapar import Partition
from lorapar import files as artefacts

from .driver import SOURCES, done, records, refused, skipped, succeeds, tree

Change = Callable[..., Path]


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int, operations: int = 1, start: int = 0) -> list[dict]:
    plus = [" + ".join(["1"] * operations + [str(n)]) for n in range(start, start + count)]
    return [{"prompt": f"{text} =", "completion": str(sum(map(int, text.split(" + "))))} for text in plus]


# Before anything is made


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (("--partition.tetha", "0.5"), ("partition.tetha: unknown key; did you mean 'theta'?",)),
        (("--sft.learning_rate", "fast"), ("sft.learning_rate: got 'fast', expected float",)),
        (("--partition.theta=1.5",), ("partition.theta: got 1.5", "(0, 1]")),
        (("--lora.use_dora", "true"), ("lora.use_dora: not supported",)),
        (("--lora.modules_to_save", "[lm_head]"), ("lora.modules_to_save: not supported",)),
        (("--grpo.rewards", "[acuracy]"), ("grpo.rewards: unknown reward 'acuracy'; nearest: accuracy",)),
        (("--grpo.rewards", "[]"), ("grpo.rewards: expected at least one",)),
        (("--grpo.rewards", "['nowhere:f']"), ("grpo.rewards: nowhere:f: importing 'nowhere' failed",)),
        (("--grpo.num_generations", "3"), ("grpo: ", "num_generations")),
        (
            ("--sft.save_strategy", "sometimes"),
            ("sft.save_strategy: got 'sometimes', expected no, steps, epoch or best",),
        ),
        (("--sft.report_to", "wandb"), ("sft.report_to: 'wandb' is not installed here",)),
        (("--label.voters", "[operatoins]"), ("label.voters: unknown voter 'operatoins'; nearest: operations",)),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_a_folder_is_made(
    override, says, recipe_file: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    refused("run", recipe_file, "--output_dir", folder, *override, says=says, alone=True)
    assert not folder.exists()


def test_a_backend_that_does_not_exist(recipe_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "cuda")
    says = "LORAPAR_BACKEND must be one of reference, native, triton, got 'cuda'"
    refused("run", recipe_file, "--output_dir", tmp_path / "run", says=(says,), alone=True)


# Data


DATA = {
    "missing file": ({"sources": ["gone.jsonl"]}, None, "gone.jsonl: no such file"),
    "no such kind": ({"sources": ["data.txt"]}, None, "data.sources: 'data.txt' is no file"),
    "missing column": ({"columns": {"prompt": "frage"}}, sums(9), "has no column 'frage'; it has prompt, completion"),
    "no prompt": ({}, [{"text": "a"}], "has no column prompt, question or messages"),
    "our column": ({"columns": {"prmpt": "x"}}, sums(9), "data.columns: unknown key 'prmpt'"),
    "broken row": ({}, '{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2 is corrupt or truncated JSON"),
    "no answer": ({}, [*sums(9), {"prompt": "1 + 1 =", "completion": ""}], "row 10: column 'completion' is empty"),
    "no rows": ({}, [], "has no rows"),
    "all too long": ({"max_prompt_length": 2}, sums(9), "data.max_prompt_length: 2 tokens leave no row"),
    "template": ({"prompt": "{question}"}, sums(9), "data.prompt: the template names {question}"),
    "held out": ({"held_out": 100}, sums(9), "data.held_out: 100 rows of"),
    "system 2 empty": ({"held_out": 1}, sums(20), "no train row is labelled System 2"),
    "system 1 empty": ({"held_out": 1}, sums(20, 4), "no train row is labelled System 1"),
}


@pytest.mark.parametrize("case", DATA)
def test_unusable_data(case: str, changed_recipe: Change, tmp_path: Path):
    data, rows, says = DATA[case]
    if rows is not None:
        path = tmp_path / "rows.jsonl"
        path.write_text(rows) if isinstance(rows, str) else rows_file(path, rows)
        data = {"sources": [str(path)], **data}
    folder = tmp_path / "run"
    refused("run", changed_recipe(data=data), "--output_dir", folder, says=(says,))
    assert not (folder / "labels.jsonl").exists()
    assert done(folder) == []


def test_a_label_column_that_is_missing(changed_recipe: Change, tmp_path: Path):
    recipe = changed_recipe(label={"column": "kind"})
    refused("label", recipe, "--output_dir", tmp_path / "run", says=("label.column: the rows have no column 'kind'",))


@pytest.mark.parametrize("label", [1, 2])
def test_a_label_column_of_one_system(label: int, changed_recipe: Change, tmp_path: Path):
    path = rows_file(tmp_path / "rows.jsonl", [{**row, "kind": label} for row in sums(20)])
    recipe = changed_recipe(data={"sources": [str(path)], "held_out": 2}, label={"column": "kind"})
    says = f"label.column: no train row is labelled System {3 - label} by the column 'kind'; name one that has both"
    refused("label", recipe, "--output_dir", tmp_path / "run", says=(says,))


def test_prompts_longer_than_the_limit_are_counted_and_left_out(changed_recipe: Change, tmp_path: Path):
    long = [{"prompt": "9 + 9 + " * 20 + f"{n} =", "completion": "5"} for n in range(7)]
    path = rows_file(tmp_path / "rows.jsonl", [*sums(12), *sums(12, 3), *long])
    recipe = changed_recipe(data={"sources": [str(path)], "max_prompt_length": 60, "held_out": 4})
    log = succeeds("label", recipe, "--output_dir", tmp_path / "run")
    assert "31 read, 0 duplicates, 7 too_long, 20 train, 4 held_out" in log
    assert records(tmp_path / "run")["label"]["sources"][str(path)]["too_long"] == 7
    kept = artefacts.read_jsonl(tmp_path / "run" / "labels.jsonl")
    assert max(len(row["prompt"]) for row in kept) < 60


# Models and adapters


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["nope"]}, ("lora.target_modules: got", "nope")),
        ({"target_modules": ["q_proj", "lm_head"]}, ("lm_head is the output head",)),
        ({"target_modules": ["embed_tokens"]}, ("embed_tokens is a Embedding; only nn.Linear",)),
        ({"target_modules": ["q_proj", "v_porj"]}, ("lora.target_modules: got 'v_porj'", "nearest: v_proj")),
        ({"exclude_modules": ["v_porj"]}, ("lora.exclude_modules: got 'v_porj'", "nearest: v_proj")),
        ({"layers_to_transform": [0, 7]}, ("lora.layers_to_transform: got 7", "in layers 0 to 1")),
    ],
)
def test_target_modules_that_match_nothing_of_use(finished: Path, changed_recipe: Change, lora: dict, says):
    before, finished_stages = tree(finished, "recipe.yaml", "stages.json"), records(finished)
    refused("run", changed_recipe(lora=lora), "--output_dir", finished, "--update", says=says)
    assert tree(finished, "recipe.yaml", "stages.json") == before
    assert records(finished) == finished_stages


def test_target_modules_are_checked_before_anything_is_labelled(changed_recipe: Change, tmp_path: Path):
    recipe, folder = changed_recipe(lora={"target_modules": ["q_proj", "v_porj"]}), tmp_path / "run"
    refused("run", recipe, "--output_dir", folder, says=("lora.target_modules: got 'v_porj'", "nearest: v_proj"))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": "peft"}, "start: every score is zero"),
        ({"start": "pissa", "lora": {"r": 40}}, "lora.r: got 40, more than the"),
        ({"score": {"max_length": 5}}, "more than score.max_length 5"),
    ],
)
def test_what_cannot_be_scored(changes: dict, says: str, finished: Path, changed_recipe: Change):
    before, finished_stages = tree(finished, "recipe.yaml", "stages.json"), records(finished)
    refused("run", changed_recipe(**changes), "--output_dir", finished, "--update", says=(says,))
    assert tree(finished, "recipe.yaml", "stages.json") == before
    assert records(finished) == finished_stages


def test_a_model_that_is_none(changed_recipe: Change, tmp_path: Path):
    for name, says in ((str(tmp_path), "has no config.json"), ("/nowhere/x", "is no folder, .gguf file, hub id")):
        recipe = changed_recipe(model={"name": name})
        refused("run", recipe, "--output_dir", tmp_path / f"run{len(name)}", says=("model.name: ", says))


def test_a_partition_that_does_not_fit_names_the_tensor_and_both_shapes(finished: Path, recipe_file: Path):
    made = Partition.load(finished / "partition.safetensors")
    name = next(name for name in made.masks["s1"] if "lora_A" in name)
    for kind in made.masks:
        made.masks[kind][name] = made.masks[kind][name][:, :-1]
    made.save(finished / "partition.safetensors")
    before = tree(finished)
    rows, width = made.masks["s1"][name].shape
    says = f"{name} is [{rows}, {width}] there, [{rows}, {width + 1}] in the model"
    refused("sft", recipe_file, "--output_dir", finished, says=("partition.safetensors: does not fit the model", says))
    after = tree(finished)
    after.pop("recipe.yaml")
    before.pop("recipe.yaml")
    assert after == before, "the finished stage and its checkpoints are kept"


def test_a_partition_that_lacks_a_tensor_names_it(finished: Path, recipe_file: Path):
    made = Partition.load(finished / "partition.safetensors")
    name = sorted(made.masks["s1"])[0]
    for kind in made.masks:
        del made.masks[kind][name]
    made.save(finished / "partition.safetensors")
    refused("run", recipe_file, "--output_dir", finished, says=(f"it lacks {name} [",))


# Damaged artefacts


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("labels.jsonl", cut),
        ("labels.jsonl", empty),
        ("scores.safetensors", cut),
        ("scores.safetensors", flip),
        ("start/adapter_model.safetensors", cut),
        ("partition.safetensors", cut),
        ("partition.safetensors", flip),
        ("start/adapter_model.safetensors", flip),
        ("sft/adapter_model.safetensors", cut),
        ("sft/adapter_model.safetensors", flip),
        ("sft/adapter_config.json", cut),
        ("grpo/lorapar.json", empty),
        ("grpo/adapter_model.safetensors", empty),
        ("metrics.json", cut),
        ("answers.jsonl", cut),
        ("adapter/adapter_model.safetensors", flip),
        ("adapter/adapter_config.json", cut),
        ("stages.json", cut),
        ("recipe.yaml", cut),
        ("recipe.yaml", empty),
    ],
)
def test_a_damaged_artefact_is_named_and_the_rest_is_kept(finished: Path, recipe_file: Path, file: str, damage):
    damage(finished / file)
    before = tree(finished)
    words = ("recipe.yaml", "another recipe") if file == "recipe.yaml" else (str(finished / file), "corrupt")
    line = refused("run", recipe_file, "--output_dir", finished)
    assert any(word in line for word in words), line
    after = tree(finished)
    if file != "recipe.yaml":
        # The copy stands in another place than the run it is a copy of.
        after.pop("recipe.yaml")
        before.pop("recipe.yaml")
    assert after == before


def test_a_damaged_artefact_that_is_deleted_is_made_again(finished: Path, recipe_file: Path):
    cut(finished / "scores.safetensors")
    refused("run", recipe_file, "--output_dir", finished, says=("scores.safetensors: ",))
    (finished / "scores.safetensors").unlink()
    log = succeeds("run", recipe_file, "--output_dir", finished)
    assert skipped(log) == ["label", "partition", "sft", "grpo", "evaluate", "export"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "1"}, "line 1 has no 'id'; label writes"),
        ({"system": 3}, "line 1: system and split are (3, "),
        ({"split": "test"}, "'test'), allowed: 1 or 2, train or held_out"),
    ],
)
def test_labels_edited_by_hand_into_something_else(finished: Path, recipe_file: Path, row: dict, says: str):
    rows = artefacts.read_jsonl(finished / "labels.jsonl")
    rows[0] = row if "prompt" in row else {**rows[0], **row}
    rows_file(finished / "labels.jsonl", rows)
    refused("score", recipe_file, "--output_dir", finished, says=("labels.jsonl: ", says))


@pytest.mark.parametrize("text", ["[]", '{"label": 3}', "null"])
def test_records_that_are_none(finished: Path, recipe_file: Path, text: str):
    (finished / "stages.json").write_text(text)
    refused("run", recipe_file, "--output_dir", finished, says=("stages.json: corrupt",), alone=True)


def test_an_artefact_of_someone_else(finished: Path, recipe_file: Path):
    shutil.copy(finished / "sft" / "adapter_model.safetensors", finished / "scores.safetensors")
    refused("run", recipe_file, "--output_dir", finished, says=("scores.safetensors: not an artefact of lorapar",))


# Output folders


def test_a_folder_of_another_recipe_names_the_first_key_and_update_takes_it_over(finished: Path, recipe_file: Path):
    before = tree(finished)
    command = "run", recipe_file, "--output_dir", finished
    says = "grpo.max_steps was 4, is 3); use another --output_dir, or --update"
    refused(*command, "--grpo.max_steps", "3", says=(says,), alone=True)
    refused(*command, "--partition.theta", "0.5", says=("partition.theta was 0.9, is 0.5",), alone=True)
    refused(*command, "--sft.warmup_steps", "1", says=("sft.warmup_steps was None, is 1",), alone=True)
    refused(*command, "--data.sources", json.dumps([{**SOURCES[0], "size": 50}, SOURCES[1]]),
            says=("data.sources[0].size was 60, is 50",), alone=True)  # fmt: skip
    assert tree(finished) == before
    log = succeeds(*command, "--grpo.max_steps", "3", "--update")
    assert skipped(log) == ["label", "score", "partition", "sft"]
    assert len(artefacts.read_json(finished / "grpo" / "log_history.json")) == 4
    assert skipped(succeeds(*command, "--grpo.max_steps", "3")) == list(records(finished))


def test_a_folder_that_is_not_ours(recipe_file: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    before = tree(tmp_path)
    for extra in ((), ("--update",)):
        refused("run", recipe_file, "--output_dir", tmp_path / "thesis", *extra,
                says=("not empty (chapter1.tex) and holds no recipe.yaml",), alone=True)  # fmt: skip
    for place in ("thesis/chapter1.tex", "thesis/chapter1.tex/run"):
        refused("run", recipe_file, "--output_dir", tmp_path / place, says=("chapter1.tex is a file",), alone=True)
    assert tree(tmp_path) == before
    assert not (tmp_path / "thesis" / "run.log").exists()


def test_a_folder_where_a_run_was_killed_at_its_very_start_is_ours(recipe_file: Path, tmp_path: Path):
    (tmp_path / ".recipe.yaml.x1.tmp").write_text("mod")
    for name in ("run.log", ".run.log.lock"):
        (tmp_path / name).write_text("")
    succeeds("label", recipe_file, "--output_dir", tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_stage_whose_input_is_missing(recipe_file: Path, tmp_path: Path):
    needs = {
        "score": "labels.jsonl",
        "partition": "scores.safetensors",
        "sft": "labels.jsonl",
        "grpo": "labels.jsonl",
        "evaluate": "labels.jsonl",
        "export": "grpo/adapter_model.safetensors",
        "report": "labels.jsonl",
    }
    for stage, file in needs.items():
        says = f"{file}: no such file; run the stage that makes it before {stage}"
        refused(stage, recipe_file, "--output_dir", tmp_path / "run", says=(says,))
    assert not (tmp_path / "run" / "stages.json").exists()


# A full disk


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_when_a_stage_writes(recipe_file: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"
    succeeds("label", recipe_file, "--output_dir", folder)
    before = tree(folder, "stages.json")
    flush = artefacts._flush_to_disk

    def full_for_scores(path: Path) -> None:
        no_space() if "scores" in path.name else flush(path)

    with monkeypatch.context() as patched:
        patched.setattr(artefacts, "_flush_to_disk", full_for_scores)
        says = ("scores.safetensors: the disk is full; free some space and run the same command again",)
        refused("run", recipe_file, "--output_dir", folder, says=says)
    assert done(folder) == ["label"]
    assert {name: tree(folder)[name] for name in before} == before
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", no_space)
        refused("run", recipe_file, "--output_dir", folder, says=(f"{folder}: the disk is full",))
    assert done(folder) == ["label", "score", "partition"]
    assert skipped(succeeds("sft", recipe_file, "--output_dir", folder)) == []
    assert done(folder) == ["label", "score", "partition", "sft"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_moment(recipe_file: Path, finished_run: Path, small_disk: Path):
    folder = small_disk / "run"
    ballast = small_disk / "ballast"
    seen = set()
    # Ever more room, so that the disk is full now in one stage, now within a checkpoint, now in the log.
    for free in (0, 8, 40, 72, 120, 200, 330, 420, 520, 620):
        stats = os.statvfs(small_disk)
        ours = (
            sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        )
        available = stats.f_blocks * stats.f_frsize - ours
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(b"0" * max(available - free * 1024 - 8192, 0))
        before = done(folder) if (folder / "stages.json").exists() else []
        kept = {name: tree(folder)[name] for name in tree(folder) if name in ("labels.jsonl", "scores.safetensors")}
        line = refused("run", recipe_file, "--output_dir", folder, says=("disk is full",))
        seen.add(line)
        now = done(folder) if (folder / "stages.json").exists() else []
        assert now[: len(before)] == before
        assert all(tree(folder)[name] == value for name, value in kept.items())
        if "sft" in now:
            break
    assert len(seen) > 1
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ballast.unlink()
    finished_before = done(folder)
    assert skipped(succeeds("run", recipe_file, "--output_dir", folder)) == finished_before
    one, two = (load_file(f / "grpo" / "adapter_model.safetensors") for f in (folder, finished_run))
    assert all(torch.equal(one[name], two[name]) for name in one)
