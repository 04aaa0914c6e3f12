"""System 1's loss watched during stage 2: the rows put aside, the loss, training untouched, the rule, resuming."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file

import lorapar
from lorapar import InputError
from lorapar.adapter.attach import restore_factors
from lorapar.adapter.layers import lora_parameters
from lorapar.data.labels import put_aside
from lorapar.data.tokens import encode
from lorapar.files import read_json, read_jsonl, write_json
from lorapar.pipeline.order import stages_of
from lorapar.pipeline.records import fingerprint
from lorapar.progress import TrainingProgress
from lorapar.recipe.reading import parse
from lorapar.scoring.batches import mean_answer_loss, read_examples
from lorapar.stage import Run
from lorapar.training import watching
from lorapar.training.watching import WATCHED, kept_step
from tests.lorapar.driver import lorapar as lorapar_command
from tests.lorapar.driver import records, refused, skipped, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_training import ROWS, grpo_config, letters
from tests.tiny import tiny_model, tiny_tokenizer

LABELLED = Dataset.from_list(
    [{**row, "id": f"{i:02}", "split": "held_out" if i % 7 == 0 else "train"} for i, row in enumerate(ROWS)]  # type: ignore[dict-item]
)
WATCHED_ROWS = Dataset.from_list(
    [{"prompt": f"say {n} ", "completion": "x" * n, "system": 1} for n in (1, 9, 3, 17, 2, 2, 30, 4, 11, 5)]
)
# Of a run that saves at every step and watches six rows.
WATCHING = {"watch_rows": 6, "watch_rise": 0.1, "save_steps": 1, "learning_rate": 1e-2}


def adapted(dtype=torch.float32, **keys):
    """A model whose adapter does something, with its partition."""
    model = lorapar.attach(tiny_model().to(dtype), config(**keys), start="twin")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model, random_partition(model)


def train(folder, dtype=torch.float32, resume=False, dropout=0.0, watched=WATCHED_ROWS, rise=0.1, **keys):
    """(model, trainer, trained) of four steps of GRPO with a checkpoint after each."""
    model, made = adapted(dtype, lora_dropout=dropout)
    settings = grpo_config(folder, **({"save_strategy": "steps", "save_steps": 1, "max_steps": 4} | keys))
    trainer, trained = lorapar.grpo(
        model, tiny_tokenizer(), ROWS, made, settings, [letters], resume=resume, longest_first=False,
        watched=watched, watch_rise=rise,
    )  # fmt: skip
    return model, trainer, trained


def factors(model):
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(model).items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def scripted(monkeypatch, losses):
    """Have the watched losses be these, one after the other."""
    left = list(losses)
    monkeypatch.setattr(watching, "mean_answer_loss", lambda *_: left.pop(0))


# The rows


def test_the_rows_put_aside_are_of_the_system_and_do_not_depend_on_the_order():
    rest, aside = put_aside(LABELLED, [1], 5)
    assert {(row["system"], row["split"]) for row in aside} == {(1, "train")}  # type: ignore[call-overload]
    assert len(set(aside["id"])) == 5
    assert sorted([*rest["id"], *aside["id"]]) == sorted(LABELLED["id"])
    shuffled = put_aside(LABELLED.shuffle(seed=3), [1], 5)
    assert sorted(shuffled[1]["id"]) == sorted(aside["id"])
    # More rows are these and others; the other system's are its own.
    assert set(put_aside(LABELLED, [1], 8)[1]["id"]) > set(aside["id"])
    assert not set(put_aside(LABELLED, [2], 5)[1]["id"]) & set(aside["id"])
    assert list(rest["id"]) == [name for name in LABELLED["id"] if name not in aside["id"]]


def test_rows_of_one_id_stay_together():
    twice = Dataset.from_list([{**row, "id": f"{i // 2:02}", "split": "train"} for i, row in enumerate(ROWS)])  # type: ignore[dict-item]
    rest, aside = put_aside(twice, [1], 4)
    assert not set(rest["id"]) & set(aside["id"])
    held_out = twice.select(range(2)).remove_columns("split").add_column("split", ["held_out"] * 2)  # type: ignore[call-arg]
    _, aside = put_aside(concatenate_datasets([twice, held_out]), [1], 20)
    assert set(aside["split"]) == {"train"}


def test_too_few_rows_are_refused():
    own = sum(row["system"] == 2 and row["split"] == "train" for row in LABELLED)  # type: ignore[call-overload]
    assert len(put_aside(LABELLED, [2], own - 1)[1]) == own - 1
    with pytest.raises(InputError, match=f"grpo.watch_rows: got {own}, allowed: at most {own - 1}, since {own} train"):
        put_aside(LABELLED, [2], own)


# The loss


def oracle(model, rows, wide):
    """The mean over all answer tokens, a row at a time, in float64 from the logits on; `wide`: before them too."""
    model = model.double() if wide else model
    losses = []
    for row in rows:
        ids, prompt = encode(row, tiny_tokenizer())
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].double()
        losses.append(-logits.log_softmax(-1).gather(-1, torch.tensor(ids[prompt:])[:, None])[:, 0])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loss_is_that_of_float64(dtype, bound, batch):
    model, _ = adapted(dtype, lora_dropout=0.5)
    model.train()
    examples = read_examples(WATCHED_ROWS, tiny_tokenizer(), None)  # type: ignore[arg-type]
    found, modes = mean_answer_loss(model, examples, batch), {module.training for module in model.modules()}
    assert modes == {True}
    model.eval()
    assert found == pytest.approx(oracle(model, WATCHED_ROWS, dtype == torch.float32), rel=bound)


def test_grpo_watches_the_loss_of_the_model_as_it_is_then(tmp_path):
    """Not of the tempered distribution that rollouts are drawn from, nor of the reference."""
    model, _, trained = train(tmp_path, rise=0.0, temperature=0.7, beta=0.04, max_steps=2)
    losses = {int(step): loss for step, loss in trained.watched["losses"].items()}
    start, _ = adapted()
    assert losses.keys() == {0, 1, 2}
    assert losses[0] == pytest.approx(oracle(start.eval(), WATCHED_ROWS, True), rel=1e-6)
    for step in (1, 2):
        restore_factors(model, tmp_path / f"checkpoint-{step}")
        assert losses[step] == pytest.approx(oracle(model.float().eval(), WATCHED_ROWS, False), rel=1e-5)
    logged = {entry["step"]: entry["system1_loss"] for entry in trained.history if "system1_loss" in entry}
    assert logged == losses


# Training


def told(trained):
    """The log without what is watched, and without times."""
    timed = "runtime", "per_second", "step_time", "profiling"
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trained.history
        if "system1_loss" not in entry
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_bit_of_training(tmp_path, dtype):
    """With dropout, a reference adapter, and a log over two steps that a checkpoint falls in the middle of."""
    keys = dict(dropout=0.3, beta=0.04, logging_steps=2, num_iterations=2)
    model, _, trained = train(tmp_path / "watched", dtype, rise=100.0, **keys)
    other, _, unwatched = train(tmp_path / "not", dtype, watched=None, **keys)
    assert told(trained) == told(unwatched)
    assert any("reward" in entry for entry in told(trained))
    assert trained.watched["kept"] == 4
    assert same(factors(model), factors(other))
    assert unwatched.watched is None
    assert not (tmp_path / "not" / WATCHED).exists()
    for step in (1, 3):
        one, two = (torch.load(tmp_path / f / f"checkpoint-{step}" / "rng_state.pth", weights_only=False)
                    for f in ("watched", "not"))  # fmt: skip
        assert torch.equal(one["cpu"], two["cpu"])


# The rule


@pytest.mark.parametrize(
    ("losses", "rise", "kept"),
    [
        ([1.0, 0.9, 0.95, 1.2], 0.0, (2, True)),
        ([1.0, 0.9, 0.95, 1.2], 0.5, (3, True)),
        ([1.0, 1.05, 1.3, 1.1], 0.1, (3, True)),
        ([0.5, 0.9, 0.7, 1.2], 0.1, (2, False)),
        ([0.5, 0.9, 0.9, float("nan")], 0.1, (1, False)),
        ([0.5, float("nan"), 0.9, 1.0], 0.1, (2, False)),
        ([float("nan"), 2.0, 1.0, 3.0], 100.0, (2, False)),
    ],
)
def test_the_rule(losses, rise, kept):
    assert kept_step(dict(enumerate(losses)), rise) == kept


@pytest.mark.parametrize(
    ("losses", "kept", "warns"), [([1.0, 1.0, 0.9, 1.11, 1.2], 2, False), ([1.0, 1.5, 1.4, 1.2, 1.6], 3, True)]
)
def test_the_checkpoint_that_the_rule_keeps_is_what_the_model_ends_as(
    tmp_path, monkeypatch, caplog, losses, kept, warns
):
    scripted(monkeypatch, losses)
    with caplog.at_level("INFO", "lorapar"):
        model, _, trained = train(tmp_path, beta=0.04)
    assert trained.watched == {
        "system": 1, "rows": 10, "rise": 0.1, "losses": {str(i): x for i, x in enumerate(losses)}, "kept": kept,
    }  # fmt: skip
    assert read_json(tmp_path / WATCHED).items() > trained.watched.items()
    saved = load_file(tmp_path / f"checkpoint-{kept}" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    now = {name.replace(".default.", "."): factor for name, factor in factors(model).items()}
    assert same(now, saved)
    assert not same(now, last)
    assert trained.verified["moved"] > 0
    (line,) = [record for record in caplog.records if "is kept" in record.message]
    assert f"grpo: step {kept} is kept" in line.message
    assert (line.levelname == "WARNING") == warns
    assert "grpo: step 0: System 1's loss is 1.0000 on 10 rows put aside" in caplog.text


def test_what_is_put_back_is_verified(tmp_path, monkeypatch):
    from lorapar.adapter.proof import FrozenElementsChanged

    scripted(monkeypatch, [1.0, 0.9, 2.0, 2.0, 2.0])

    def another(model, folder):
        restore_factors(model, folder)
        next(iter(lora_parameters(model).values())).data.add_(1.0)

    monkeypatch.setattr(watching, "restore_factors", another)
    with pytest.raises(FrozenElementsChanged, match="inactive elements"):
        train(tmp_path)


# Resuming


@pytest.mark.parametrize("losses", [[1.0, 0.9, 1.2, 1.0, 1.3], [1.0, 0.9, 1.2, 1.3, 1.3]])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, losses):
    """Killed after the third step's loss was noted and before its checkpoint was whole; kept is a later or an earlier
    step than the kill's."""
    scripted(monkeypatch, losses)
    whole, _, expected = train(tmp_path / "whole", beta=0.04)
    for step in (1, 2):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    left = read_json(tmp_path / "whole" / WATCHED)
    del left["kept"], left["losses"]["4"]
    write_json(tmp_path / "cut" / WATCHED, left)
    scripted(monkeypatch, losses[3:])
    again, _, trained = train(tmp_path / "cut", beta=0.04, resume=True)
    assert trained.resumed_from == "checkpoint-2"
    assert trained.watched == expected.watched
    assert trained.watched["kept"] in (1, 3)
    assert same(factors(again), factors(whole))
    assert told(trained)[:-1] == told(expected)[:-1]
    logs = [[e for e in t.history if "system1_loss" in e] for t in (trained, expected)]
    assert logs[0] == logs[1]
    assert [e["system1_loss"] for e in logs[0]] == losses


def test_a_stage_that_had_ended_keeps_the_same_step_again(tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0, 1.0, 0.9, 1.2, 1.2])
    whole, _, expected = train(tmp_path)
    again, _, trained = train(tmp_path, resume=True)
    assert trained.resumed_from == "checkpoint-4"
    assert trained.watched == expected.watched
    assert same(factors(again), factors(whole))


def test_losses_on_file_count_only_whole_with_their_start_and_of_the_same_rows(tmp_path):
    examples = read_examples(WATCHED_ROWS, tiny_tokenizer(), None)  # type: ignore[arg-type]
    watch = watching.LossWatch(tmp_path, examples, 1, 0.1)
    path = tmp_path / WATCHED
    assert watch.recorded() == {}
    watch.losses = {0: 1.0, 2: 0.5}
    watch._write(SimpleNamespace(is_world_process_zero=lambda: True))
    whole = path.read_text()
    assert watch.recorded() == {0: 1.0, 2: 0.5}
    for step, taken in ((2, {0: 1.0, 2: 0.5}), (1, {0: 1.0}), (None, {})):
        watch.go_on_from(step)
        assert watch.losses == taken
    assert watching.LossWatch(tmp_path, examples[:9], 1, 0.1).recorded() == {}
    for text in (whole[:50], "[]", "{}", whole.replace('"0"', '"1"'), whole.replace("0.5", '"x"')):
        path.write_text(text)
        assert watch.recorded() == {}, text


def test_a_checkpoint_without_its_loss_is_passed_over(tmp_path, caplog):
    _, _, expected = train(tmp_path, max_steps=2)
    left = read_json(tmp_path / WATCHED)
    del left["losses"]["2"]
    write_json(tmp_path / WATCHED, left)
    with caplog.at_level("INFO", "lorapar"):
        _, _, trained = train(tmp_path, resume=True, max_steps=2)
    assert trained.resumed_from == "checkpoint-1"
    assert "checkpoint-2: its loss is not in watched.json, passed over" in caplog.text
    assert trained.watched == expected.watched


def test_a_kept_checkpoint_that_is_gone_is_named(tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0, 0.9, 1.2])
    real = watching.kept_step

    def after_it_went(losses, rise):
        (tmp_path / "checkpoint-1" / "adapter_model.safetensors").unlink()
        return real(losses, rise)

    monkeypatch.setattr(watching, "kept_step", after_it_went)
    with pytest.raises(InputError, match=r"checkpoint-1: adapter_model.safetensors is missing"):
        train(tmp_path, max_steps=2)


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"watch_rows": -1}, "grpo.watch_rows: got -1, expected at least 0"),
        ({"watch_rise": -0.1}, "grpo.watch_rise: got -0.1, expected 0 to 100"),
        ({"watch_rise": float("inf")}, "grpo.watch_rise: got inf, expected 0 to 100"),
        ({"systems": [1, 2]}, "grpo.watch_rows: got 6, expected 0 unless stages is [sft, grpo]"),
        ({"systems": [1]}, "grpo.watch_rows: got 6, expected 0 unless stages is [sft, grpo]"),
        ({"save_strategy": "no"}, "grpo.save_strategy: got 'no', expected steps or epoch beside grpo.watch_rows"),
        ({"save_total_limit": 2}, "grpo.save_total_limit: got 2, expected null beside grpo.watch_rows"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
            "grpo.eval_strategy: got 'steps'",
        ),
    ],
)
def test_refused_before_any_work(changed_recipe, tmp_path, changes, says):
    folder = tmp_path / "run"
    refused("run", changed_recipe(grpo=WATCHING | changes), "--output_dir", folder, says=(says,), alone=True)
    assert not folder.exists()


@pytest.mark.parametrize("stages", [["grpo", "sft"], ["grpo"], ["sft"]])
def test_nothing_to_watch_is_refused(changed_recipe, tmp_path, stages):
    says = "grpo.watch_rows: got 6, expected 0 unless stages is [sft, grpo] and sft trains on a system that"
    refused("run", changed_recipe(grpo=WATCHING, stages=stages), "--output_dir", tmp_path / "run", says=(says,))


def test_more_rows_than_there_are_is_refused_by_label(changed_recipe, tmp_path):
    recipe = changed_recipe(grpo=WATCHING | {"watch_rows": 47})
    says = "grpo.watch_rows: got 47, allowed: at most 46, since 47 train rows are labelled System 1"
    refused("label", recipe, "--output_dir", tmp_path / "run", says=(says,))
    assert not (tmp_path / "run" / "labels.jsonl").exists()


def test_what_the_function_refuses(tmp_path):
    with pytest.raises(InputError, match="watched: got 'no rows', expected at least one row, or None"):
        train(tmp_path, watched=WATCHED_ROWS.select([]))
    with pytest.raises(InputError, match="watch_rise: got -1.0, expected 0 to 100"):
        train(tmp_path, rise=-1.0)
    with pytest.raises(InputError, match="grpo.save_strategy: got 'no'"):
        train(tmp_path, save_strategy="no")
    model, made = adapted()
    with pytest.raises(InputError, match=r"systems: got \[1, 2\], expected one system beside watched rows"):
        lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, save_strategy="steps"), [letters],
                     systems=[1, 2], watched=WATCHED_ROWS)  # fmt: skip
    outside = Dataset.from_list([{"input_ids": [3, 900], "labels": [-100, 900]}])
    with pytest.raises(InputError, match="row 0: the token .*900.* is none of the model's 258"):
        train(tmp_path, watched=outside)


@pytest.mark.parametrize(("sft", "grpo", "system"), [([1], [2], 1), ([2], [1], 2), ([1, 2], [2], 1), ([1, 2], [1], 2)])
def test_what_is_watched_is_the_system_that_sft_trains_and_grpo_does_not(sft, grpo, system):
    values = {"model": "m", "data": {"sources": ["d"]}, "sft": {"systems": sft}}
    assert parse({**values, "grpo": {"systems": grpo, "watch_rows": 1}}).watched_system() == system
    assert parse({**values, "grpo": {"systems": grpo}}).watched_system() is None


# A whole run

# The first digits of the fingerprints that version 0.1.0 of 27 November 2026 gave, before there was anything to watch.
EARLIER = {
    "label": "7de94ed246cc",
    "score": "8eca8b419635",
    "partition": "dfcd1d76d420",
    "sft": "d40e17ca5b04",
    "grpo": "df7e3a7e3881",
    "evaluate": "061a9fcb97e8",
    "export": "55eb1438dbdb",
    "report": "6e5752f3341c",
}


def fingerprints(folder: Path, **sections) -> dict[str, str]:
    recipe = parse({"model": "some/model", "data": {"sources": ["some/data"]}, "output_dir": str(folder), **sections})
    run, found = Run(recipe, folder), {}
    for stage in stages_of(recipe):
        for name in stage.reads:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        found[stage.name] = fingerprint(stage, run)[:12]
    return found


def test_folders_of_earlier_versions_still_hold(tmp_path):
    assert fingerprints(tmp_path) == EARLIER
    assert fingerprints(tmp_path, grpo={"watch_rows": 0, "watch_rise": 0.5}) == EARLIER


def test_whoever_uses_other_rows_is_done_again(tmp_path):
    def changed(**grpo):
        found = fingerprints(tmp_path, grpo=grpo)
        return {name for name in EARLIER if found[name] != EARLIER[name]}

    assert changed(watch_rows=6) == {"score", "sft", "grpo"}
    six, seven, wider = (fingerprints(tmp_path, grpo=keys) for keys in (
        {"watch_rows": 6}, {"watch_rows": 7}, {"watch_rows": 6, "watch_rise": 0.5}))  # fmt: skip
    assert {name for name in six if six[name] != seven[name]} == {"score", "sft", "grpo"}
    assert {name for name in six if six[name] != wider[name]} == {"grpo"}
    # Where nothing is scored, no row is.
    alone = [fingerprints(tmp_path, partition={"selection": "all"}, grpo=keys) for keys in ({}, {"watch_rows": 6})]
    assert {name for name in alone[0] if alone[0][name] != alone[1][name]} == {"sft", "grpo"}


def test_a_run_that_watches(changed_recipe, finished, finished_run, monkeypatch):
    """Turned on in a folder that was finished without it, stopped in stage 2, gone on with, and turned off again."""
    recipe = changed_recipe(grpo=WATCHING | {"watch_rise": 0.0}, score={"examples": None})
    seen: dict[str, set[str]] = {}

    def note(module, name):
        real = getattr(module, name)

        def noted(*arguments, **keys):
            ids = {row["id"] for value in arguments if isinstance(value, Dataset) for row in value}  # type: ignore[call-overload]
            seen[name] = seen.get(name, set()) | ids
            return real(*arguments, **keys)

        monkeypatch.setattr(module, name, noted)

    note(importlib.import_module("lorapar.scoring.stage"), "score")
    note(importlib.import_module("lorapar.training.sft"), "examples_that_fit")
    note(importlib.import_module("lorapar.training.grpo"), "read_examples")
    words = recipe, "--output_dir", finished, "--update"
    for verb in ("score", "partition", "sft"):
        assert skipped(succeeds(verb, *words)) == []
    labels = read_jsonl(finished / "labels.jsonl")
    assert (finished / "labels.jsonl").read_bytes() == (finished_run / "labels.jsonl").read_bytes()
    own = {row["id"] for row in labels if row["split"] == "train" and row["system"] == 1}

    def stops(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "on_step_end", stops)
        assert lorapar_command("grpo", *words)[0] == 130
    half = read_json(finished / "grpo" / WATCHED)
    assert set(half["losses"]) == {"0", "1", "2"}
    log = succeeds("grpo", *words)
    assert records(finished)["grpo"]["resumed_from"] == "checkpoint-2"
    assert "grpo: step 0" not in log
    aside = seen["read_examples"]
    assert len(aside) == 6
    assert aside < own
    assert seen["examples_that_fit"] == own - aside
    assert not seen["score"] & aside
    assert seen["score"] > own - aside
    assert records(finished)["sft"]["rows"] == len(own) - 6
    made = records(finished)["grpo"]["watched"]
    assert half["losses"].items() < made["losses"].items()
    assert made.items() >= {"system": 1, "rows": 6, "rise": 0.0}.items()
    assert made["kept"] == kept_step({int(step): loss for step, loss in made["losses"].items()}, 0.0)[0]
    kept, saved = (
        load_file(finished / "grpo" / folder / "adapter_model.safetensors")
        for folder in (f"checkpoint-{made['kept']}", ".")
    )
    assert same(kept, saved)
    assert skipped(succeeds("grpo", *words)) == ["grpo"]
    # Off again: the losses go with the checkpoints.
    succeeds("grpo", *words, "--grpo.watch_rows", "0")
    assert not (finished / "grpo" / WATCHED).exists()
    assert "watched" not in records(finished)["grpo"]
    assert not any("system1_loss" in entry for entry in read_json(finished / "grpo" / "log_history.json"))
