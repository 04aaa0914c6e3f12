"""Asking a panel of teachers about every row: many calls at once, each vote stored as it arrives, none asked twice.

    example → the members still needed → claim → gate (in flight, per minute, pauses) → call → read → store

A call that fails is tried again after a pause that doubles each time. A teacher whose calls keep failing is set aside,
and labelling continues while enough voters are left. The number of examples under way is bounded, so memory does not
grow with the number of rows.
"""

import asyncio
import logging
import random
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..progress import Progress
from .panel import (
    LETTERS_PER_TOKEN,
    UNANSWERED,
    Example,
    Member,
    Panel,
    Rows,
    check_context,
    empty_votes,
    examples,
    missing,
)
from .parsing import STORED_LETTERS, read_answer
from .store import Vote, VoteStore
from .teacher import CallFailed, Reply
from .voting import majority, weigh

log = logging.getLogger("lorapar")

# The longest pause of our own between two tries, in seconds; a server's Retry-After may ask for a longer one.
LONGEST_BACKOFF = 60.0
# After this many failures in a row, every further one pauses all calls of the teacher, twice as long each time.
FAILURES_WITHOUT_PAUSE = 3
# Between two looks at whether another process has stored the vote it claimed, in seconds: at first, and at most.
POLL_SECONDS = (0.05, 1.0)
AGAIN = ('\n\nA reply to this could not be read as one label. Reply with one JSON object and nothing else: {"reason": '
         '"one short sentence", "system": "System1" or "System2"}')  # fmt: skip


def ask(
    panel: Panel,
    rows: Rows,
    store: VoteStore | Path | str,
    local: Mapping[str, Sequence[int | None]] | None = None,
    tokenizer: Any = None,
) -> dict[str, array]:
    """The panel's votes on the rows: by teacher, for each row 1, 2, UNASKED or UNANSWERED.

    Args:
        rows: with `id`, `prompt` and `completion`; read several times. store: votes are written there, and what is
        there is not asked again. local: the votes of voters that need no asking. tokenizer: counts tokens where a
        teacher's context is known.

    Raises InputError where a row is too long, no teacher can be reached, too few voters are left
    or the budget is spent. By then every vote that has arrived is in the store, and the same call resumes from there.
    """
    if not isinstance(store, VoteStore):
        with VoteStore(store) as opened:
            return ask(panel, rows, opened, local, tokenizer)
    return asyncio.run(_Asking(panel, rows, store, local or {}).run(tokenizer))


class _Asking:
    """One call of `ask`: its panel and rows, the votes so far, and why it stopped."""

    def __init__(self, panel: Panel, rows: Rows, store: VoteStore, local: Mapping[str, Sequence[int | None]]):
        self.panel, self.rows, self.store, self.local = panel, rows, store, local
        self.votes = empty_votes(panel, len(rows))
        self.missing = missing(panel, rows, store)
        self.stopped: str | None = None  # why no more calls are made, for the user to read
        self.progress: dict[str, Progress] = {}
        self.promised = 0  # calls in flight that may cost something

    async def run(self, tokenizer: Any) -> dict[str, array]:
        members = self.panel.members
        self.gates = {member.name: Gate(member.in_flight, member.config.per_minute) for member in members}
        try:
            await self._check_teachers()
            check_context(self.panel, self.rows, self.store, tokenizer)
            self.progress = {member.name: Progress(f"label: {member.name}", self.missing[member.name], "vote")
                             for member in members if self.missing[member.name] and not member.aside}  # fmt: skip
            # Twice what can be in flight, so that calls do not run out while some examples wait for their next try.
            under_way = asyncio.Semaphore(max(64, 2 * sum(member.in_flight for member in members)))
            async with asyncio.TaskGroup() as tasks:
                for example in examples(self.rows):
                    await under_way.acquire()
                    if self.stopped:
                        break
                    tasks.create_task(self._example(example, under_way))
            for member in members:
                if member.calls and member.failed_calls == member.calls and not self.stopped:
                    self._set_aside(
                        member, f"none of its {member.calls} calls succeeded, the last: {member.last_failure}"
                    )
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            for progress in self.progress.values():
                progress.__exit__()
            for member in members:
                await member.teacher.close()
        if self.stopped:
            raise InputError(self.stopped)
        return self.votes

    async def _check_teachers(self) -> None:
        """Check every teacher that has a vote missing, before any call is paid for."""
        asked = [member for member in self.panel.members if self.missing[member.name]]
        results = await asyncio.gather(*(member.teacher.check() for member in asked), return_exceptions=True)
        unusable = [result for result in results if isinstance(result, BaseException)]
        for error in unusable:
            if not isinstance(error, CallFailed):
                raise error
        if asked and len(unusable) == len(asked):
            why = "; ".join(f"{m.name} at {m.config.base_url}: {error}" for m, error in zip(asked, unusable))
            raise InputError(f"label.teachers: none can be reached: {why}")
        for member, result in zip(asked, results):
            if isinstance(result, CallFailed):
                self._set_aside(member, f"cannot be reached at {member.config.base_url}: {result}")
        if self.stopped:
            raise InputError(self.stopped)

    async def _example(self, example: Example, under_way: asyncio.Semaphore) -> None:
        try:
            counted = {name: votes[example.index] for name, votes in self.local.items()}
            members = self.panel.first
            while members and not self._decided(counted):
                needed = self._needed(counted, members)
                asked_now, members = members[:needed], members[needed:]
                votes = await asyncio.gather(*(self._vote(member, example) for member in asked_now))
                counted |= {member.name: vote for member, vote in zip(asked_now, votes)}
            for member in self.panel.reserves if self.panel.label.ties == "ask" else []:
                if majority(counted, self.panel.label.weights) is not None:
                    break
                counted[member.name] = await self._vote(member, example)
        finally:
            under_way.release()

    def _decided(self, counted: Mapping[str, int | None]) -> bool:
        stop = self.panel.label.stop_early
        return stop is not None and max(weigh(counted, self.panel.label.weights)) >= stop - 1e-9

    def _needed(self, counted: Mapping[str, int | None], members: list[Member]) -> int:
        """How many more to ask together: all, or as few as could decide the row if they agree."""
        if self.panel.label.stop_early is None:
            return len(members)
        weight, needed = max(weigh(counted, self.panel.label.weights)), 0
        while needed < len(members) and weight < self.panel.label.stop_early - 1e-9:
            weight += self.panel.weight(members[needed].name)
            needed += 1
        return needed

    async def _vote(self, member: Member, example: Example) -> int | None:
        """The member's vote on the example, from the store or by asking; None where there is none."""
        key = member.key(example)
        vote = self.store.get(key)
        if vote is None:
            vote = await self._claim_and_ask(member, example, key)
            if member.name in self.progress:
                self.progress[member.name].update(1, failed=f"{member.failed_calls} of {member.calls} calls")
        self.votes[member.name][example.index] = (vote.vote or UNANSWERED) if vote else UNANSWERED
        return vote.vote if vote else None

    async def _claim_and_ask(self, member: Member, example: Example, key: str) -> Vote | None:
        poll = POLL_SECONDS[0]
        while not (self.stopped or member.aside):
            claimed = self.store.claim(key)
            if isinstance(claimed, Vote):
                return claimed
            if claimed:
                vote = None
                try:
                    vote = await self._ask(member, example, key)
                finally:
                    if vote is None:
                        self.store.release(key)
                return vote
            await asyncio.sleep(poll)
            poll = min(2 * poll, POLL_SECONDS[1])
        return None

    async def _ask(self, member: Member, example: Example, key: str) -> Vote | None:
        """Call until a reply can be read as a vote, or the tries or repeated questions are used up."""
        prompt = self.panel.prompt.fill(example.question, example.answer)
        vote = Vote(key, example.id, member.name, None, "", calls=0)
        failures, unread = 0, 0
        while failures < member.config.attempts and vote.vote is None and unread <= self.panel.label.reask:
            try:
                reply = await self._call(member, prompt + (AGAIN if unread else ""), vote)
            except CallFailed as failure:
                if failure.too_long:
                    vote.outcome, vote.reason = "too_long", failure.what
                    break
                if failure.again:
                    continue
                self._failed(member, failure, example)
                if not failure.retry:
                    return None
                failures += 1
                if failures < member.config.attempts:
                    await asyncio.sleep(self._backoff(member, failures))
                continue
            if reply is None:
                return None
            reading = read_answer(reply.text, reply.refusal)
            vote.vote, vote.outcome, vote.reason = reading.vote, reading.outcome, reading.reason
            vote.answer = reply.text[:STORED_LETTERS]
            unread += 1
        if not vote.outcome:
            return None
        self.store.put(vote)
        return vote

    async def _call(self, member: Member, prompt: str, vote: Vote) -> Reply | None:
        """One call, its tokens, cost and latency added to `vote`; None where no more calls may be made."""
        async with self.gates[member.name]:
            most = member.cost(len(prompt) / 3, member.teacher.max_tokens)
            if not await self._may_call(member, most):
                return None
            self.promised += most > 0
            member.calls += 1
            vote.calls += 1
            # An interrupted call stays counted at its highest cost: it may be charged all the same.
            began, cost = time.monotonic(), most
            try:
                reply = await member.teacher.ask(prompt)
                # An endpoint that does not count tokens charges for them all the same.
                tokens_in = len(prompt) / LETTERS_PER_TOKEN if reply.tokens_in is None else reply.tokens_in
                tokens_out = len(reply.text) / LETTERS_PER_TOKEN if reply.tokens_out is None else reply.tokens_out
                cost = member.cost(tokens_in, tokens_out)
            except CallFailed as failure:
                failure.seconds, cost = time.monotonic() - began, 0.0
                raise
            finally:
                self.promised -= most > 0
                self.store.settle_call(member.name, most, cost)
                vote.latency = time.monotonic() - began
        member.failures_in_a_row = 0
        vote.tokens_in = _plus(vote.tokens_in, reply.tokens_in)
        vote.tokens_out = _plus(vote.tokens_out, reply.tokens_out)
        vote.cost += cost
        return reply

    def _failed(self, member: Member, failure: CallFailed, example: Example) -> None:
        member.failed_calls += 1
        member.last_failure = str(failure)
        if member.failed_calls == 1:
            log.info("label: %s: first failed call, row %s: %s", member.name, example.id, failure)
        gate, now = self.gates[member.name], time.monotonic()
        if failure.retry_after is not None:
            # All calls of this teacher wait: the next one would be refused as well.
            if failure.retry_after > LONGEST_BACKOFF:
                log.warning("label: %s asks to wait %.0f s (%s)", member.name, failure.retry_after, failure)
            gate.pause(failure.retry_after * random.uniform(1.0, 1.1))
        # Calls that were in flight together fail together, and count as one failure in a row.
        if now - failure.seconds >= member.last_failed_at:
            member.failures_in_a_row += 1
            member.last_failed_at = now
            if member.failures_in_a_row > FAILURES_WITHOUT_PAUSE:
                gate.pause(self._backoff(member, member.failures_in_a_row - FAILURES_WITHOUT_PAUSE))
        if failure.fatal:
            self._set_aside(member, str(failure))
        elif member.failures_in_a_row >= self.panel.label.set_aside:
            self._set_aside(member, f"its calls failed {member.failures_in_a_row} times in a row, the last: {failure}")

    def _set_aside(self, member: Member, why: str) -> None:
        if member.aside:
            return
        member.aside = why
        left = [other for other in self.panel.first if not other.aside]
        log.warning("label: %s is set aside for this run: %s", member.name, why)
        if len(left) + len(self.panel.local) < self.panel.enough:
            asides = "; ".join(f"{member.name}: {member.aside}" for member in self.panel.members if member.aside)
            self.stopped = self.stopped or (
                f"label.enough: {len(left) + len(self.panel.local)} of {len(self.panel.first) + len(self.panel.local)} "
                f"voters are left, and {self.panel.enough} are needed ({asides}); the votes so far are kept, and the "
                "same command goes on from there"
            )

    async def _may_call(self, member: Member, most: float) -> bool:
        """Whether a call that may cost `most` is within the budget, and count it if so. Where that depends on what the
        calls in flight will cost, wait for them."""
        budget = self.panel.label.budget
        while not (self.stopped or member.aside):
            if self.store.spend_call(member.name, budget.calls, budget.cost, most):
                return True
            calls, cost = self.store.spent()
            if budget.calls is not None and calls >= budget.calls:
                reached = f"calls: {calls} of {budget.calls} are"
            elif self.promised > 0:
                await asyncio.sleep(POLL_SECONDS[0])
                continue
            else:
                reached = f"cost: {cost:.4f} of {budget.cost:g}, and the next call could exceed it, is"
            self.stopped = self.stopped or (
                f"label.budget.{reached} spent; the votes so far are kept: raise the budget and run the same command "
                "again, or see what remains with --dry-run"
            )
        return False

    def _backoff(self, member: Member, failures: int) -> float:
        longest = max(LONGEST_BACKOFF, member.config.backoff)
        return min(member.config.backoff * 2 ** (failures - 1), longest) * random.uniform(0.5, 1.5)


def _plus(total: int | None, count: int | None) -> int | None:
    return total if count is None else count + (total or 0)


@dataclass
class Gate:
    """Lets calls of one teacher start: at most `in_flight` together, `per_minute` evenly spaced, none while paused."""

    in_flight: int
    per_minute: float | None
    paused_until: float = 0.0
    next_start: float = 0.0
    semaphore: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.semaphore = asyncio.Semaphore(self.in_flight)

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    async def __aenter__(self) -> None:
        await self.semaphore.acquire()
        try:
            while (wait := self.paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if self.per_minute is not None:
                start = max(time.monotonic(), self.next_start)
                self.next_start = start + 60.0 / self.per_minute
                await asyncio.sleep(start - time.monotonic())
        except BaseException:
            self.semaphore.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.semaphore.release()
