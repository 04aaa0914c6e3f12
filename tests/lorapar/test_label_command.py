"""`lorapar label` with teachers: killed and started again, shared, dry, reviewed, and silent about keys."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from lorapar.files import read_jsonl
from lorapar.labeling.review import read_rows, write_review

from .driver import _child, lorapar, nothing, records, refused, slow_tokens_after, succeeds, write_recipe
from .teaching_server import GOOD, MODELS, final_vote, opinion, requests_of, running, tally

KEY = "sk-test-0123456789abcdef"
IN_FLIGHT = 8


def recipe_values(model: Path, tmp_path: Path, url: str, count: int, models=MODELS, **label: Any) -> dict[str, Any]:
    teacher = {"base_url": url, "in_flight": IN_FLIGHT, "timeout": 1.5, "backoff": 0.02, **label.pop("teacher", {})}
    rows = [{"prompt": f"Question no. {i}: what is {i} + 3?", "completion": f"{i + 3}"} for i in range(count)]
    source = tmp_path / f"rows{count}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"sources": [str(source)], "held_out": 0.1},
        "label": {"teachers": [{"model": name, **teacher} for name in models], **label},
        "sft": {"report_to": "none", "bf16": False},
        "grpo": {"report_to": "none", "bf16": False},
    }


def start(words: tuple[object, ...], log: Path, patch: Any = nothing, given: tuple[Any, ...] = ()) -> Any:
    """The command line in a process of its own, which starts at once; `patch(*given)` is called there first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.lorapar.driver", "lorapar.pipeline.running", "lorapar.training.sft", "lorapar.training.grpo"]
    )
    child = context.Process(target=_child, args=(patch, given, [str(word) for word in words], str(log)))
    child.start()
    return child


def number_of(row: dict[str, Any]) -> int:
    return int(re.search(r"no\. (\d+)", row["prompt"])[1])  # type: ignore[index]


def majority(votes: list[int | None]) -> int:
    return 1 if votes.count(1) > votes.count(2) else 2


@pytest.mark.slow
def test_five_kills_lose_no_vote_and_repeat_no_more_than_was_in_flight(tiny_folder: Path, tmp_path: Path):
    count, folder = 1000, tmp_path / "run"
    with running(fails=0.3, latency=0.01, hang=3.0) as url:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_folder, tmp_path, url, count))
        command = "label", recipe, "--output_dir", folder
        stored: dict[tuple[str, str], float] = {}
        for kill in range(1, 6):
            child = start(command, tmp_path / "stderr")
            while requests_of(tally(url)) < kill * 1100:
                assert child.is_alive(), (tmp_path / "stderr").read_text()
                time.sleep(0.1)
            os.kill(child.pid, signal.SIGKILL)
            child.join(60)
            died = tally(url)["now"]
            with contextlib.closing(sqlite3.connect(folder / "votes.sqlite")) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                for pair in db.execute("SELECT teacher, example FROM votes"):
                    stored.setdefault(pair, died)
            assert not (folder / "labels.jsonl").exists()
        before_last = requests_of(tally(url))
        child = start(command, tmp_path / "stderr")
        child.join(180)
        assert child.exitcode == 0, (tmp_path / "stderr").read_text()
        found = tally(url)
        assert len(stored) > 2000
        assert before_last < requests_of(found)

        rows = read_jsonl(folder / "labels.jsonl")
        assert sorted(map(number_of, rows)) == list(range(count))
        number = {row["id"]: number_of(row) for row in rows}
        for row in rows:
            votes = [final_vote(found["said"][model][number_of(row)], model, number_of(row)) for model in MODELS]
            assert row["votes"] == dict(zip(MODELS, votes))
            assert row["system"] == majority(votes)
        assert 0.3 < sum(row["system"] == 1 for row in rows) / count < 0.7
        for (model, row_id), died in stored.items():
            assert max(found["asked_at"][model][number[row_id]]) <= died, "a stored vote was asked again"
        good = [sum(kind in GOOD for kind in kinds) for asked in found["said"].values() for kinds in asked.values()]
        repeated = sum(n - 1 for n in good if n > 1)
        print(f"{requests_of(found)} calls, {len(stored)} votes stored at the last kill, {repeated} good replies lost")
        assert repeated <= 5 * len(MODELS) * IN_FLIGHT

        # Done is done: neither a second command nor a lost labels.jsonl asks anybody.
        assert "label: done before, skipped" in succeeds(*command)
        (folder / "labels.jsonl").unlink()
        succeeds(*command)
        assert requests_of(tally(url)) == requests_of(found)
        assert read_jsonl(folder / "labels.jsonl") == rows


def test_an_interrupt_ends_it_and_the_same_command_goes_on(tiny_folder: Path, tmp_path: Path):
    with running(latency=0.1) as url:
        slow = {"in_flight": 2, "timeout": 60.0}
        values = recipe_values(tiny_folder, tmp_path, url, 60, MODELS[:2], teacher=slow)
        recipe = write_recipe(tmp_path / "r.yaml", values)
        command = "label", recipe, "--output_dir", tmp_path / "run"
        child = start(command, tmp_path / "stderr")
        while requests_of(tally(url)) < 20:
            assert child.is_alive(), (tmp_path / "stderr").read_text()
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGINT)
        child.join(60)
        lines = (tmp_path / "stderr").read_text().splitlines()
        assert child.exitcode == 130, lines
        assert lines[-1] == "lorapar: interrupted; the same command resumes from here"
        assert "Traceback" not in "".join(lines)
        succeeds(*command)
        assert len(read_jsonl(tmp_path / "run" / "labels.jsonl")) == 60
        repeated = [len(kinds) - 1 for asked in tally(url)["said"].values() for kinds in asked.values()]
        assert sum(repeated) <= 4
        assert tally(url)["most"] == {"ada": 2, "bob": 2}


def test_an_interrupt_ends_a_local_teacher_in_the_middle_of_a_batch(tiny_folder: Path, tmp_path: Path):
    """Its second batch would take twenty seconds more."""
    teacher = {"in_flight": 2, "parameters": {"max_tokens": 40}}
    values = recipe_values(tiny_folder, tmp_path, "", 8, [])
    (tmp_path / "short.txt").write_text("{target}: {question} {answer}")
    values["label"] = {"teachers": [{"model": str(tiny_folder), **teacher}], "target": "t", "reask": 0,
                       "template": str(tmp_path / "short.txt")}  # fmt: skip
    # It says nothing readable, so every row is System 2.
    values["partition"], values["sft"]["systems"] = {"selection": "all"}, [2]
    recipe = write_recipe(tmp_path / "r.yaml", values)
    command, store = ("label", recipe, "--output_dir", tmp_path / "run"), tmp_path / "run" / "votes.sqlite"

    def stored() -> dict[str, tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as db:
            return {row[0]: row for row in db.execute("SELECT * FROM votes")}

    def first_batch_is_there() -> bool:
        with contextlib.suppress(sqlite3.OperationalError):  # while the file or its tables are not there
            return len(stored()) == 2
        return False

    child = start(command, tmp_path / "stderr", slow_tokens_after, (60, 1.0))
    while not first_batch_is_there():
        assert child.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    began = time.monotonic()
    child.join(60)
    assert time.monotonic() - began < 8
    assert child.exitcode == 130
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert lines[-1] == "lorapar: interrupted; the same command resumes from here"
    assert all(line.startswith("lorapar: ") for line in lines)
    first = stored()
    assert len(first) == 2
    succeeds(*command)
    assert len(stored()) == 8
    assert first.items() <= stored().items()
    # The batch that was broken off is asked again, and no other row.
    assert records(tmp_path / "run")["label"]["calls"] == 8 + 2


def test_two_processes_share_a_store_and_the_work(tiny_folder: Path, tmp_path: Path):
    with running(latency=0.02) as url:
        recipe = write_recipe(
            tmp_path / "r.yaml",
            recipe_values(
                tiny_folder,
                tmp_path,
                url,
                150,
                MODELS[:3],
                store=str(tmp_path / "shared.sqlite"),
                teacher={"timeout": 60.0},
            ),
        )
        children = [
            start(("label", recipe, "--output_dir", tmp_path / name), tmp_path / f"{name}.log") for name in "ab"
        ]
        for child in children:
            child.join(120)
        assert [child.exitcode for child in children] == [0, 0], (tmp_path / "a.log").read_text()
        said = tally(url)["said"]
    assert {len(kinds) for asked in said.values() for kinds in asked.values()} == {1}
    assert {len(asked) for asked in said.values()} == {150}
    one, two = (read_jsonl(tmp_path / name / "labels.jsonl") for name in "ab")
    assert one == two


def test_two_processes_share_a_budget_of_money(tiny_folder: Path, tmp_path: Path):
    # As long as the longest reply that is allowed, so that a call costs about what it may cost.
    teacher = {"price": {"input": 1.0, "output": 1000.0}, "parameters": {"max_tokens": 20}, "timeout": 60.0}
    with running(latency=0.2) as url:
        values = recipe_values(tiny_folder, tmp_path, url, 150, ["ada"], teacher=teacher, budget={"cost": 1.1},
                               store=str(tmp_path / "shared.sqlite"))  # fmt: skip
        recipe = write_recipe(tmp_path / "r.yaml", values)
        children = [
            start(("label", recipe, "--output_dir", tmp_path / name), tmp_path / f"{name}.log") for name in "ab"
        ]
        for child in children:
            child.join(120)
        logs = [(tmp_path / f"{name}.log").read_text() for name in "ab"]
        assert [child.exitcode for child in children] == [2, 2], logs
        assert all("lorapar: error: label.budget.cost: " in log.splitlines()[-1] for log in logs)
        calls = requests_of(tally(url))
    with contextlib.closing(sqlite3.connect(tmp_path / "shared.sqlite")) as db:
        assert db.execute("SELECT sum(calls) FROM spending").fetchone() == (calls,)
        cost = db.execute("SELECT sum(cost) FROM spending").fetchone()[0]
        assert cost == pytest.approx(db.execute("SELECT sum(cost) FROM votes").fetchone()[0])
    assert 1.1 - 2 * 0.0205 < cost <= 1.1
    assert calls == 54


def test_what_remains_is_said_before_it_is_paid(tiny_folder: Path, tmp_path: Path):
    price = {"price": {"input": 3.0, "output": 15.0}}
    with running(latency=0.0) as url:
        values = recipe_values(tiny_folder, tmp_path, url, 40, MODELS[:2], teacher=price, budget={"calls": 30})
        recipe = write_recipe(tmp_path / "r.yaml", values)
        folder = tmp_path / "run"
        code, out, err = lorapar("label", recipe, "--output_dir", folder, "--dry-run")
        assert (code, err) == (0, "")
        assert not folder.exists()
        assert requests_of(tally(url)) == 0
        assert re.search(r"^ada +0 +40 +\d+ +10240 +\d\.\d+$", out, re.M), out
        assert re.search(r"^all +0 +80 ", out, re.M)
        assert "Budget spent: 0 of 30 calls." in out
        refused("label", recipe, "--output_dir", folder, says=("label.budget.calls: 30 of 30 are spent",))
        assert requests_of(tally(url)) == 30
        out = lorapar("label", recipe, "--output_dir", folder, "--dry-run")[1]
        assert re.search(r"^all +30 +50 ", out, re.M), out
        # The endpoint has counted 20 tokens a reply.
        assert int(re.search(r"^all +30 +50 +\d+ +(\d+)", out, re.M)[1]) == 1000  # type: ignore[index]
        # A larger budget is no other recipe.
        succeeds("label", recipe, "--output_dir", folder, "--label.budget.calls", "80")
        assert requests_of(tally(url)) == 80
    assert "No call remains" in lorapar("label", recipe, "--label.teachers", "[]", "--dry-run")[1]


def test_a_person_s_correction_wins_and_is_marked(tiny_folder: Path, tmp_path: Path):
    folder = tmp_path / "run"
    with running(latency=0.0) as url:
        values = recipe_values(tiny_folder, tmp_path, url, 60, MODELS[:3], voters=["operations"], ties="drop")
        recipe = write_recipe(tmp_path / "r.yaml", values)
        command = "label", recipe, "--output_dir", folder
        refused(*command, "--review", says=("it holds no recipe.yaml; run label first",))
        log = succeeds(*command)
        first = {number_of(row): row for row in read_jsonl(folder / "labels.jsonl")}
        asked = requests_of(tally(url))
        code, out, err = lorapar(*command, "--review")
        assert (code, out, err) == (0, f"{folder / 'review.csv'}\n", "")
        review = list(csv.DictReader((folder / "review.csv").read_text(encoding="utf-8-sig").splitlines(keepends=True)))
        # Operations says System 1 of every row, so those split on are where a teacher says System 2; ties are dropped.
        split = {i for i in range(60) if 2 in [opinion(model, i) for model in MODELS[:3]]}
        assert {int(re.search(r"no\. (\d+)", row["question"])[1]) for row in review} == split  # type: ignore[index]
        dropped = [row for row in review if row["system"] == "dropped"]
        assert len(first) == 60 - len(dropped) < 60
        assert f"{len(dropped)} rows are left out by label.ties: drop; dropped.jsonl has them" in log
        left_out = read_jsonl(folder / "dropped.jsonl")
        assert {row["id"] for row in left_out} == {row["id"] for row in dropped}
        assert {(row["system"], row["decided_by"], row["agreement"]) for row in left_out} == {(None, "tie", 0.5)}
        succeeds("report", recipe, "--output_dir", folder)
        page = (folder / "report.html").read_text()
        # Those that were left out count among the split ones, and κ is that of the stage's record.
        assert f"The voters split on {len(split)} of 60 rows" in page
        assert f"Fleiss' κ is <b>{records(folder)['label']['kappa']:.3f}" in page
        kept = next(row for row in review if row["system"] == "1")
        dropped[0]["corrected"], kept["corrected"] = "System1", "2"
        with (folder / "review.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(review[0]))
            writer.writeheader()
            writer.writerows(review)
        log = succeeds(*command)
        assert "2 labels corrected by a person" in log
        assert requests_of(tally(url)) == asked
        rows = {row["id"]: row for row in read_jsonl(folder / "labels.jsonl")}
        assert len(rows) == len(first) + 1
        assert (rows[dropped[0]["id"]]["system"], rows[dropped[0]["id"]]["decided_by"]) == (1, "person")
        assert (rows[kept["id"]]["system"], rows[kept["id"]]["decided_by"]) == (2, "person")
        assert sum(row["decided_by"] == "person" for row in rows.values()) == 2
        # Written again, the file keeps what the person wrote.
        succeeds(*command, "--review")
        again = csv.DictReader((folder / "review.csv").read_text(encoding="utf-8-sig").splitlines(keepends=True))
        assert {row["id"]: row["corrected"] for row in again if row["corrected"]} == {
            dropped[0]["id"]: "System1", kept["id"]: "2"}  # fmt: skip
        assert "label: done before, skipped" in succeeds(*command)
    for text, says in [
        ("id,corrected\nx,3\n", "corrected of row x is '3'; allowed: 1, 2, System1, System2 or empty"),
        ("id,corrected\nx,1\nx,1\n", "the id 'x' comes twice"),
        ("id,right\nx,1\n", "has no column 'corrected'"),
        ("id,corrected\nx,1\n", "label.corrections: no row has the id 'x'"),
    ]:
        (folder / "review.csv").write_text(text)
        refused(*command, says=(says,))


def test_a_review_keeps_what_is_long_and_what_is_odd(tmp_path: Path):
    row = {"id": "x", "question": "long " * 50_000, "answer": 'a "quote", a comma\nand a line', "system": 1,
           "agreement": "0.50", "decided_by": "tie", "votes": {"a": 1, "b": None}, "reasons": {"a": "式"}}  # fmt: skip
    assert write_review(tmp_path / "review.csv", [row], ["a", "b"]) == 1
    found = read_rows(tmp_path / "review.csv")["x"]
    assert (found["question"], found["answer"], found["reasons"]) == (row["question"], row["answer"], "a: 式")
    assert (found["a"], found["b"], found["corrected"]) == ("1", "", "")


def everything_written(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_key_is_nowhere(tiny_folder: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("LORAPAR_TEST_KEY", KEY)
    # Another provider's, which the client would send along.
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-of-another-provider")
    said = []
    outside, folder = tmp_path, tmp_path / "run"
    teacher = {"api_key_env": "LORAPAR_TEST_KEY", "price": {"input": 1, "output": 1}}
    # The server repeats the key wherever it can: in replies, in errors.
    for settings, options, code in [
        ({"key": KEY, "echo": True}, (), 0),
        ({"key": "another"}, (), 2),
        ({"status": 401, "echo": True}, (), 2),
        ({"status": 500, "echo": True}, ("--label.set_aside", "2"), 2),
        ({"status": 400, "echo": True}, (), 2),
    ]:
        with running(**settings) as url:
            values = recipe_values(tiny_folder, outside, url, 30, ["ada"], teacher={**teacher, "attempts": 3})
            recipe = write_recipe(outside / "r.yaml", values | {"partition": {"selection": "all"}, "stages": ["sft"]})
            run_folder = folder / str(len(said))
            got = lorapar("label", recipe, "--output_dir", run_folder, *options)
            assert got[0] == code, got
            said += [*got[1:], *lorapar("label", recipe, "--output_dir", run_folder, "--dry-run")[1:]]
            if code == 0:
                assert set(tally(url)["keys"]) <= {f"Bearer {KEY}", ""}
                assert f"Bearer {KEY}" in tally(url)["keys"]
                assert "your key is Bearer [key]" in (run_folder / "votes.jsonl").read_text()
                said += lorapar("label", recipe, "--output_dir", run_folder, "--review")[1:]
                said += lorapar("report", recipe, "--output_dir", run_folder)[1:]
    assert any("[key]" in text for text in said)
    captured = capfd.readouterr()
    for text in (*said, captured.out, captured.err):
        assert KEY not in text
    assert KEY.encode() not in everything_written(outside)
    assert b"LORAPAR_TEST_KEY" in everything_written(folder)
    # A key pasted where its variable's name belongs is neither repeated nor written.
    values["label"]["teachers"][0]["api_key_env"] = KEY
    got = lorapar("label", write_recipe(outside / "pasted.yaml", values), "--output_dir", folder / "pasted")
    assert got[0] == 2
    assert KEY not in got[2]
    assert KEY.encode() not in everything_written(folder)


def test_bad_input_is_one_line_before_anybody_is_asked(tiny_folder: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "template.txt").write_text("{question} {target}")
    (tmp_path / "c.csv").write_text("id,corrected\nx,1\n")
    with running(latency=0.0) as url:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_folder, tmp_path, url, 5))
        folder = tmp_path / "run"
        for words, says in [
            (("--label.ties", "null"), "label.ties: got None, allowed: system1, system2, drop, ask"),
            (("--label.ties", "ask"), "label.ties: ask needs a teacher with reserve: true"),
            (("--label.template", str(tmp_path / "template.txt")), "lacks the field {answer}"),
            (("--label.template", "gone.txt"), "gone.txt: no such file"),
            (("--label.corrections", "gone.csv"), "gone.csv: no such file"),
            (("--label.corrections", str(tmp_path / "c.csv")), "label.corrections: no row has the id 'x'; 1 such in"),
            (("--label.weights", "{adda: 2}"), "label.weights.adda: no voter of that name; there are ada"),
            (("--dry-run", "--review"), "not allowed with argument"),
            (("--label.teachers", "[{modle: x}]"), "label.teachers[0].modle: unknown key; did you mean 'model'"),
            (("--label.teachers", f"[{{model: x, base_url: '{url}'}}]"), "lists no model 'x', but"),
            (("--label.teachers", f"[{{model: ada, base_url: '{url}', context: 300}}]"), "teachers[0].context: row"),
            (("--label.teachers", f"[{{model: ada, base_url: '{url}', api_key_env: LORAPAR_UNSET}}]"),
             "label.teachers[0].api_key_env: the environment variable LORAPAR_UNSET is not set"),
            (("--label.teachers", "[{model: a, base_url: 'http://127.0.0.1:9/v1'}]"), "none can be reached"),
            (("--label.teachers", "[{model: no/such-model-here}]"), "a teacher without base_url is a local model"),
            (("--label.voters", "[ada]"), "label.voters: unknown voter 'ada'"),
        ]:  # fmt: skip
            refused("label", recipe, "--output_dir", folder, "--update", *words, says=(says,))
        assert requests_of(tally(url)) == 0


def test_a_machine_that_cannot_train_so_can_label(tiny_folder: Path, tmp_path: Path, monkeypatch):
    def no_bf16(*_):
        raise ValueError("Your setup doesn't support bf16/gpu.")

    monkeypatch.setattr("trl.SFTConfig.__post_init__", no_bf16)
    with running(latency=0.0) as url:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_folder, tmp_path, url, 30, ["ada"]))
        command = recipe, "--output_dir", tmp_path / "run"
        refused("run", *command, says=("sft: Your setup doesn't support bf16",))
        assert " 0       30 " in lorapar("label", *command, "--dry-run")[1]
        succeeds("label", *command)
        assert lorapar("label", *command, "--review")[0] == 0
        succeeds("report", *command)


def test_a_local_model_is_a_teacher_too(tiny_folder: Path, tmp_path: Path):
    values = recipe_values(tiny_folder, tmp_path, "http://unused/v1", 12, [], voters=["operations"])
    values["label"]["teachers"] = [{"model": str(tiny_folder), "name": "tiny", "in_flight": 5, "context": 2000,
                                    "parameters": {"max_tokens": 4}}]  # fmt: skip
    values |= {"partition": {"selection": "all"}, "stages": ["sft"]}
    folder = tmp_path / "run"
    succeeds("label", write_recipe(tmp_path / "r.yaml", values), "--output_dir", folder)
    for row in read_jsonl(folder / "votes.jsonl"):
        assert row["votes"]["tiny"]["outcome"] == "unparseable"
        assert row["votes"]["tiny"]["calls"] == 3
        assert row["votes"]["tiny"]["tokens_in"] > 3 * 500
    for row in read_jsonl(folder / "labels.jsonl"):
        assert row["votes"] == {"operations": 1, "tiny": None}
        assert row["teachers"] == ["operations", "tiny"]
