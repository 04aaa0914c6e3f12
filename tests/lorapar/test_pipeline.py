"""The order of the stages, what each depends on, and the controls of a recipe, each run end to end."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorapar
from lorapar import Partition, load_recipe
from lorapar.files import read_json, read_jsonl
from lorapar.pipeline.order import stages_of

from .driver import records, skipped, succeeds, tree, write_recipe
from .test_bad_input import rows_file, sums

Change = Callable[..., Path]
ORDER = ["label", "score", "partition", "sft", "grpo", "evaluate", "export", "report"]
GROUPS = ("all", "system1", "system2")


def test_a_run_writes_every_artefact_of_the_contract(finished_run: Path, tiny_folder: Path):
    files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*")}
    assert files >= {
        "recipe.yaml", "labels.jsonl", "scores.safetensors", "partition.safetensors", "metrics.json", "report.html",
        "run.log", "stages.json", "answers.jsonl",
        *(f"{folder}/{file}" for folder in ("start", "sft", "grpo", "adapter")
          for file in ("adapter_config.json", "adapter_model.safetensors", "lorapar.json")),
        *(f"{stage}/log_history.json" for stage in ("sft", "grpo")),
        *(f"{stage}/lorapar_partition.safetensors" for stage in ("sft", "grpo")),
        *(f"{stage}/checkpoint-4/lorapar_partition.safetensors" for stage in ("sft", "grpo")),
    }  # fmt: skip
    metrics = read_json(finished_run / "metrics.json")
    for name in ("base", "sft", "grpo"):
        for group in GROUPS:
            low, high = metrics["interval"][name][group]
            assert 0 <= low <= metrics["accuracy"][name][group] <= high <= 1
    assert metrics["n"] == {"all": 12, "system1": 6, "system2": 6}
    assert set(metrics["seconds"]) == set(metrics["peak_memory_bytes"]) == set(ORDER) - {"report"}
    assert all(value > 0 for value in metrics["peak_memory_bytes"].values())
    active = {stage: records(finished_run)[stage]["active"] for stage in ("sft", "grpo")}
    assert metrics["optimizer_state_bytes"] == {stage: 8 * count for stage, count in active.items()}
    assert set(metrics["partition"]["fraction"]) == {"s1_only", "s2_only", "shared", "active_sft", "active_grpo"}
    base = read_json(finished_run / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base) == tiny_folder
    assert load_recipe(finished_run / "recipe.yaml").output_dir == str(finished_run)


def test_held_out_rows_are_never_trained_on_and_stages_see_their_own_system(finished_run: Path):
    labels = read_jsonl(finished_run / "labels.jsonl")
    made = records(finished_run)
    for stage, system in (("sft", 1), ("grpo", 2)):
        own = [row for row in labels if row["split"] == "train" and row["system"] == system]
        assert made[stage]["rows"] == len(own) > 0
    asked = {row["id"] for row in read_jsonl(finished_run / "answers.jsonl")}
    assert asked == {row["id"] for row in labels if row["split"] == "held_out"}


def test_the_python_function_is_the_command(recipe_file: Path, finished: Path):
    recipe = load_recipe(recipe_file, [("output_dir", str(finished))])
    assert lorapar.run(recipe) == finished
    with pytest.raises(lorapar.InputError, match="grpo is not one of this recipe's stages"):
        lorapar.run(load_recipe(recipe_file, [("stages", "[sft]"), ("output_dir", str(finished))]), only="grpo")


# What follows from what


def rerun(finished: Path, recipe: Path, *words: str) -> list[str]:
    """The stages that were done again."""
    log = succeeds("run", recipe, "--output_dir", finished, "--update", *words)
    return [line.split(": ")[1] for line in log.splitlines() if line.endswith(": started")]


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (("--evaluate.limit", "3"), ["evaluate", "report"]),
        (("--export.merged", "true"), ["export", "report"]),
        (("--grpo.beta", "0.0"), ["grpo", "evaluate", "export", "report"]),
        (("--lora.lora_dropout", "0.1"), ["score", "sft", "grpo", "evaluate", "export", "report"]),
        (("--lora.lora_alpha", "16"), ["score", "partition", "sft", "grpo", "evaluate", "export", "report"]),
        (("--partition.theta", "0.5"), ["partition", "sft", "grpo", "evaluate", "export", "report"]),
        # A later stage less: what is kept is not trained again.
        (("--stages", "[sft]"), ["evaluate", "export", "report"]),
    ],
)
def test_update_redoes_what_a_change_touches(finished: Path, recipe_file: Path, words, again, no_pictures):
    assert rerun(finished, recipe_file, *words) == again
    assert rerun(finished, recipe_file, *words) == []


def test_a_merged_model_with_a_file_missing_or_cut_short_is_made_again(finished: Path, recipe_file: Path, no_pictures):
    merged = "--export.merged", "true"
    assert rerun(finished, recipe_file, *merged) == ["export", "report"]
    for name in ("model.safetensors", "tokenizer.json"):
        file = finished / "merged" / name
        whole = file.read_bytes()
        for size in (len(whole) - 1, None):
            file.unlink() if size is None else os.truncate(file, size)
            assert rerun(finished, recipe_file, *merged) == ["export", "report"]
            assert file.read_bytes() == whole
    assert rerun(finished, recipe_file, *merged) == []


@pytest.mark.slow
def test_a_changed_data_file_reruns_label_and_what_its_rows_reach(changed_recipe: Change, tmp_path: Path, no_pictures):
    rows = [*sums(30), *sums(30, 3)]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    recipe = changed_recipe(data={"sources": [str(path)], "held_out": 8, "seed": 1})
    folder = tmp_path / "run"
    succeeds("run", recipe, "--output_dir", folder)
    before = tree(folder)
    path.touch()
    assert rerun(folder, recipe) == []
    # The same rows in another spelling: label runs, and writes the same.
    path.write_text("".join(json.dumps(row, indent=None, separators=(",", ":")) + "\n" for row in rows))
    assert rerun(folder, recipe) == ["label", "report"]
    assert tree(folder)["labels.jsonl"][1] == before["labels.jsonl"][1]
    assert tree(folder)["sft/adapter_model.safetensors"] == before["sft/adapter_model.safetensors"]
    rows_file(path, [*rows, *sums(8, 1, 50), *sums(8, 3, 50)])
    assert rerun(folder, recipe)[:2] == ["label", "score"]
    assert len(read_jsonl(folder / "labels.jsonl")) == 76


def test_another_model_in_the_same_place_reruns_the_run(finished: Path, changed_recipe: Change, tiny_folder: Path):
    weights = tiny_folder / "model.safetensors"
    before = weights.stat()
    try:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
        log = succeeds("label", changed_recipe(), "--output_dir", finished)
        assert skipped(log) == []
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_stage_verbs_alone_make_what_the_run_makes(recipe_file: Path, finished_run: Path, tmp_path: Path, no_pictures):
    folder = tmp_path / "run"
    for number, stage in enumerate(ORDER, start=1):
        log = succeeds(stage, recipe_file, "--output_dir", folder)
        assert skipped(log) == []
        assert list(records(folder)) == ORDER[:number]
        assert skipped(succeeds(stage, recipe_file, "--output_dir", folder)) == [stage]
    for name in ("labels.jsonl", "scores.safetensors", "partition.safetensors", "answers.jsonl"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes()
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, finished_run))
    assert all(torch.equal(one[name], two[name]) for name in one)


# Controls


def control(changed_recipe: Change, tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "run"
    succeeds("run", changed_recipe(**changes), "--output_dir", folder)
    assert_loads_with_plain_peft(folder)
    return folder


def assert_loads_with_plain_peft(folder: Path) -> None:
    config = read_json(folder / "adapter" / "adapter_config.json")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    tokens = torch.arange(20).view(2, 10) + 40
    with torch.no_grad():
        before = base(tokens).logits
        model = PeftModel.from_pretrained(base, folder / "adapter")
        assert not torch.equal(model(tokens).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, before)


def share(folder: Path, stage: str) -> float:
    return read_json(folder / "metrics.json")["partition"]["fraction"][f"active_{stage}"]


def test_control_random_partition_has_the_same_shares(
    changed_recipe: Change, tmp_path: Path, finished_run, no_pictures
):
    folder = control(changed_recipe, tmp_path, partition={"selection": "random"})
    for stage in ("sft", "grpo"):
        assert share(folder, stage) == share(finished_run, stage)
    one, two = (Partition.load(f / "partition.safetensors").active("sft") for f in (folder, finished_run))
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("start", ["twin", "peft"])
def test_control_no_partition_is_plain_lora(start: str, changed_recipe: Change, tmp_path: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, partition={"selection": "all"}, start=start)
    assert share(folder, "sft") == share(folder, "grpo") == 1.0
    assert not (folder / "scores.safetensors").exists()
    moved = records(folder)["sft"]
    # Of a twin's rank 2r the r trainable rows; B = 0 of PEFT's own start trains whole.
    assert moved["active"] == moved["elements"] // (2 if start == "twin" else 1)
    assert read_json(folder / "adapter" / "adapter_config.json")["r"] == (8 if start == "twin" else 4)


@pytest.mark.parametrize("stages", [["grpo", "sft"], ["sft"], ["grpo"]])
def test_control_stage_order_and_one_stage_only(stages: list, changed_recipe: Change, tmp_path: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, stages=stages)
    metrics = read_json(folder / "metrics.json")
    assert list(metrics["accuracy"]) == ["base", *stages]
    assert set(metrics["optimizer_state_bytes"]) == set(stages)
    final = load_file(folder / stages[-1] / "adapter_model.safetensors")
    exported = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], exported[name]) for name in exported)
    assert {path.name for path in folder.iterdir() if path.name in ("sft", "grpo")} == set(stages)


@pytest.mark.parametrize("granularity", ["tile", "rank"])
def test_control_granularity(granularity: str, changed_recipe: Change, tmp_path: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, partition={"granularity": granularity, "theta": 0.5})
    masks = Partition.load(folder / "partition.safetensors").kept(1)
    assert 0 < sum(int(mask.sum()) for mask in masks.values()) < sum(mask.numel() for mask in masks.values())
    for name, mask in masks.items():
        if granularity == "rank" and ".lora_A." in name:
            slices = mask[:4].all(1)
            assert torch.equal(mask[:4].any(1), slices)
            assert torch.equal(masks[name.replace("lora_A", "lora_B")][:, :4].all(0), slices)


@pytest.mark.parametrize("start", ["paper", "pissa", "olora"])
def test_control_start(start: str, changed_recipe: Change, tmp_path: Path, finished_run: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, start=start)
    base, sft = (read_json(folder / "metrics.json")["accuracy"][name] for name in ("base", "sft"))
    assert base == read_json(finished_run / "metrics.json")["accuracy"]["base"], "the base is never written"
    assert set(sft) == set(GROUPS)
    assert read_json(folder / "adapter" / "adapter_config.json")["r"] == (4 if start == "paper" else 8)


@pytest.mark.parametrize("method", ["first_order", "random"])
def test_control_score_method(method: str, changed_recipe: Change, tmp_path: Path, finished_run: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, score={"method": method})
    one, two = (load_file(f / "scores.safetensors") for f in (folder, finished_run))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    if method == "random":
        every = [
            torch.cat([t.flatten() for n, t in x.items() if n.startswith("system1/")]).sort()[0] for x in (one, two)
        ]
        assert torch.equal(*every), "the same scores, at other places"


def test_control_seed(changed_recipe: Change, tmp_path: Path, finished_run: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, seed=1)
    assert (folder / "labels.jsonl").read_bytes() == (finished_run / "labels.jsonl").read_bytes()
    for file in ("start/adapter_model.safetensors", "sft/adapter_model.safetensors", "grpo/adapter_model.safetensors"):
        one, two = load_file(folder / file), load_file(finished_run / file)
        assert any(not torch.equal(one[name], two[name]) for name in one), file


def test_control_systems_of_a_stage(changed_recipe: Change, tmp_path: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, sft={"systems": [1, 2]}, grpo={"systems": [1, 2]})
    made = records(folder)
    assert (
        made["sft"]["rows"] == made["grpo"]["rows"] == made["label"]["train_system1"] + made["label"]["train_system2"]
    )
    assert made["sft"]["systems"] == [1, 2]


def test_control_dropout_and_merged_export(changed_recipe: Change, tmp_path: Path, no_pictures):
    folder = control(changed_recipe, tmp_path, lora={"lora_dropout": 0.2}, export={"merged": True})
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged(torch.arange(10).view(1, 10)).logits.isfinite().all()
    assert records(folder)["export"]["merged_logit_difference"] < 1e-3


def test_every_stage_has_a_name_of_its_own_and_reads_what_is_made(recipe_file: Path):
    renewed = ("score.renew", "true")
    for words in ([], [("stages", "[grpo, sft]")], [("stages", "[sft]")], [("partition.selection", "all")],
                  [renewed], [renewed, ("stages", "[grpo, sft]")]):  # fmt: skip
        made: set[str] = set()
        for stage in stages_of(load_recipe(recipe_file, words)):
            assert set(stage.reads) <= made, stage.name
            made |= set(stage.writes)


def test_a_recipe_may_extend_another(recipe_file: Path, tmp_path: Path):
    over = write_recipe(tmp_path / "over.yaml", {"extends": str(recipe_file), "partition": {"theta": 0.7}})
    succeeds("label", over, "--output_dir", tmp_path / "run")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").partition.theta == 0.7
