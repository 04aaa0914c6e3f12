"""What reaches each stage: the rows, one model load, the probe, a reward and a tracker of the user's."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from lorapar import files, load_recipe, stage
from lorapar.adapter.attach import load_adapter
from lorapar.data.answers import is_correct
from lorapar.data.tokens import prompt_ids
from lorapar.evaluating import stage as evaluating
from lorapar.files import read_jsonl
from lorapar.model.generate import answer_greedily
from lorapar.model.load import load_model, load_tokenizer
from lorapar.recipe.sections import ModelConfig
from lorapar.scoring import stage as scoring
from lorapar.training import stage as training
from tests.tiny import tiny_tokenizer

from .driver import records, refused, succeeds
from .test_bad_input import rows_file

Change = Callable[..., Path]


def test_no_held_out_row_is_scored_or_trained_on(recipe_file: Path, tmp_path: Path, monkeypatch):
    """By the rows themselves, as `score` and the two trainers are handed them."""
    progress = importlib.import_module("lorapar.progress")
    scored, trained, score, begin = [], {}, scoring.score, progress.TrainingProgress.on_train_begin

    def watched_score(model, tokenizer, rows, *rest, **options):
        scored.append(set(rows["id"]))
        return score(model, tokenizer, rows, *rest, **options)

    def watched_begin(self, args, state, control, **given):
        rows = given["train_dataloader"].dataset
        texts = rows["prompt"] if self.what == "grpo" else [tiny_tokenizer().decode(ids) for ids in rows["input_ids"]]
        trained[self.what] = list(texts)
        begin(self, args, state, control, **given)

    monkeypatch.setattr(scoring, "score", watched_score)
    monkeypatch.setattr(progress.TrainingProgress, "on_train_begin", watched_begin)
    for verb in ("label", "score", "partition", "sft", "grpo"):
        succeeds(verb, recipe_file, "--output_dir", tmp_path / "run")
    labels = read_jsonl(tmp_path / "run" / "labels.jsonl")

    def of(split: str, system: int) -> list[dict]:
        return [row for row in labels if (row["split"], row["system"]) == (split, system)]

    held_out = [row for system in (1, 2) for row in of("held_out", system)]
    assert len(held_out) == 12
    for system, ids in enumerate(scored, start=1):
        assert len(ids) == 8
        assert ids <= {row["id"] for row in of("train", system)}
    assert sorted(trained["grpo"]) == sorted(row["prompt"] for row in of("train", 2))
    whole = sorted(f"{row['prompt']}{row['completion']}<eos>" for row in of("train", 1))
    assert sorted(trained["sft"]) == whole
    assert not any(text.startswith(row["prompt"]) for row in held_out for text in trained["sft"])


def test_both_systems_are_scored_in_one_model_load(recipe_file: Path, tmp_path: Path, monkeypatch):
    loads, load = [], stage.load_model
    succeeds("label", recipe_file, "--output_dir", tmp_path / "run")
    monkeypatch.setattr(stage, "load_model", lambda *given, **more: loads.append(1) or load(*given, **more))
    succeeds("score", recipe_file, "--output_dir", tmp_path / "run")
    assert loads == [1]


def test_labels_and_tokenizer_are_read_once_a_run(recipe_file: Path, tmp_path: Path, monkeypatch):
    reads, tokenizers, read, load = [], [], files.read_text, AutoTokenizer.from_pretrained
    monkeypatch.setattr(files, "read_text", lambda path: reads.append(Path(path).name) or read(path))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizers.append(1) or load(*a, **k))
    succeeds("run", recipe_file, "--output_dir", tmp_path / "run")
    assert reads.count("labels.jsonl") == 1
    assert tokenizers == [1]


def test_base_and_stages_are_evaluated_in_one_model_load(recipe_file: Path, finished: Path, monkeypatch):
    loads, load, answers = [], stage.load_model, read_jsonl(finished / "answers.jsonl")
    (finished / "answers.jsonl").unlink()
    monkeypatch.setattr(stage, "load_model", lambda *given, **more: loads.append(1) or load(*given, **more))
    succeeds("evaluate", recipe_file, "--output_dir", finished)
    assert loads == [1]
    assert read_jsonl(finished / "answers.jsonl") == answers


def test_each_model_is_evaluated_with_its_own_adapter(recipe_file: Path, finished: Path, monkeypatch):
    """By the logits of one row, against each adapter loaded into a model of its own."""
    seen, evaluate = {}, evaluating.evaluate
    ids = torch.arange(40, 60)[None]

    def watched(model, tokenizer, rows, max_new_tokens, batch_size, description):
        with torch.no_grad():
            seen[description.removeprefix("evaluate ")] = model(ids).logits
        return evaluate(model, tokenizer, rows, max_new_tokens, batch_size, description)

    monkeypatch.setattr(evaluating, "evaluate", watched)
    (finished / "answers.jsonl").unlink()
    succeeds("evaluate", recipe_file, "--output_dir", finished)
    recipe = load_recipe(recipe_file)
    with torch.no_grad():
        for name in ("sft", "grpo"):
            model = load_adapter(load_model(recipe.model), finished / name)
            assert torch.equal(seen[name], model(ids).logits)
        assert torch.equal(seen["base"], load_model(recipe.model)(ids).logits)
    assert not torch.equal(seen["sft"], seen["grpo"])


@pytest.mark.parametrize(("option", "says"), [({"batch_size": 0}, "at least 1, got 0"), ({"size": 1}, "no option")])
def test_a_probe_s_options_are_refused_before_a_model_is_loaded(option, says, changed_recipe: Change, tmp_path: Path,
                                                               monkeypatch):  # fmt: skip
    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    recipe = changed_recipe(label={"voters": [{"name": "probe", **option}]})
    refused("label", recipe, "--output_dir", tmp_path / "run", says=("label.voters: ", says), alone=True)


def test_the_probe_alone_labels_by_what_the_model_gets_right(tiny_folder: Path, changed_recipe: Change, tmp_path: Path):
    config = ModelConfig(str(tiny_folder), dtype="float32", device="cpu")
    model, tokenizer = load_model(config), load_tokenizer(config)
    prompts = [f"What is {i}?" for i in range(40)]
    ids = [prompt_ids({"prompt": prompt}, tokenizer) for prompt in prompts]
    said = answer_greedily(model, tokenizer, ids, 16, 16)
    usable = [(prompt, text) for prompt, text in zip(prompts, said) if is_correct(text, text.strip())][:20]
    assert len(usable) == 20
    rows = [{"prompt": p, "completion": "worked", "answer": text.strip() if i % 2 else "something else"}
            for i, (p, text) in enumerate(usable)]  # fmt: skip
    path = rows_file(tmp_path / "rows.jsonl", rows)
    recipe = changed_recipe(data={"sources": [str(path)], "held_out": 2}, label={"voters": ["probe"]})
    log = succeeds("label", recipe, "--output_dir", tmp_path / "run")
    assert "label: probe: 20/20, " in log
    labels = {row["prompt"]: row for row in read_jsonl(tmp_path / "run" / "labels.jsonl")}
    for i, (prompt, _) in enumerate(usable):
        expected = 1 if i % 2 else 2
        assert (labels[prompt]["system"], labels[prompt]["votes"]) == (expected, {"probe": expected})


def test_a_reward_of_the_user_s_is_handed_the_rows_own_columns(changed_recipe: Change, tmp_path: Path, monkeypatch):
    (tmp_path / "rewards_of_this_run.py").write_text(
        "CALLS = []\n\ndef length(prompts, completions, answer, task, **rest):\n"
        "    CALLS.append((prompts, completions, answer, task, sorted(rest)))\n"
        "    return [float(len(text) % 5) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = changed_recipe(grpo={"rewards": ["rewards_of_this_run:length", "closeness"]}, stages=["grpo"])
    try:
        for verb in ("label", "score", "partition", "grpo"):
            succeeds(verb, recipe, "--output_dir", tmp_path / "run")
        calls = sys.modules["rewards_of_this_run"].CALLS
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["rewards_of_this_run"]
    rows = {row["prompt"]: row for row in read_jsonl(tmp_path / "run" / "labels.jsonl")}
    assert len(calls) == 4
    for prompts, completions, answers, tasks, rest in calls:
        assert len(prompts) == len(completions) == 4
        assert answers == [rows[prompt]["answer"] for prompt in prompts]
        assert set(tasks) == {"chain_sum"}
        assert {"id", "metadata", "source", "system"} <= set(rest)
        assert "completion" not in rest


class Tracker(TrainerCallback):
    """Stands in for a tracker's callback."""

    logged: list[tuple[str, dict]] = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **_):
        self.logged.append((Path(args.output_dir).name, dict(logs or {})))


def test_report_to_is_trl_s(changed_recipe: Change, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Tracker, "logged", [])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["tensorboard"])
    recipe = changed_recipe(sft={"report_to": "tensorboard"}, grpo={"report_to": ["tensorboard"]})
    for verb in ("label", "score", "partition", "sft", "grpo"):
        succeeds(verb, recipe, "--output_dir", tmp_path / "run")
    for trained, key in (("sft", "loss"), ("grpo", "reward")):
        assert sum(key in logs for name, logs in Tracker.logged if name == trained) == 4
    says = "grpo.report_to: 'wandb' is not installed here; allowed: none, all, tensorboard"
    refused("run", changed_recipe(grpo={"report_to": "wandb"}), "--output_dir", tmp_path / "other", says=(says,))


@pytest.mark.parametrize("key", ["seed", "config"])
def test_what_only_reasoning_gym_takes_is_refused_for_a_file(key: str, changed_recipe: Change, tmp_path: Path):
    path = rows_file(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    source = {"name": str(path), key: 3 if key == "seed" else {"split": "test"}}
    says = f"data.sources: {key} of {str(path)!r}: got "
    refused("label", changed_recipe(data={"sources": [source]}), "--output_dir", tmp_path / "run", says=(says,))
    assert records(tmp_path / "run").get("label", {}).get("finished") is None
