"""Evaluation while stage 1 trains: its rows, the loss, the checkpoint that is kept, stopping early, resuming."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import lorapar
import lorapar.training.sft
from lorapar import InputError
from lorapar.adapter.layers import lora_parameters
from lorapar.data.labels import EVAL_ROWS, eval_rows, load_labels, put_aside
from lorapar.data.tokens import encode
from lorapar.memory.needs import Lengths, Row, describe, need
from lorapar.memory.work import sft_work
from lorapar.pipeline.order import stages_of
from lorapar.pipeline.records import fingerprint
from lorapar.recipe.reading import load_recipe, parse
from lorapar.stage import Run
from lorapar.training.best import best_step
from tests.lorapar.driver import recipe_values, records, refused, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_training import ROWS, grpo_config, letters, losses, sft_config
from tests.lorapar.test_watching import LABELLED
from tests.tiny import tiny_model, tiny_tokenizer

EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
REST, ASIDE = eval_rows(LABELLED, [1], 5)


def train(folder, rows=REST, aside=ASIDE, patience=None, resume=False, micro="auto", dropout=0.0, **keys):
    """(model, trainer, trained): a checkpoint and an evaluation at each of four steps."""
    model = lorapar.attach(tiny_model(), config(lora_dropout=dropout), start="twin")
    settings = sft_config(folder, **({**EVALUATING, "save_strategy": "steps"} | keys))
    return model, *lorapar.sft(
        model, tiny_tokenizer(), rows, random_partition(model, 0.4), settings, resume=resume, micro_batch_tokens=micro,
        eval_dataset=aside, early_stopping_patience=patience,
    )  # fmt: skip


def scripted(monkeypatch, given):
    """Have the evaluations find these losses, one after the other."""
    left = list(given)

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": left.pop(0)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(lorapar.training.sft.PartitionedSFTTrainer, "evaluate", evaluate)


def evaluated(trained):
    return {entry["step"]: entry["eval_loss"] for entry in trained.history if "eval_loss" in entry}


def same_as(model, folder):
    saved = load_file(folder / "adapter_model.safetensors")
    return all(torch.equal(p, saved[n.replace(".default.", ".")]) for n, p in lora_parameters(model).items())


# The rows


def test_the_rows_are_train_rows_of_the_stages_systems_by_their_ids():
    assert {(row["system"], row["split"]) for row in ASIDE} == {(1, "train")}
    assert sorted([*REST["id"], *ASIDE["id"]]) == sorted(LABELLED["id"])
    assert sorted(eval_rows(LABELLED.shuffle(seed=3), [1], 5)[1]["id"]) == sorted(ASIDE["id"])
    both = eval_rows(LABELLED, [1, 2], 8)[1]
    assert {row["system"] for row in both} == {1, 2}
    # Beside rows that grpo watches they are others.
    rest, watched = put_aside(LABELLED, [1], 5)
    assert not set(eval_rows(rest, [1], 5)[1]["id"]) & set(watched["id"])
    twice = Dataset.from_list([{**row, "id": f"{i // 2:02}", "split": "train"} for i, row in enumerate(ROWS)])
    rest, aside = eval_rows(twice, [1], 4)
    assert not set(rest["id"]) & set(aside["id"])


@pytest.mark.parametrize(("asked", "count"), [(None, 2), (0.1, 2), (0.5, 10), (0.001, 1), (3, 3), (19, 19)])
def test_how_many_rows(asked, count):
    own = Dataset.from_list([{"id": str(i), "system": 1, "split": "train"} for i in range(20)])
    assert len(eval_rows(own, [1], asked)[1]) == count


def test_no_more_than_some_hundred_unless_asked_for():
    many = Dataset.from_list([{"id": str(i), "system": 1, "split": "train"} for i in range(4000)])
    assert [len(eval_rows(many, [1], asked)[1]) for asked in (None, 0.1, 300)] == [EVAL_ROWS, 400, 300]


def test_too_many_rows_are_refused():
    own = sum(row["system"] == 1 and row["split"] == "train" for row in LABELLED)
    with pytest.raises(InputError, match=rf"sft.eval_rows: got {own}, allowed: at most {own - 1}, since {own} train"):
        eval_rows(LABELLED, [1], own)


# The evaluations


@pytest.mark.parametrize("micro", [None, 24])
def test_the_loss_is_the_models_on_those_rows_alone(tmp_path, micro):
    """Batches of one, so that TRL's mean over batches is the mean over rows."""
    size = 1 if micro is None else len(ASIDE)
    model, trainer, trained = train(tmp_path, micro=micro, per_device_eval_batch_size=size, max_steps=2, save_steps=2,
                                    eval_steps=2)  # fmt: skip
    model.eval()
    each, counts = [], []
    for row in ASIDE:
        ids, n = encode(row, tiny_tokenizer())
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, n - 1 : -1].log_softmax(-1)
        each.append(-log_p.gather(-1, torch.tensor(ids[n:])[:, None]).mean())
        counts.append(len(ids) - n)
    weights = torch.ones(len(counts)) if micro is None else torch.tensor(counts)
    expected = float((torch.stack(each) * weights).sum() / weights.sum())
    assert evaluated(trained) == {2: pytest.approx(expected, rel=1e-5)}
    assert trained.rows == sum(row["system"] == 1 and row["split"] == "train" for row in REST)
    assert sorted(map(len, trainer.eval_dataset["input_ids"])) == sorted(
        len(encode(row, tiny_tokenizer())[0]) for row in ASIDE
    )


def test_training_goes_on_as_if_nothing_had_been_evaluated(tmp_path):
    keys = {"dropout": 0.3, "load_best_model_at_end": False, "max_steps": 2}
    one, _, with_them = train(tmp_path / "a", **keys)
    two, _, without = train(tmp_path / "b", eval_strategy="no", aside=None, **keys)
    assert losses(with_them) == losses(without)
    assert len(evaluated(with_them)) == 2
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(one).values(), lora_parameters(two).values()))


def test_the_best_checkpoint_becomes_the_result(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 1.0, 2.0, 1.0])
    model, _, trained = train(tmp_path)
    assert trained.best == {"step": 2, "of": 4, "eval_loss": 1.0}
    assert same_as(model, tmp_path / "checkpoint-2")
    assert not same_as(model, tmp_path / "checkpoint-4")
    assert trained.verified["moved"] > 0


@pytest.mark.parametrize(
    ("given", "keys", "step"),
    [
        # The best evaluation has no checkpoint: transformers would keep the last, or the first that it saved.
        ([1.0, 4.0, 0.5, 3.0], {"save_steps": 2}, 4),
        ([1.0, 2.0, 2.5, 3.0], {"save_steps": 2}, 2),
        ([1.0, 2.0, 2.5, 3.0], {"save_total_limit": 1}, 1),
        ([2.0, 1.0, 1.5, 3.0], {"save_strategy": "best"}, 2),
        ([float("nan"), 2.0, float("inf"), 3.0], {}, 2),
        (
            [1.0, 2.0],
            {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
            None,
        ),
    ],
)
def test_which_checkpoint_is_kept(tmp_path, monkeypatch, given, keys, step):
    scripted(monkeypatch, given)
    model, trainer, trained = train(tmp_path, **keys)
    assert trained.best["step"] == (step or trainer.state.global_step // 2)
    assert same_as(model, tmp_path / f"checkpoint-{trained.best['step']}")


def test_the_best_step():
    assert best_step({4: 1.0, 2: 1.0, 3: 0.5}, True) == 2
    assert best_step({4: 1.0, 2: 1.0, 3: 1.5}, False) == 2
    assert best_step({1: float("nan")}, False) is None


def test_no_finite_loss_is_an_error(tmp_path, monkeypatch):
    scripted(monkeypatch, [float("nan")] * 4)
    with pytest.raises(InputError, match=r"load_best_model_at_end: none of 4 checkpoints in .* has a finite eval_loss"):
        train(tmp_path)


# Stopping early


def test_training_stops_once_the_loss_no_longer_falls(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0, 1.0, 1.0, 1.0])
    _, trainer, trained = train(tmp_path, patience=2, max_steps=8)
    assert (trainer.state.global_step, trained.best["step"]) == (4, 2)


def test_patience_is_counted_over_resumed_runs(tmp_path, monkeypatch):
    """Also where the run was killed behind the checkpoint that it had stopped at, and where the folder has moved."""
    given = [3.0, 2.0, 2.5, 2.0, 1.0, 1.0]
    scripted(monkeypatch, given)
    first, _, whole = train(tmp_path / "a", patience=2, max_steps=8)
    (tmp_path / "a").rename(tmp_path / "b")
    for left in (4, 3):
        for step in range(left + 1, 9):
            shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}", ignore_errors=True)
        scripted(monkeypatch, given[left:])
        model, trainer, trained = train(tmp_path / "b", patience=2, max_steps=8, resume=True)
        assert (trained.resumed_from, trainer.state.global_step) == (f"checkpoint-{left}", 4)
        assert trained.best == whole.best
        assert all(torch.equal(p, q) for p, q in zip(lora_parameters(first).values(), lora_parameters(model).values()))


def test_a_moved_folder_keeps_its_best_checkpoint(tmp_path, monkeypatch):
    """Beside save_total_limit, which spares the best one only under the path that it was written to."""
    scripted(monkeypatch, [1.0, 2.0])
    train(tmp_path / "a", max_steps=2, save_total_limit=1)
    (tmp_path / "a").rename(tmp_path / "b")
    scripted(monkeypatch, [3.0, 4.0, 5.0])
    _, _, trained = train(tmp_path / "b", save_total_limit=1, resume=True)
    assert trained.best == {"step": 1, "of": 4, "eval_loss": 1.0}


@pytest.mark.parametrize("best", [False, True])
def test_rows_that_fill_no_batch_are_evaluated_all_the_same(tmp_path, best):
    _, trainer, trained = train(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=4, max_steps=1,
                                per_device_eval_batch_size=64, load_best_model_at_end=best)  # fmt: skip
    assert list(evaluated(trained)) == [1]
    assert trainer.args.dataloader_drop_last


def test_train_rows_that_fill_no_batch_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"sft.dataloader_drop_last: got True, .* do not fill one batch of 1000"):
        train(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=1000)


# What does not go together


@pytest.mark.parametrize(
    ("sft", "says"),
    [
        (
            {"load_best_model_at_end": True},
            "sft.load_best_model_at_end: got True, expected false unless sft.eval_strat",
        ),
        ({"early_stopping_patience": 2}, "sft.early_stopping_patience: got 2, expected nothing unless sft.eval_strat"),
        ({"eval_strategy": "steps", "early_stopping_patience": 2}, "nothing unless sft.load_best_model_at_end is true"),
        ({"save_strategy": "best"}, "sft.save_strategy: got 'best'"),
        (
            {**EVALUATING, "eval_steps": 2, "save_steps": 3},
            "sft.save_steps: got 3.*, expected a multiple of sft.eval_steps: 2",
        ),
        ({**EVALUATING, "eval_steps": 0.4, "save_steps": 0.5}, "sft.save_steps: got 0.5, expected a multiple of"),
        ({**EVALUATING, "eval_steps": 0.5, "save_steps": 2}, "sft.save_steps: got 2.*, expected a multiple of"),
        ({**EVALUATING, "save_strategy": "epoch"}, "sft.*strategy"),
        (
            {**EVALUATING, "metric_for_best_model": "accuracy"},
            "sft.metric_for_best_model: got 'accuracy', expected one",
        ),
        ({"eval_rows": 1.5}, "sft.eval_rows: got 1.5, expected a number of rows, or a share below 1"),
        ({"eval_rows": 0}, "sft.eval_rows: got 0, expected more than 0"),
        ({"early_stopping_patience": 0}, "sft.early_stopping_patience: got 0, expected at least 1"),
        ({"eval_strategy": "often"}, "sft.eval_strategy: got 'often', expected no, steps or epoch"),
    ],
)
def test_settings_that_need_others_are_refused_before_any_stage(changed_recipe, tmp_path, sft, says):
    out = tmp_path / "out"
    line = refused("run", changed_recipe(sft=sft), "--output_dir", out, alone=True)
    assert re.search(says, line), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"eval_strategy": "steps"}, "grpo.eval_strategy: got 'steps'"),
        ({"eval_on_start": True}, "grpo.eval_on_start: got True"),
        ({"load_best_model_at_end": True}, "grpo.load_best_model_at_end: got true, expected false"),
    ],
)
def test_stage_2_evaluates_nothing(changed_recipe, tmp_path, keys, says):
    refused("run", changed_recipe(grpo=keys), "--output_dir", tmp_path / "out", says=(says, "watch_rows"), alone=True)
    if "load_best_model_at_end" not in keys:
        model = lorapar.attach(tiny_model(), config(), start="twin")
        with pytest.raises(InputError, match=says):
            lorapar.grpo(
                model, tiny_tokenizer(), ROWS, random_partition(model), grpo_config(tmp_path, **keys), [letters]
            )


def test_rows_must_be_given_to_the_function(tmp_path):
    with pytest.raises(InputError, match="eval_dataset: got no rows, expected those that sft.eval_strategy evaluates"):
        train(tmp_path, aside=None)
    long = Dataset.from_list([{"prompt": "a" * 50, "completion": "b"}])
    with pytest.raises(InputError, match="sft.max_length: got 20, shorter than every row put aside"):
        train(tmp_path, aside=long, max_length=20)


def test_the_word_no_is_not_false():
    """YAML 1.1 reads it so, and transformers has no such strategy."""
    values = recipe_values("model")
    recipe = parse(
        {**values, "sft": {"eval_strategy": False, "save_strategy": False}, "grpo": {"eval_strategy": False}}
    )
    assert recipe.sft.trainer["save_strategy"] == "no"
    assert not recipe.sft.evaluates()


# Through the stages


def test_the_plan_counts_evaluations(changed_recipe):
    """With the memory of their batches, and the tokens that they take."""
    rows = tuple(Row(5, 8, 1, "train") for _ in range(40))
    keys = {"max_steps": 8, "micro_batch_tokens": None, "per_device_train_batch_size": 1}
    given = [
        load_recipe(changed_recipe(sft={**keys, **more}))
        for more in ({}, {**EVALUATING, "eval_steps": 2, "save_steps": 2, "per_device_eval_batch_size": 64})
    ]
    lengths = Lengths(5, 8, "a test", rows)
    plain, evaluating = (need(recipe, lengths, "sft") for recipe in given)
    assert evaluating.activations > 4 * plain.activations
    without, with_them = (sft_work(recipe, lengths, describe(recipe)) for recipe in given)
    assert (without.forward.tokens, with_them.forward.tokens) == (0, 4 * 4 * 8)
    assert with_them.trained == without.trained


def test_a_folder_made_before_these_keys_still_holds(changed_recipe, tiny_folder):
    def of(**keys):
        recipe = load_recipe(changed_recipe(sft=keys))
        stages = {stage.name: stage for stage in stages_of(recipe)}
        label = stages["label"]
        return fingerprint(label, Run(recipe, tiny_folder)), recipe.as_dict()["sft"]

    assert of()[0] == of(**EVALUATING)[0]
    assert of()[1]["eval_rows"] is None


@pytest.mark.slow
def test_a_run_evaluates_and_keeps_its_best(changed_recipe, tmp_path, no_pictures):
    stages = {"stages": ["sft"], "evaluate": {"limit": 1, "max_new_tokens": 1}}
    recipe = changed_recipe(**stages, sft={**EVALUATING, "eval_rows": 6, "early_stopping_patience": 3})
    folder = tmp_path / "run"
    log = succeeds("run", recipe, "--output_dir", folder)
    assert re.search(r"sft: step 4: eval_loss \d", log)
    own = [row for row in load_labels(folder / "labels.jsonl") if row["system"] == 1 and row["split"] == "train"]
    record = records(folder)["sft"]
    assert record["rows"] == len(own) - 6
    history = json.loads((folder / "sft" / "log_history.json").read_text())
    found = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert len(found) == 4
    assert record["best"]["step"] == min(found, key=found.get)
    # Scores are of all rows, with or without an evaluation.
    given = Run(load_recipe(recipe), folder), Run(load_recipe(changed_recipe(**stages)), folder)
    for name in ("label", "score", "partition"):
        one, two = (fingerprint(next(s for s in stages_of(run.recipe) if s.name == name), run) for run in given)
        assert one == two == records(folder)[name]["fingerprint"]
