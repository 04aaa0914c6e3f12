"""The store of votes: what is there is final, a claim ends with its process, and spending is counted once."""

import contextlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorapar.errors import InputError
from lorapar.labeling.store import SCHEMA, Vote, VoteStore


def vote(key: str = "k", system: int | None = 1, **values) -> Vote:
    return Vote(key, "row", "ada", system, "answered", **values)


def test_a_vote_is_written_once_and_stays(tmp_path: Path):
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert store.get("k") is None
        assert store.claim("k") is True
        store.put(vote(reason="so", latency=0.5, tokens_in=10, tokens_out=2, calls=2, cost=0.1))
        store.put(vote(system=2))
        assert store.claim("k") == store.get("k")
    with VoteStore(tmp_path / "v.sqlite", read_only=True) as store:
        assert store.get("k") == vote(reason="so", latency=0.5, tokens_in=10, tokens_out=2, calls=2, cost=0.1)
        assert store.means("ada") == (5.0, 1.0)
        assert store.means("bob") is None


def test_what_is_being_asked_is_not_asked_again_until_it_is_let_go(tmp_path: Path):
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert store.claim("k") is True
        assert store.claim("k") is False
        store.release("k")
        assert store.claim("k") is True


def _hold(path: str, ready, stop) -> None:
    store = VoteStore(path)
    store.claim("held")
    store.put(vote("done"))
    ready.set()
    stop.wait(60)
    os._exit(9)


def test_another_process_s_claim_holds_while_it_lives_and_no_longer(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(str(tmp_path / "v.sqlite"), ready, stop))
    child.start()
    assert ready.wait(60)
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert store.claim("held") is False
        assert isinstance(store.claim("done"), Vote)
        assert store.claim("other") is True
        child.kill()
        # Its parent has not noticed: it is a zombie.
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        began = time.monotonic()
        assert store.claim("held") is True
        assert time.monotonic() - began < 1
        child.join(60)


def _owned(path: Path, pid: int, created: float | None) -> None:
    """A claim on "held" by an owner of that number and creation time."""
    with VoteStore(path) as store:
        owner = store.db.execute("INSERT INTO owners (pid, created) VALUES (?, ?)", (pid, created)).lastrowid
        store.db.execute("INSERT OR REPLACE INTO claims VALUES ('held', ?)", (owner,))


def test_a_claimant_is_known_by_its_number_and_creation_time(tmp_path: Path):
    path = tmp_path / "v.sqlite"
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    them = psutil.Process(other.pid)
    gone = max(psutil.pids()) + 100_000
    for pid, created, free in [
        (them.pid, them.create_time(), False),
        # The clock was set by a second since.
        (them.pid, them.create_time() - 1, False),
        # Another process had its number before.
        (them.pid, them.create_time() - 3600, True),
        (gone, them.create_time(), True),
        (them.pid, None, True),
    ]:
        _owned(path, pid, created)
        with VoteStore(path) as store:
            assert store.claim("held") is free
    other.communicate()


def test_a_store_made_before_creation_times_were_noted_opens(tmp_path: Path):
    path = tmp_path / "v.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA.replace(", created REAL", ""))
        db.execute("INSERT INTO owners (pid) VALUES (?)", (os.getpid(),))
        db.execute("INSERT INTO claims VALUES ('held', 1)")
        db.commit()
    with VoteStore(path, read_only=True) as store:
        assert store.get("held") is None
    for _ in range(2):
        with VoteStore(path) as store:
            assert store.claim("held") is True
            store.release("held")


def test_a_budget_is_of_every_process_s_calls(tmp_path: Path):
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert [store.spend_call("ada", 2, None) for _ in range(3)] == [True, True, False]
        store.settle_call("ada", 0.0, 0.25)
        store.settle_call("bob", 0.0, 0.5)
        assert store.spent() == (2, 0.75)
        assert store.spend_call("bob", None, 0.74) is False
        assert store.spend_call("bob", None, 0.75) is True
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert store.spend_call("bob", 3, None) is False
        assert store.spent() == (3, 0.75)


def test_what_calls_may_cost_is_held_back_until_it_is_known(tmp_path: Path):
    # A store of each process.
    with VoteStore(tmp_path / "v.sqlite") as one, VoteStore(tmp_path / "v.sqlite") as two:
        assert one.spend_call("ada", None, 1.0, 0.75) is True
        assert two.spend_call("ada", None, 1.0, 0.5) is False
        one.settle_call("ada", 0.75, 0.25)
        assert two.spent() == (1, 0.25)
        assert two.spend_call("ada", None, 1.0, 0.75) is True
    # It was never settled, as of a process that is killed.
    with VoteStore(tmp_path / "v.sqlite", read_only=True) as store:
        assert store.spent() == (2, 1.0)


def test_what_is_no_store_is_one_line(tmp_path: Path):
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    for path in (tmp_path / "text.sqlite", tmp_path):
        with pytest.raises(InputError, match="no store of votes that can be opened here"):
            VoteStore(path)
    sqlite3.connect(tmp_path / "other.sqlite").execute("CREATE TABLE t (x)")
    with pytest.raises(InputError, match="no store of votes"):
        VoteStore(tmp_path / "other.sqlite", read_only=True)


def test_a_full_disk_is_one_line(tmp_path: Path):
    with VoteStore(tmp_path / "v.sqlite") as store:
        pages = store.db.execute("PRAGMA page_count").fetchone()[0]
        store.db.execute(f"PRAGMA max_page_count = {pages}")

        def fill() -> None:
            for i in range(1000):
                store.put(vote(str(i), answer="x" * 1000))

        with pytest.raises(InputError, match="cannot be written .*full"):
            fill()


def test_a_claim_that_closing_could_not_delete_is_void(tmp_path: Path, monkeypatch):
    """In this very process too, whose number and start time are those of the store that is closed."""
    store = VoteStore(tmp_path / "v.sqlite")
    assert store.claim("key") is True
    with VoteStore(tmp_path / "v.sqlite") as beside:
        assert beside.claim("key") is False
    real = store.db
    store.db = Full(real)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError):
        store.close()
    with VoteStore(tmp_path / "v.sqlite") as later:
        assert later.claim("key") is True


class Full:
    """A connection to a database whose disk is full."""

    def __init__(self, db):
        self.db = db

    def execute(self, *_):
        raise sqlite3.OperationalError("database or disk is full")

    def close(self):
        self.db.close()
