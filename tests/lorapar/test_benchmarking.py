"""Benchmarks of lm-evaluation-harness: figures against a hand computation, what is refused, code without network."""

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapar
from lorapar.benchmarking import harness, isolation, tasks
from lorapar.benchmarking import stage as benchmarking
from lorapar.benchmarking.figures import read_figures
from lorapar.errors import InputError, StageFailed
from lorapar.memory.advice import out_of_memory
from lorapar.model.generate import answer_greedily
from lorapar.pipeline.order import stages_of
from lorapar.recipe.reading import load_recipe
from lorapar.reporting.artefacts import Artefacts
from lorapar.reporting.benchmarks import benchmarks
from tests.tiny import tiny_model, tiny_tokenizer

from .driver import lorapar as command
from .driver import refused, skipped, succeeds, tree

MODELS = ("base", "sft", "grpo")
COUNT = 24
NEW = 48  # tokens of an answer; four steps of training do not change the first few


def task_file(folder: Path, name: str, **more: object) -> Path:
    """A task's file that asks the questions of docs.jsonl in its folder."""
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **more,
    }
    return written(folder / f"{name}.yaml", values)


def written(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def group_file(folder: Path, name: str, members: list[Any], **more: object) -> Path:
    """A group's file; a member that is a path is the task of that file, written out."""
    inside = [yaml.safe_load(member.read_text()) if isinstance(member, Path) else member for member in members]
    means = [{"metric": "exact_match", "weight_by_size": True}]
    return written(folder / f"{name}.yaml", {"group": name, "task": inside, "aggregate_metric_list": means, **more})


CHOICE = {
    "output_type": "multiple_choice",
    "generation_kwargs": None,
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def answer_by_hand(model: Any, tokenizer: Any, question: str) -> str:
    ids = tokenizer(question, return_tensors="pt").input_ids
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]


def likelihood_by_hand(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    before, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (question, f"{question} {choice}"))
    with torch.no_grad():
        logs = model(input_ids=whole).logits[0].log_softmax(-1)
    places = range(before.shape[1], whole.shape[1])
    return sum(float(logs[place - 1, whole[0, place]]) for place in places)


@pytest.fixture(scope="session")
def benchmark_files(finished_run: Path, tiny_folder: Path, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder with two tasks, and their figures by hand: {model: (exact match, accuracy)}."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(tiny_folder).eval()}
    for name in ("sft", "grpo"):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        models[name] = PeftModel.from_pretrained(base, str(finished_run / name)).eval()
    docs = []
    for i in range(COUNT):
        question = f"Compute: {i} + {i % 7} ="
        # Each model gives some of the right answers.
        answer = answer_by_hand(models[MODELS[i % 3]], tokenizer, question)
        docs.append({"question": question, "answer": answer, "choices": ["1", "22", "no"], "gold": i % 3})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task_file(folder, "tiny_answers")
    task_file(folder, "tiny_choices", **CHOICE)
    by_hand = {}
    for name, model in models.items():
        exact = [answer_by_hand(model, tokenizer, doc["question"]) == doc["answer"] for doc in docs]
        best = []
        for doc in docs:
            values = [likelihood_by_hand(model, tokenizer, doc["question"], choice) for choice in doc["choices"]]
            best.append(values.index(max(values)) == doc["gold"])
        by_hand[name] = (sum(exact) / COUNT, sum(best) / COUNT)
    return folder, by_hand


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_figures_of_each_model_are_those_computed_by_hand(recipe_file: Path, finished: Path, benchmark_files):
    folder, by_hand = benchmark_files
    words = (recipe_file, "--output_dir", finished)
    listed = ("--tasks", f"{folder / 'tiny_answers.yaml'},{folder / 'tiny_choices.yaml'}")
    before, answers = metrics_of(finished), tree(finished)["answers.jsonl"]
    log = succeeds("evaluate", *words, *listed)
    assert skipped(log) == ["evaluate"]
    after = metrics_of(finished)
    measured = after.pop("tasks")
    for key in ("seconds", "peak_memory_bytes"):
        assert after.pop(key)["benchmark"] > 0
        del before[key]
    assert after == before
    assert tree(finished)["answers.jsonl"] == answers
    for name, key, place in (("tiny_answers", "exact_match,none", 0), ("tiny_choices", "acc,none", 1)):
        assert {k: measured[name][k] for k in ("n", "of", "shots", "version", "chat")} == {
            "n": COUNT, "of": COUNT, "shots": 0, "version": 1.0, "chat": False}  # fmt: skip
        assert measured[name]["lm_eval"] == tasks.lm_eval_version()
        for model in MODELS:
            share = by_hand[model][place]
            assert measured[name][model][key]["value"] == pytest.approx(share), (name, model)
            error = math.sqrt(share * (1 - share) / (COUNT - 1))
            assert measured[name][model][key]["stderr"] == pytest.approx(error), (name, model)
    assert by_hand["base"][0] not in (0, by_hand["grpo"][0])
    # The report that was there has them.
    page = (finished / "report.html").read_text()
    section = page.partition('<section id="benchmarks">')[2].partition("</section>")[0]
    shown = [f"{measured[task][model][key]['value']:.4g}<small>± {measured[task][model][key]['stderr']:.2g}</small>"
             for task, key in (("tiny_answers", "exact_match,none"), ("tiny_choices", "acc,none"))
             for model in MODELS]  # fmt: skip
    assert all(f"<td>{figure}</td>" in section for figure in shown), section
    assert f"Measured by lm-evaluation-harness {tasks.lm_eval_version()} on" in section
    assert skipped(succeeds("evaluate", *words, *listed)) == ["evaluate", "benchmark", "report"]
    # A recipe that names no tasks is not another recipe, and nothing is lost.
    done = succeeds("run", *words)
    assert "started" not in done
    assert metrics_of(finished)["tasks"] == measured


def test_what_has_changed_is_measured_again_and_nothing_else(
    recipe_file: Path, finished: Path, benchmark_files, tmp_path: Path, no_pictures, monkeypatch
):
    words = ("evaluate", recipe_file, "--output_dir", finished)
    (tmp_path / "docs.jsonl").write_bytes((benchmark_files[0] / "docs.jsonl").read_bytes())
    first, second = task_file(tmp_path, "first"), task_file(tmp_path, "second", **CHOICE)
    (finished / "report.html").unlink()
    succeeds(*words, "--tasks", first)
    assert list(metrics_of(finished)["tasks"]) == ["first"]
    assert not (finished / "report.html").exists()
    log = succeeds(*words, "--tasks", second, "--evaluate.task_limit", 5)
    assert skipped(log) == ["evaluate"]
    assert list(metrics_of(finished)["tasks"]) == ["second"]
    assert [metrics_of(finished)["tasks"]["second"][key] for key in ("n", "of")] == [5, COUNT]
    # evaluate writes metrics.json anew, and the benchmarks are still those of these adapters.
    succeeds(*words, "--evaluate.max_new_tokens", 3, "--update")
    assert list(metrics_of(finished)["tasks"]) == ["second"]
    # A data file that has changed; batches do not count.
    listed = ("--tasks", second, "--evaluate.max_new_tokens", 3)
    succeeds(*words, *listed)
    assert skipped(succeeds(*words, *listed, "--evaluate.batch_size", 2)) == ["evaluate", "benchmark"]
    with open(tmp_path / "docs.jsonl", "a") as file:
        file.write(json.dumps({"question": "?", "answer": "!", "choices": ["a", "b"], "gold": 0}) + "\n")
    assert skipped(succeeds(*words, *listed)) == ["evaluate"]
    assert metrics_of(finished)["tasks"]["second"]["n"] == COUNT + 1
    # Another lm_eval.
    with monkeypatch.context() as patch:
        patch.setattr(benchmarking, "lm_eval_version", lambda: "0.4.99")
        assert skipped(succeeds(*words, *listed)) == ["evaluate"]
    assert metrics_of(finished)["tasks"]["second"]["lm_eval"] == "0.4.99"
    # Figures of other adapters are left out.
    kept = json.loads((finished / "tasks.json").read_text())
    kept["adapters"]["grpo"] = "0" * 64
    (finished / "tasks.json").write_text(json.dumps(kept))
    succeeds(*words, "--update")
    assert "tasks" not in metrics_of(finished)
    # `run` asks them in their place.
    log = succeeds("run", *words[1:], "--tasks", first)
    assert log.index("evaluate: done before") < log.index("benchmark: started") < log.index("export: done before")
    assert list(metrics_of(finished)["tasks"]) == ["first"]


def test_whatever_a_task_reads_on_this_machine_counts_as_changed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = '{"question": "?", "answer": "!"}\n'
    for folder in ("data", "files/deep", "common"):
        Path(folder).mkdir(parents=True)
    first, second, deep = Path("data/a.jsonl"), Path("data/b.jsonl"), Path("files/deep/a.jsonl")
    for file in (first, deep):
        file.write_text(rows)
    common = task_file(Path("common"), "base", task=None)
    common.write_text(common.read_text() + "process_results: !function utils.process\n")
    code = Path("common/utils.py")
    code.write_text("def process(doc, results): return {}\n")
    own = Path("own")
    folder = {"dataset_path": "files", "dataset_kwargs": None}
    inside = task_file(own, "inside", **folder)
    cases = [
        (task_file(own, "pattern", dataset_kwargs={"data_files": {"test": ["data/*.jsonl"]}}), second),
        (task_file(own, "folder", **folder), deep),
        (task_file(own, "directory", dataset_kwargs={"data_dir": "files"}), deep),
        (task_file(own, "both", dataset_kwargs={"data_dir": "files", "data_files": "deep/*"}), deep),
        (written(own / "including.yaml", {"task": "including", "include": "../common/base.yaml"}), code),
        (group_file(own, "group", [{"group": "part", "task": [yaml.safe_load(inside.read_text())]}]), deep),
    ]
    for path, file in cases:
        before = tasks.digests([str(path)])
        assert before == tasks.digests([str(path)])
        with open(file, "a") as opened:
            opened.write("\n")
        assert before != tasks.digests([str(path)]), path


def test_a_group_s_file_has_the_tasks_that_are_written_in_it(tmp_path: Path, monkeypatch):
    # No name is to be looked up, and looking for all takes long.
    monkeypatch.setattr(harness, "needs_all", lambda words: False)
    (tmp_path / "docs.jsonl").write_text('{"question": "?", "answer": "yes"}\n{"question": "?", "answer": "no"}\n')
    members = [task_file(tmp_path, name) for name in ("a", "b")]
    path = group_file(tmp_path, "pair", members, metadata={"version": 2})
    loaded = harness.load_tasks([str(path)], None)[str(path)]
    figures = harness.judge(loaded, {"generate_until": ["yes", "yes", "yes", "no"]}, None, 0)
    values = {name: facts["figures"]["exact_match,none"]["value"] for name, facts in figures.items()}
    assert values == {"pair::a": 0.5, "pair::b": 1.0, "pair": 0.75}
    assert (figures["pair"]["subtasks"], figures["pair"]["version"]) == (["pair::a", "pair::b"], "2")
    # As what comes back from a process that is not trusted.
    assert read_figures(json.dumps(figures), figures) == figures


@pytest.mark.slow
def test_a_group_s_file_is_measured(recipe_file: Path, finished: Path, benchmark_files, tmp_path: Path, no_pictures):
    folder, by_hand = benchmark_files
    words = ("evaluate", recipe_file, "--output_dir", finished, "--tasks")
    path = group_file(tmp_path, "ours", [folder / "tiny_answers.yaml"])
    succeeds(*words, path)
    measured = metrics_of(finished)["tasks"]
    assert measured["ours"]["subtasks"] == ["ours::tiny_answers"]
    for name in ("ours", "ours::tiny_answers"):
        for model in MODELS:
            assert measured[name][model]["exact_match,none"]["value"] == pytest.approx(by_hand[model][0])
    wrong = group_file(tmp_path, "wrong", [folder / "tiny_answers.yaml", "gsm8l"])
    refused(*words, wrong, says=("has no task 'gsm8l'; nearest: gsm8k",), alone=True)
    code = group_file(tmp_path, "code", ["gsm8k", "humaneval"])
    refused(*words, code, says=("code.yaml: executes code",), alone=True)


def test_the_stage_is_there_only_where_a_recipe_names_tasks(recipe_file: Path):
    names = [stage.name for stage in stages_of(load_recipe(recipe_file))]
    assert "benchmark" not in names
    named = [stage.name for stage in stages_of(load_recipe(recipe_file, [("evaluate.tasks", "[x]")]))]
    assert named == [*names[: names.index("evaluate") + 1], "benchmark", *names[names.index("evaluate") + 1 :]]


def test_what_cannot_be_measured_is_refused_in_one_line(
    recipe_file: Path, finished: Path, tmp_path: Path, monkeypatch, benchmark_files
):
    before = tree(finished)
    words = ("evaluate", recipe_file, "--output_dir", finished, "--tasks")
    good = benchmark_files[0] / "tiny_answers.yaml"
    gone = tmp_path / "gone.yaml"
    refused(*words, gone, says=(f"evaluate.tasks: {gone}: no such file",), alone=True)
    refused(*words, recipe_file, says=("evaluate.tasks: ", "expected a file of lm-evaluation-harness"), alone=True)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    refused(*words, broken, says=("evaluate.tasks: ", "not a task's file"), alone=True)
    refused(*words, f"{good},{good}", says=("evaluate.tasks: ", "each task once"), alone=True)
    refused(*words, good, "--evaluate.task_chat", "true", says=("evaluate.task_chat: ",), alone=True)
    code = task_file(tmp_path, "runs_code", unsafe_code=True)
    refused(*words, code, says=("runs_code.yaml: executes code", "--run-code", "evaluate.run_code"), alone=True)
    files, directory = {"data_files": {"test": 5}}, {"data_dir": 5}
    for options, at in ((5, ""), (files, ".data_files"), (directory, ".data_dir")):
        wrong = task_file(tmp_path, "wrong", dataset_kwargs=options)
        refused(*words, wrong, says=(f"evaluate.tasks: {wrong}: dataset_kwargs{at}: got 5",), alone=True)
        whole = group_file(tmp_path, "whole", [wrong])
        refused(*words, whole, says=(f"evaluate.tasks: {whole}: dataset_kwargs{at}: got 5",), alone=True)
    empty = group_file(tmp_path, "empty", [])
    refused(*words, empty, says=("expected a file of lm-evaluation-harness with the key task",), alone=True)
    # These evaluate the answer as an expression of Python, and do not say so.
    score = Path(lm_eval.tasks.__file__).parent / "score" / "math" / "prompt_robustness_math_algebra.yaml"
    including = written(tmp_path / "including.yaml", {"task": "including", "include": str(score)})
    refused(*words, including, says=("including.yaml: executes code",), alone=True)
    for version in ("0.4.11", "0.5.0"):
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "lm_eval_version", lambda version=version: version)
            says = f"evaluate.tasks: lm-eval {version} is installed, and benchmarks need 0.4.12 or later, below 0.5"
            refused(*words, good, says=(says,), alone=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        refused(*words, code, "--run-code", says=("evaluate.run_code: darwin cuts no process off",), alone=True)
    with monkeypatch.context() as patch:
        there = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else there(name, *_))
        refused(*words, good, says=("lm-eval, which is not installed; pip install 'lorapar[eval]'",), alone=True)
    assert tree(finished) == before
    # Its data are looked for when the stage begins.
    dataless = task_file(tmp_path, "dataless")
    refused(*words, dataless, says=(f"evaluate.tasks: {dataless}: the task or its data set cannot be loaded",))
    noted = ("recipe.yaml", "stages.json")
    assert tree(finished, *noted) == {name: what for name, what in before.items() if name not in noted}
    # What is not about benchmarks does not look for them.
    assert "done before" in succeeds("export", *words[1:4], "--evaluate.tasks", "[none_such]")


@pytest.mark.slow
def test_a_name_is_looked_up_among_all_tasks(recipe_file: Path, finished: Path):
    words = ("evaluate", recipe_file, "--output_dir", finished, "--tasks")
    refused(*words, "gsm8l", says=("has no task 'gsm8l'; nearest: gsm8k",), alone=True)
    refused(*words, "score_robustness_math", says=("score_robustness_math: executes code",), alone=True)
    refused(*words, "./gsm8k.yml", says=("a task's file ends in .yaml",), alone=True)
    names = "humaneval, mbpp_instruct, humaneval_infilling"
    refused(*words, f"gsm8k,mmlu,{names}", says=(f"evaluate.tasks: {names}: executes code",), alone=True)


def test_a_name_that_is_like_none_does_not_print_them_all(monkeypatch):
    monkeypatch.setattr(tasks, "index", lambda words: {"gsm8k": entry(), "mmlu": entry()})
    with pytest.raises(InputError, match="has no task 'xyzzyqq'; `lm_eval ls tasks` lists them$"):
        tasks.check_tasks(["xyzzyqq"], False)


def test_a_group_s_tasks_and_what_it_sets_for_them_are_looked_at():
    known = {"a": entry(unsafe_code=True), "b": entry(), "tag": entry(None, {"a"}), "g": entry(task=["b", "a"])}
    cases: list[tuple[Any, bool]] = [("a", True), ("b", False), ("tag", True), ("g", True), ({"group": "g"}, True),
             ({"task": "b"}, False), ({"task": "b", "unsafe_code": True}, True),
             ({"group": "new", "task": [{"task": "a"}]}, True)]  # fmt: skip
    for word, executes in cases:
        assert any(map(tasks._executes, tasks._configs(word, known))) is executes, word


def entry(cfg: Any = (), tags: Any = frozenset(), **values: Any) -> Any:
    from lm_eval.tasks._index import Entry, Kind

    return Entry(name="", kind=Kind.TASK, yaml_path=None, cfg=None if cfg is None else values, tags=tags)


def test_a_task_of_its_own_code_that_fails_is_one_line(recipe_file: Path, finished: Path, benchmark_files):
    folder = benchmark_files[0] / "failing"
    path = task_file(folder, "failing", process_results="!function utils.process")
    # safe_dump quotes the tag.
    path.write_text(path.read_text().replace("'!function utils.process'", "!function utils.process"))
    (folder / "docs.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    (folder / "utils.py").write_text("def process(doc, results):\n    return {'exact_match': doc['none_such']}\n")
    code, _, err = command("evaluate", recipe_file, "--output_dir", finished, "--tasks", path)
    assert code == 1
    assert err.splitlines()[-1] == "lorapar: error: benchmark: lm-evaluation-harness failed (KeyError: 'none_such')"
    assert "Traceback" in (finished / "run.log").read_text()


def test_the_task_of_the_page_is_one(tmp_path: Path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    Path("tasks/capitals.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    rows = [{"question": "France?", "answer": "Paris"}, {"question": "Italy?", "answer": "Rome"}]
    Path("tasks/capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = harness.load_tasks(["tasks/capitals.yaml"], None)["tasks/capitals.yaml"]
    figures = harness.judge(loaded, {"generate_until": [" Paris", "Milan"]}, None, 0)["capitals"]["figures"]
    assert figures == {"exact_match,stripped": {"value": 0.5, "stderr": 0.5}}
    shown = json.loads(page.partition("```json\n")[2].partition("```")[0].join("{}").replace("{...}", "{}"))
    right = shown["tasks"]["gsm8k"]["base"]["exact_match,strict-match"]
    assert right["stderr"] == pytest.approx(math.sqrt(right["value"] * (1 - right["value"]) / 199), abs=1e-4)


class Asked(harness.Answered):
    """Says nothing, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked: list[str] = []

    def _said(self, kind: str, requests: Any) -> list[Any]:
        self.asked += [request.args[0] for request in requests]
        return [""] * len(requests)


def test_every_model_is_shown_the_same_worked_examples(tmp_path: Path):
    docs = [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(40)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    more: Any = {"fewshot_split": "test", "fewshot_config": {"sampler": "default"}}
    path = str(task_file(tmp_path, "shown", **more))
    none = str(task_file(tmp_path, "none", num_fewshot=0, **more))

    def asked(seed: int, shots: int | None = 2) -> list[str]:
        loaded = harness.merged(list(harness.load_tasks([path, none], shots).values()))
        both = []
        for _ in range(2):
            model = Asked()
            harness.measure(model, loaded, 3, seed)
            both.append(model.asked)
        assert both[0] == both[1]
        return both[0]

    first = asked(0)
    assert [text.count("A") for text in first] == [2] * 3 + [0] * 3  # a task that says 0 keeps it
    assert asked(0) == first != asked(1)
    assert [text.count("A") for text in asked(0, None)] == [0] * 6


def test_an_answer_ends_at_a_token_that_ends_a_turn_special_or_not():
    model: Any = tiny_model()
    tokenizer = tiny_tokenizer()
    questions = ["Compute: 1 + 1 =", "Compute: 12 + 1 ="]
    ids = tokenizer(questions[0], return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    stop = next(token for token in said[1:] if token != said[0] and token not in tokenizer.all_special_ids)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    rows = [tokenizer(question).input_ids for question in questions]
    expected = answer_greedily(model, tokenizer, rows, 12, 2)
    assert expected[0] == str(tokenizer.decode(said[: said.index(stop)])).strip()
    lm = harness.LoadedModel(model, tokenizer, 2, None, "base", {})
    options = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (question, options), 0) for question in questions]
    assert [text.strip() for text in lm.generate_until(requests)] == expected


def test_batches_of_likelihoods_are_small_enough_and_change_no_figure(benchmark_files, monkeypatch):
    folder, by_hand = benchmark_files
    loaded = harness.merged(list(harness.load_tasks([str(folder / "tiny_choices.yaml")], None).values()))
    sizes: list[int] = []
    model = tiny_model()
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(args[0])), with_kwargs=True)

    def value() -> float:
        sizes.clear()
        lm = harness.LoadedModel(model, tiny_tokenizer(), 16, None, "base", {})
        return harness.measure(lm, loaded, None, 0)["tiny_choices"]["figures"]["acc,none"]["value"]

    assert value() == pytest.approx(by_hand["base"][1])
    assert max(sizes) == 16
    monkeypatch.setattr(harness, "LOGITS", 4 * 258 * 24)
    assert value() == pytest.approx(by_hand["base"][1])
    assert 1 <= max(sizes) <= 4


def test_the_report_shows_a_group_without_its_parts():
    def facts(value: Any, **more: Any) -> dict[str, Any]:
        figure = {"acc,none": {"value": value, "stderr": None}} if value is not None else {}
        return {"n": 4, "of": 9, "shots": 5, "chat": True, "lm_eval": "0.4.13", "higher_is_better": {"acc": True},
                "base": figure, **more}  # fmt: skip

    found = {"whole": facts(0.25, subtasks=["half"]), "half": facts(0.5, subtasks=["leaf"]), "leaf": facts(0.75),
             "list": facts(None, subtasks=["shown"]), "shown": facts(1.0), "<b>": facts(0.125)}  # fmt: skip
    run = Artefacts(Path(), None, metrics={"accuracy": {"base": {}}, "tasks": found})  # type: ignore[arg-type]
    page = benchmarks(run, None)  # type: ignore[arg-type]
    assert [name for name in ("whole", "half", "leaf", "shown") if f"<th>{name}</th>" in page] == ["whole", "shown"]
    assert "<td>0.25</td>" in page
    assert "<td>4<small>of 9, 5-shot, chat</small></td>" in page
    assert "acc ↑" in page
    assert "&lt;b&gt;" in page


def test_running_out_of_memory_names_what_would_need_less():
    assert "a smaller evaluate.batch_size" in out_of_memory("benchmark", None, None)  # type: ignore[arg-type]


def test_help_says_what_the_options_do():
    out = command("evaluate", "--help")[1]
    assert "--tasks NAME,..." in out
    assert "in a process without network" in " ".join(out.split())


# Code that a model writes


def _has_namespaces() -> bool:
    """By util-linux's own command, so that a fault of ours skips nothing."""
    command = shutil.which("unshare")
    return command is not None and subprocess.run([command, "-rn", "true"], capture_output=True).returncode == 0


isolates = pytest.mark.skipif(not _has_namespaces(), reason="this system cuts no process off from the network")
HEAD = """
import json, os, socket, sys, time
from pathlib import Path
from lorapar.benchmarking import isolation
isolation.cut_off(int(sys.argv[1]))
isolation.limit(20)
request, result = Path(sys.argv[2]).read_text(), Path(sys.argv[3])
"""


def isolated(folder: Path, monkeypatch, body: str, request: str = "", seconds: int = 60) -> str:
    (folder / "isolated_code_of_the_test.py").write_text(HEAD + body)
    monkeypatch.syspath_prepend(folder)
    return isolation.run_isolated("isolated_code_of_the_test", request, seconds)


@isolates
def test_an_isolated_process_reaches_nobody_and_knows_no_secret(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    body = f"""
found = {{}}
def tried(name, work):
    try: work()
    except (OSError, ZeroDivisionError) as error: found[name] = type(error).__name__
    else: found[name] = "done"
tried("server", lambda: socket.create_connection(("127.0.0.1", int(request)), timeout=5))
tried("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(request))))
tried("child", lambda: os.system(f"{{sys.executable}} -c 'import socket; "
      f"socket.create_connection((\\"127.0.0.1\\", {{request}}), 5)' 2>/dev/null") and 1 / 0)
tried("parent", lambda: Path("/proc/{os.getpid()}/environ").read_bytes())
tried("namespace", lambda: open("/proc/{os.getpid()}/ns/net"))
tried("signal", lambda: os.kill({os.getpid()}, 0))
found["group"] = [os.getpgrp(), os.getpid()]
# The one that waits for it has its user's number, and is in its user namespace.
of_parent = Path("/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
commands = {{pid: Path("/proc", pid, "cmdline").read_text() for pid in of_parent}}
waiting = [pid for pid in of_parent if str(result) in commands[pid]]
found["waiting"] = len(waiting)
tried("memory", lambda: open(f"/proc/{{waiting[0]}}/mem", "r+b"))
found["secrets"] = [name for name, value in os.environ.items() if "secret" in value]
found["home"] = os.listdir(os.environ["HOME"])
result.write_text(json.dumps(found))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        found = json.loads(isolated(tmp_path, monkeypatch, body, str(port)))
    refusals = {name: found[name] for name in ("server", "datagram", "child", "parent", "namespace", "memory")}
    assert "done" not in refusals.values(), refusals
    assert [refusals[name] for name in ("parent", "namespace", "memory")] == ["PermissionError"] * 3
    assert (found["signal"], found["waiting"]) == ("ProcessLookupError", 1)
    assert found["group"] == [2, 2]
    assert (found["secrets"], found["home"]) == ([], [])


@isolates
def test_a_process_that_still_reaches_its_parent_does_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(globals(), "HEAD", HEAD.replace("isolation.cut", "isolation.CLONE_NEWNET = 0; isolation.cut"))
    done = tmp_path / "done"
    with pytest.raises(
        InputError, match=r"could not be cut off from the network \(127.0.0.1 is reached nevertheless\)"
    ):
        isolated(tmp_path, monkeypatch, f"Path({str(done)!r}).touch()")
    assert not done.exists()


@isolates
def test_an_isolated_process_that_fails_hangs_or_grows_is_one_line(tmp_path: Path, monkeypatch):
    with pytest.raises(StageFailed, match=r"ended with status 1: KeyError: 'x'"):
        isolated(tmp_path, monkeypatch, "{}['x']")
    with pytest.raises(StageFailed, match="stopped after 1 s"):
        isolated(tmp_path, monkeypatch, "time.sleep(60)", seconds=1)
    with pytest.raises(StageFailed, match="MemoryError"):
        isolated(tmp_path, monkeypatch, "bytearray(1 << 40)")
    with pytest.raises(StageFailed, match=r"File too large"):
        isolated(tmp_path, monkeypatch, "f = open(os.environ['HOME'] + '/x', 'wb'); f.truncate(1 << 40)")
    with pytest.raises(StageFailed, match=r"stopped after 60 s of CPU time"):
        isolated(tmp_path, monkeypatch, "import signal; os.kill(os.getpid(), signal.SIGXCPU); time.sleep(5)")
    # What it says is not taken for what the process says that cuts it off.
    with pytest.raises(StageFailed, match=r"ended with status 1: unshare: no"):
        isolated(tmp_path, monkeypatch, "print('unshare: no', flush=True); os._exit(3)")
    monkeypatch.setitem(globals(), "HEAD", HEAD.replace("isolation.cut", "isolation.CLONE_NEWUSER = 1; isolation.cut"))
    with pytest.raises(InputError, match=r"evaluate.run_code: a process could not be cut off .*\(unshare: Invalid arg"):
        isolated(tmp_path, monkeypatch, "")


@isolates
@pytest.mark.parametrize("ends", ["result.write_text('')", "time.sleep(60)"])
def test_what_an_isolated_process_has_started_ends_with_it(tmp_path: Path, monkeypatch, ends: str):
    left, began = tmp_path / "left", tmp_path / "began"
    body = f"""
import subprocess
words = [sys.executable, "-c", "import time; open({str(began)!r}, 'w'); time.sleep(2); open({str(left)!r}, 'w')"]
subprocess.Popen(words, start_new_session=True)
while not os.path.exists({str(began)!r}): time.sleep(0.05)
{ends}
"""
    if "sleep" in ends:
        with pytest.raises(StageFailed, match="stopped after 3 s"):
            isolated(tmp_path, monkeypatch, body.replace("time.sleep(2)", "time.sleep(5)"), seconds=3)
    else:
        isolated(tmp_path, monkeypatch, body)
    time.sleep(2.5)
    assert began.exists()
    assert not left.exists()


@isolates
def test_a_result_is_read_through_what_was_opened_before(tmp_path: Path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for body in ("os.mkfifo(result)", f"result.symlink_to({str(secret)!r})", "os._exit(0)"):
        said = isolated(tmp_path, monkeypatch, f"result.unlink(); {body}", seconds=30)
        with pytest.raises(StageFailed, match="wrote no figures"):
            read_figures(said, [])
    monkeypatch.setattr(isolation, "RESULT", 1 << 10)
    assert len(isolated(tmp_path, monkeypatch, "result.write_text('1' * (1 << 20))")) == 1 << 10


def test_figures_of_a_process_that_is_not_trusted_are_built_anew():
    good = {"n": 1, "of": 1, "shots": 0, "version": 1.0, "higher_is_better": {"acc": True},
            "figures": {"acc,none": {"value": 1.0, "stderr": None}}}  # fmt: skip
    more = {"task": {**good, "extra": "x", "figures": {"acc,none": {"value": 1.0, "stderr": None, "extra": 1}}}}
    assert read_figures(json.dumps({**more, "other": good}), ["task"]) == {"task": good}
    figure = '{"acc,none": {"value": NaN, "stderr": 1e999}}'
    odd = json.dumps({"task": {**good, "figures": "FIGURE"}}).replace('"FIGURE"', figure)
    assert read_figures(odd, ["task"])["task"]["figures"] == {"acc,none": {"value": None, "stderr": None}}
    wrong: list[dict[str, Any]] = [
        {"n": "1"}, {"of": True}, {"shots": [0]}, {"n": 0.5}, {"n": 1 << 60}, {"version": []}, {"version": "\x1b[2J"},
        {"higher_is_better": []}, {"higher_is_better": {"acc": "yes"}}, {"figures": {"acc,none": 1.0}},
        {"figures": {"acc,none": {"value": "1", "stderr": None}}}, {"figures": {"\ud800": good["figures"]["acc,none"]}},
        {"subtasks": [1]}, {"subtasks": None},
    ]  # fmt: skip
    texts = [json.dumps({"task": {**good, **part}}) for part in wrong]
    for text in (*texts, "", "[1]", "null", "[" * 100_000, '{"other": {}}', '{"task": []}'):
        with pytest.raises(StageFailed, match="^the process that runs the model's code wrote no figures$"):
            read_figures(text, ["task"])


@isolates
@pytest.mark.slow
def test_code_that_a_model_writes_is_executed_without_network(
    recipe_file: Path, finished: Path, tmp_path: Path, monkeypatch, no_pictures
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.getcwd())
    path = task_file(
        tmp_path, "coding", unsafe_code=True, process_results="!function utils.process",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True}
                     for name in ("ran", "connected", "secrets", "same_process")],
    )  # fmt: skip
    path.write_text(path.read_text().replace("'!function utils.process'", "!function utils.process"))
    (tmp_path / "utils.py").write_text(
        "def process(doc, results):\n"
        "    space = {'answer': results[0]}\n"
        "    exec(doc['program'], space)\n"
        "    return space['found']\n"
    )
    program = (
        "import os, socket\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', PORT), timeout=5)\n"
        "    connected = 1\n"
        "except OSError:\n"
        "    connected = 0\n"
        "open('written_by_the_model', 'w').write(answer)\n"
        "found = {'ran': 1, 'connected': connected, 'secrets': int('HF_TOKEN' in os.environ),\n"
        "         'same_process': int(os.getpid() == PID)}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid()))
        docs = [{"question": f"{i}", "answer": "", "program": program} for i in range(3)]
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        words = ("evaluate", recipe_file, "--output_dir", finished, "--tasks", path)
        refused(*words, says=("executes code that the model writes",), alone=True)
        succeeds(*words, "--run-code")
    measured = metrics_of(finished)["tasks"]["coding"]
    for model in MODELS:
        values = {key.partition(",")[0]: figure["value"] for key, figure in measured[model].items()}
        assert values == {"ran": 1.0, "connected": 0.0, "secrets": 0.0, "same_process": 0.0}
    assert measured["n"] == 3
    assert not (tmp_path / "written_by_the_model").exists()
    # Whether code may be run is not what it was measured by.
    assert skipped(succeeds(*words, "--run-code")) == ["evaluate", "benchmark", "report"]


def test_a_finished_run_with_benchmarks_is_still_read_by_others(finished: Path):
    """The report of a folder without them has no such section."""
    lorapar.report(finished)
    assert "Benchmarks" not in (finished / "report.html").read_text()
