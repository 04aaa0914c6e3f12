"""A panel's teacher behind a server that is not ours: `transformers serve` on loopback."""

import collections
import contextlib
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lorapar.files import read_jsonl

from .driver import succeeds, write_recipe


@contextlib.contextmanager
def transformers_serve(folder: Path, log: Path):
    """`transformers serve` with a model on loopback; skips, with the reason, where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1", "--port", port,
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    if not command[0].exists():
        pytest.skip("the `transformers` command is not beside this Python")
    with log.open("w") as out:
        server = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out)
    try:
        began = time.monotonic()
        while True:
            if server.poll() is not None or time.monotonic() - began > 180:
                said = [line for line in log.read_text().splitlines() if line.strip()]
                pytest.skip(f"transformers serve did not start here: {said[-1] if said else 'it said nothing'}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_fifty_rows_of_gsm8k_by_a_real_server(gsm8k: Path, tmp_path: Path):
    from lorapar.model.locate import resolve

    model, folder = resolve("smollm2-135m"), tmp_path / "run"
    # A short one, for the time a CPU takes to read it.
    template = tmp_path / "template.txt"
    template.write_text(
        "You are {target}.{habits}\n{question}\n{answer}\nOne step is System1, more are System2. Which?"
    )
    with transformers_serve(Path(model), tmp_path / "serve.log") as url:
        teacher = {"model": str(model), "name": "smollm2", "base_url": url, "in_flight": 4, "timeout": 300,
                   "attempts": 2, "parameters": {"max_tokens": 8, "temperature": 0}}  # fmt: skip
        values = {
            "model": "smollm2-135m",
            "data": {"sources": [{"name": str(gsm8k / "train.jsonl"), "size": 50}], "held_out": 5},
            "label": {"template": str(template), "habits": "short, often wrong", "teachers": [teacher], "reask": 0,
                      "voters": [{"name": "operations", "threshold": 3}]},
            "sft": {"bf16": False, "report_to": "none"},
            "grpo": {"bf16": False, "report_to": "none"},
        }  # fmt: skip
        recipe = write_recipe(tmp_path / "r.yaml", values)
        log = succeeds("label", recipe, "--output_dir", folder)
        asked = (tmp_path / "serve.log").read_text().count("[Request received]")
        rows, votes = read_jsonl(folder / "labels.jsonl"), read_jsonl(folder / "votes.jsonl")
        (folder / "labels.jsonl").unlink()
        succeeds("label", recipe, "--output_dir", folder)
        assert (tmp_path / "serve.log").read_text().count("[Request received]") == asked
        assert read_jsonl(folder / "labels.jsonl") == rows
    assert (len(rows), asked) == (50, 50)
    outcomes = collections.Counter(row["votes"]["smollm2"]["outcome"] for row in votes)
    print(f"outcomes of 50 rows: {dict(outcomes)}")
    assert outcomes.total() == 50
    assert set(outcomes) <= {"answered", "refused", "unparseable", "both"}
    with contextlib.closing(sqlite3.connect(folder / "votes.sqlite")) as db:
        stored = {row[0]: row[1:] for row in db.execute("SELECT example, vote, outcome, answer, tokens_in FROM votes")}
    assert len(stored) == 50
    for row in rows:
        vote, outcome, answer, tokens_in = stored[row["id"]]
        assert row["votes"]["smollm2"] == vote
        assert (vote is not None) == (outcome == "answered")
        assert tokens_in > 50
        assert answer.strip()
    assert re.search(r"unanswered \d+", log)
