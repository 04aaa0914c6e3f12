"""Scoring, evaluation and labels in several processes are those of one; a pass goes on in any number of processes."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import lorapar
from lorapar.partitioning.partition import Partition
from lorapar.scoring.scores import Scores, load_scores
from lorapar.scoring.sums import files_of
from tests.launched import launch
from tests.lorapar import sharing
from tests.lorapar.test_scoring import rows
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


def shared(processes: int, folder: Path, *what: str, code: int = 0) -> Path:
    """Do this of sharing.py in so many processes; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = launch(processes, ["-m", "tests.lorapar.sharing", str(folder), *what])
    assert ended.returncode == code, ended.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    sharing.scored(folder)
    sharing.evaluated(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return shared(2, tmp_path_factory.mktemp("two"), "scored", "evaluated", "with_a_sharded_base")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return shared(4, tmp_path_factory.mktemp("four"), "scored", "with_a_sharded_base")


def assert_same(found: Scores, wanted: Scores) -> None:
    assert found.metadata == wanted.metadata
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0.0)


def assert_same_files(path: Path, expected: Path) -> None:
    for found, wanted in zip(load_scores(path), load_scores(expected)):
        assert_same(found, wanted)


@pytest.mark.parametrize("processes", ["two", "four"])
def test_scores_and_partition_are_those_of_one_process(one, processes, request):
    folder = request.getfixturevalue(processes)
    assert_same_files(folder / "scores.safetensors", one / "scores.safetensors")
    there, here = (Partition.load(path / "partition.safetensors") for path in (folder, one))
    assert there.hash == here.hash


@pytest.mark.parametrize("processes", ["two", "four"])
def test_all_processes_look_at_the_sums_of_all_and_stop_together(one, processes, request):
    folder = request.getfixturevalue(processes)
    assert_same_files(folder / "stable_scores.safetensors", one / "stable_scores.safetensors")
    whole, early = (scores.metadata for scores in load_scores(folder / "stable_scores.safetensors"))
    assert ([n for n, _ in whole["looks"]], whole["examples"]) == ([32, 64, 70], 70)
    assert (early["stable"], early["examples"]) == (True, 32)


@pytest.mark.parametrize("which", ["plain", "stable"])
@pytest.mark.parametrize(("killed_in", "goes_on_in"), [(2, 1), (1, 2), (2, 3)])
def test_a_killed_pass_goes_on_in_any_number_of_processes(one, which, killed_in, goes_on_in, tmp_path):
    shared(killed_in, tmp_path, f"killed:{which}", code=9 if killed_in == 1 else 1)
    path = tmp_path / f"{which}.safetensors"
    left = files_of(path)
    assert len(left) == killed_in
    if goes_on_in == 1:
        second = left[1].read_bytes()
        sharing.resumed(tmp_path, which)
        assert files_of(path) == [path]
        if which == "plain":
            # A kill between the writing of the one file and the removal of the other would have left this one.
            left[1].write_bytes(second)
            sharing.read_back(tmp_path)
            assert files_of(path) == [path]
            assert_same(load_scores(tmp_path / "read_back.safetensors")[0], load_scores(one / "scores.safetensors")[0])
    else:
        shared(goes_on_in, tmp_path, f"resumed:{which}")
    wanted = one / {"plain": "scores.safetensors", "stable": "stable_scores.safetensors"}[which]
    assert_same(load_scores(tmp_path / f"{which}_scores.safetensors")[0], load_scores(wanted)[0])


@pytest.mark.parametrize("processes", ["two", "four"])
def test_with_a_sharded_base_every_process_makes_as_many_forwards(processes, request):
    found, _ = load_scores(request.getfixturevalue(processes) / "sharded.safetensors")
    assert_same(found, lorapar.score(sharing.model(), None, rows(sharing.ROWS), 4))


def test_answers_metric_and_watched_loss_are_those_of_one_process(one, two):
    result, by_accuracy, loss = json.loads((two / "evaluated.json").read_text())
    expected, expected_by_accuracy, expected_loss = json.loads((one / "evaluated.json").read_text())
    assert result == expected
    assert by_accuracy == expected_by_accuracy
    assert len({answer["completion"] for answer in result["answers"]}) > 5
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    # The metric was called once, by the main process, with every row.
    assert (two / "called.txt").read_text() == "0 23\n"


def test_a_local_teacher_is_asked_each_question_once_and_only_where_it_is_needed(tmp_path):
    for name, vocabulary in (("even", 258), ("third", 262)):
        tiny_model(vocabulary=vocabulary).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "words.txt").write_text("{target} {answer} {question}")
    questions = [{"prompt": f"Question no. {i}: what is {i} + 3?", "completion": f"{i + 3}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    recipe = {
        "model": {"name": str(tmp_path / "even"), "dtype": "float32", "device": "cpu"},
        "data": {"sources": [str(tmp_path / "rows.jsonl")], "held_out": 0.1},
        "label": {
            "voters": ["operations"],
            "teachers": [{"model": str(tmp_path / "even"), "name": "even", "in_flight": 4},
                         {"model": str(tmp_path / "third"), "name": "third", "in_flight": 3, "reserve": True}],
            "ties": "ask",
            "target": "t",
            "template": str(tmp_path / "words.txt"),
        },
    }  # fmt: skip
    folders = [tmp_path / "1", tmp_path / "2"]
    for processes, folder in enumerate(folders, start=1):
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(recipe))
        shared(processes, folder, "labelled")
        by_rank = [Path(file).read_text().splitlines() for file in sorted(folder.glob("asked*.txt"))]
        # The rules say System 1, so only where the first teacher differs is the one in reserve asked.
        assert sorted(itertools.chain(*by_rank)) == sorted(
            [*(f"258 {i}" for i in range(40)), *(f"262 {i}" for i in range(1, 40, 2))]
        )
        # All processes have answered: the first teacher's questions wait together, and each takes a batch.
        assert len(by_rank) == processes
        assert all(any(line.startswith("258 ") for line in lines) for lines in by_rank)
    first, second = ((folder / "labels.jsonl").read_text() for folder in folders)
    assert first == second
    assert json.loads((folders[0] / "facts.json").read_text()) == json.loads((folders[1] / "facts.json").read_text())
