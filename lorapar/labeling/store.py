"""Votes in a database: each written as it arrives, none asked for twice, by however many processes.

A vote's key is the hash of teacher, parameters, template and example. Before a process asks, it claims the key. The
claim is void as soon as that process has ended, however it ended: the store knows it by its number and the time when
it was created. A killed process therefore costs at most the calls that it had in flight, and the next one need not
wait. A store is shared by processes of one machine (and one container), not over a network file system.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from ..errors import InputError

# How long a writer waits for another process's write, in seconds; a write takes well under a millisecond.
BUSY_SECONDS = 60
# How far two readings of a process's creation time may lie apart, in seconds: on Linux it moves when the clock is set.
# A number is not given to another process within so short a time.
CREATED_WITHIN = 2.0


@dataclass
class Vote:
    """What one teacher finally said of one example.

    `vote`: 1, 2 or None where it gave no usable answer, and `outcome` says why: "answered", "refused", "unparseable",
    "both" (it named both systems) or "too_long" (for its context). `latency` in seconds, of the last call; `tokens_in`
    and `tokens_out`, None where the endpoint does not count, and `cost` are summed over the `calls` that it took.
    """

    key: str
    example: str
    teacher: str
    vote: int | None
    outcome: str
    reason: str = ""
    answer: str = ""
    latency: float = 0.0
    tokens_in: int | None = None
    tokens_out: int | None = None
    calls: int = 1
    cost: float = 0.0


COLUMNS = tuple(field.name for field in fields(Vote))
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS votes (key TEXT PRIMARY KEY, {", ".join(COLUMNS[1:])}, at REAL);
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER, created REAL);
CREATE TABLE IF NOT EXISTS spending (teacher TEXT PRIMARY KEY, calls INTEGER, cost REAL) WITHOUT ROWID;
"""


# The stores that this process holds open, by path and owner: its number and start time are those of closed ones too.
_OPEN: set[tuple[Path, int | None]] = set()


class VoteStore:
    """The votes of one database file, to be closed after use; `read_only` opens what is there and claims nothing."""

    def __init__(self, path: Path | str, read_only: bool = False):
        self.path = Path(path)
        self.owner: int | None = None
        try:
            if read_only:
                self.db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
                self.db.execute("SELECT count(*) FROM spending")
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            # NORMAL: a vote outlives its process at once, and the machine's power within the next checkpoint.
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=NORMAL")
            self.db.executescript(SCHEMA)
            self.owner = self._new_owner()
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"{self.path}: no store of votes that can be opened here ({error})") from None

    def _new_owner(self) -> int:
        us = os.getpid(), psutil.Process().create_time()
        with self._writing():
            if "created" not in [column[1] for column in self.db.execute("PRAGMA table_info(owners)")]:
                # Made by a version that did not record it.
                self.db.execute("ALTER TABLE owners ADD COLUMN created REAL")
            owner = self.db.execute("INSERT INTO owners (pid, created) VALUES (?, ?)", us).lastrowid
        assert owner is not None
        _OPEN.add((self.path.absolute(), owner))
        return owner

    def close(self) -> None:
        # Ours no longer, whatever happens below: a claim that cannot be deleted is void from now on.
        _OPEN.discard((self.path.absolute(), self.owner))
        try:
            if self.owner is not None:
                self.db.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        finally:
            self.db.close()

    def __enter__(self) -> "VoteStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise InputError(f"{self.path}: cannot be written ({error}); what stood there is kept") from error
            raise

    def get(self, key: str) -> Vote | None:
        row = self.db.execute(f"SELECT {', '.join(COLUMNS)} FROM votes WHERE key = ?", (key,)).fetchone()
        return None if row is None else Vote(*row)

    def claim(self, key: str) -> Vote | bool:
        """The vote that is there already; else True where it is now ours to ask for, False where it is being asked."""
        with self._writing():
            there = self.get(key)
            if there is not None:
                return there
            row = self.db.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
            if row is not None and (row[0] == self.owner or self._is_alive(row[0])):
                return False
            self.db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (key, self.owner))
            return True

    def _is_alive(self, owner: int) -> bool:
        pid, created = self.db.execute("SELECT pid, created FROM owners WHERE id = ?", (owner,)).fetchone() or (0, None)
        # Without a creation time the number may be another process's by now, and waiting for that one might never end;
        # to ask again costs a call.
        if created is None:
            return False
        if pid == os.getpid() and (self.path.absolute(), owner) not in _OPEN:
            return False
        try:
            process = psutil.Process(pid)
            # A zombie has ended, and waits for its parent to notice.
            ended = process.status() == psutil.STATUS_ZOMBIE
            return not ended and abs(process.create_time() - created) < CREATED_WITHIN
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True

    def release(self, key: str) -> None:
        """Let go of a claim that led to no vote."""
        self.db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    def put(self, vote: Vote) -> None:
        """Write a vote for good, and let go of its claim."""
        with self._writing():
            marks = ", ".join("?" * (len(COLUMNS) + 1))
            self.db.execute(f"INSERT OR IGNORE INTO votes VALUES ({marks})", (*vars(vote).values(), time.time()))
            self.db.execute("DELETE FROM claims WHERE key = ?", (vote.key,))

    def spend_call(self, teacher: str, most_calls: int | None, most_cost: float | None, promised: float = 0.0) -> bool:
        """Count a call that is about to be made, with what it may cost (`promised`), so that other processes see it and
        a killed process's is counted too; False, and uncounted, where the calls or the cost of them all would exceed
        what is given."""
        with self._writing():
            if most_calls is not None or most_cost is not None:
                calls, cost = self.spent()
                if most_calls is not None and calls >= most_calls:
                    return False
                # But for the rounding of what was promised and taken back.
                if most_cost is not None and cost + promised > most_cost * (1 + 1e-9):
                    return False
            self._add_spending(teacher, 1, promised)
            return True

    def _add_spending(self, teacher: str, calls: int, cost: float) -> None:
        self.db.execute(
            "INSERT INTO spending VALUES (?, ?, ?) ON CONFLICT (teacher) DO UPDATE SET calls = calls + excluded.calls, "
            "cost = cost + excluded.cost",
            (teacher, calls, cost),
        )

    def settle_call(self, teacher: str, promised: float, cost: float) -> None:
        """Count what a call came to in place of what was promised for it."""
        if cost != promised:
            self._add_spending(teacher, 0, cost - promised)

    def spent(self) -> tuple[int, float]:
        """(calls made, money spent or promised) by every process that ever used this store."""
        calls, cost = self.db.execute("SELECT sum(calls), sum(cost) FROM spending").fetchone()
        return calls or 0, cost or 0.0

    def means(self, teacher: str) -> tuple[float, float] | None:
        """(tokens in, tokens out) of a call of this teacher, on average; None where none is counted yet."""
        tokens_in, tokens_out, calls = self.db.execute(
            "SELECT sum(tokens_in), sum(tokens_out), sum(calls) FROM votes WHERE teacher = ? AND tokens_in > 0",
            (teacher,),
        ).fetchone()
        return (tokens_in / calls, (tokens_out or 0) / calls) if tokens_in else None
