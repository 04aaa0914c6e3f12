"""A panel against a server of our own that fails as endpoints do, and against stub teachers for the rules."""

import asyncio
import collections
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from lorapar.errors import InputError
from lorapar.labeling import ask, make_panel
from lorapar.labeling.endpoint import retry_after
from lorapar.labeling.panel import UNANSWERED, UNASKED, remaining
from lorapar.labeling.store import VoteStore
from lorapar.labeling.teacher import CallFailed, Reply
from lorapar.memory.process import peak_memory_bytes, reset_peak_memory
from lorapar.recipe.sections import BudgetConfig, LabelConfig, PriceConfig, TeacherConfig
from tests.tiny import tiny_model

from .teaching_server import BROKEN, GOOD, MODELS, final_vote, opinion, requests_of, running, tally


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"{i:06d}", "prompt": f"Question no. {i}: what is {i} + 3?", "completion": f"{i + 3}"}
            for i in range(start, start + count)]  # fmt: skip


def endpoints(url: str, models=MODELS, **settings) -> list[TeacherConfig]:
    settings = {"in_flight": 8, "timeout": 5.0, "backoff": 0.01, **settings}
    return [TeacherConfig(model=model, base_url=url, **settings) for model in models]


class Stub:
    """A teacher in this process: `says(question number, times asked)` is its reply, or raises."""

    max_tokens, context = 10, None

    def __init__(self, name: str, says):
        self.name, self.says = name, says
        self.identity = {"stub": name}
        self.calls: collections.Counter[int] = collections.Counter()

    async def ask(self, prompt: str) -> Reply:
        number = int(prompt.split("no. ")[1].split(":")[0])
        self.calls[number] += 1
        await asyncio.sleep(0)
        return Reply(self.says(number, self.calls[number]), None, 100, 10)

    async def check(self) -> None: ...
    async def close(self) -> None: ...
    def hide(self, text: str) -> str:
        return text


def stubs(monkeypatch, says: dict[str, Any], local=(), **label):
    """A panel of stub teachers; what `says` holds is 1 or 2 for every question, or a function."""
    teachers = {name: Stub(name, say if callable(say) else lambda *_, say=say: f"System{say}")
                for name, say in says.items()}  # fmt: skip
    monkeypatch.setattr("lorapar.labeling.panel.make_teacher", lambda config, at: teachers[config.model])
    settings = label.pop("settings", {})
    configs = [TeacherConfig(model=name, backoff=0.001, **settings.get(name, {})) for name in says]
    return make_panel(LabelConfig(teachers=configs, **label), "target", local), teachers


# A server that fails


def test_a_server_that_fails_in_every_way_still_labels_every_row(tmp_path: Path):
    rows = rows_of(100)
    with running(fails=0.3, hang=3.0) as url:
        panel = make_panel(LabelConfig(teachers=endpoints(url, timeout=1.5)), "target")
        votes = ask(panel, rows, tmp_path / "v.sqlite")
        found = tally(url)
        for model in MODELS:
            last = [final_vote(found["said"][model][i], model, i) or UNANSWERED for i in range(100)]
            assert list(votes[model]) == last
            assert found["most"][model] <= 8
        kinds = collections.Counter(k for asked in found["said"].values() for row in asked.values() for k in row)
        assert len(kinds) == 14, kinds
        assert 0.25 < sum(n for kind, n in kinds.items() if kind not in GOOD) / kinds.total() < 0.35
        again = ask(make_panel(LabelConfig(teachers=endpoints(url)), "target"), rows, tmp_path / "v.sqlite")
        assert again == votes
        assert requests_of(tally(url)) == requests_of(found)
    with VoteStore(tmp_path / "v.sqlite", read_only=True) as store:
        assert store.spent()[0] == requests_of(found)
        for member in panel.members:
            for i in (0, 50):
                from lorapar.labeling.panel import examples

                example = next(e for e in examples(rows) if e.index == i)
                vote = store.get(member.key(example))
                assert vote is not None
                assert vote.calls == len(found["said"][member.name][i])
                assert vote.latency > 0.005
                assert vote.tokens_out is None or vote.tokens_out % 20 == 0


def test_progress_of_each_teacher_says_rate_failures_and_time_left(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr("lorapar.progress.LOG_EVERY_SECONDS", 0.1)
    caplog.set_level("INFO", logger="lorapar")
    with running(fails=0.3, hang=3.0) as url:
        ask(make_panel(LabelConfig(teachers=endpoints(url, timeout=1.5)), "t"), rows_of(60), tmp_path / "v.sqlite")
        said = tally(url)["said"]
    line = r"label: (\w+): (\d+)/60, ([\d.e+]+) vote/s, (\d+) s left, failed (\d+) of (\d+) calls"
    found = [match.groups() for record in caplog.records if (match := re.fullmatch(line, record.getMessage()))]
    for model in MODELS:
        mine = [tuple(map(float, numbers)) for name, *numbers in found if name == model]
        kinds = [kind for asked in said[model].values() for kind in asked]
        done, _, left, failed, calls = mine[-1]
        assert (done, left, failed, calls) == (60, 0, sum(kind in BROKEN for kind in kinds), len(kinds))
        assert len(mine) > 2
        assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(mine))


def test_retry_after_holds_back_all_calls_of_the_teacher(tmp_path: Path):
    pause = 0.3
    with running(first="429", pause=pause, latency=0.01) as url:
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["ada"], in_flight=1), set_aside=99), "target")
        ask(panel, rows_of(5), tmp_path / "v.sqlite")
        found = tally(url)
    times = sorted((at, kind) for i, ats in found["asked_at"]["ada"].items()
                   for at, kind in zip(ats, found["said"]["ada"][i]))  # fmt: skip
    after = [later - at for (at, kind), (later, _) in itertools.pairwise(times) if kind == "429"]
    assert len(after) == 5
    assert min(after) >= pause


def test_retry_after_in_every_form():
    assert retry_after({"retry-after": "2"}) == 2.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) > 1e9  # type: ignore[operator]
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_calls_a_minute_are_spaced_evenly(tmp_path: Path):
    with running(latency=0.0) as url:
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["ada"], per_minute=600)), "target")
        ask(panel, rows_of(20), tmp_path / "v.sqlite")
        times = sorted(at for ats in tally(url)["asked_at"]["ada"].values() for at in ats)
    # 100 ms apart when they start; the first may arrive late, by the time a connection takes, and the last in time.
    assert 19 * 0.1 - 0.5 <= times[-1] - times[0] < 10


def test_the_throughput_is_what_the_limits_allow(tmp_path: Path):
    # A second, as language models take, beside which a busy machine's hiccups are small.
    latency, in_flight, count = 1.0, 16, 80
    with running(latency=latency) as url:
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["ada"], in_flight=in_flight)), "target")
        ask(panel, rows_of(8, start=count), tmp_path / "warm.sqlite")
        ask(panel, rows_of(count), tmp_path / "v.sqlite")
        found = tally(url)
    times = [at for i, ats in found["asked_at"]["ada"].items() for at in ats if i < count]
    # From the first call's start to the last one's end.
    took = max(times) - min(times) + latency
    print(f"{count * latency / in_flight / took:.3f} of what the limits allow")
    assert count * latency / in_flight / took > 0.9


def test_an_endpoint_without_json_schema_is_asked_without(tmp_path: Path, caplog):
    with running(no_schema=True) as url:
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["ada"], in_flight=32)), "target")
        votes = ask(panel, rows_of(40), tmp_path / "v.sqlite")
        assert list(votes["ada"]) == [opinion("ada", i) for i in range(40)]
        assert sum("takes no JSON schema" in record.message for record in caplog.records) == 1
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["bob"], structured="schema")), "target")
        says = "0 of 1 voters are left, and 1 are needed .bob: none of its 5 calls succeeded, the last: HTTP 400"
        with pytest.raises(InputError, match=says):
            ask(panel, rows_of(5), tmp_path / "v.sqlite")


# Teachers that do not work


def test_a_teacher_that_keeps_failing_is_set_aside_and_the_vote_goes_on(tmp_path: Path, monkeypatch, caplog):
    def down(*_):
        raise CallFailed("HTTP 500: down")

    panel, teachers = stubs(monkeypatch, {"a": 1, "b": 1, "c": down}, set_aside=4)
    votes = ask(panel, rows_of(300), tmp_path / "v.sqlite")
    assert set(votes["a"]) == {1}
    assert set(votes["c"]) == {UNANSWERED}
    assert teachers["c"].calls.total() < 100
    assert any("c is set aside for this run: its calls failed 4 times in a row, the last: HTTP 500: down" in r.message
               for r in caplog.records)  # fmt: skip
    with VoteStore(tmp_path / "v.sqlite") as store:
        assert store.db.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    # It works again, and only what is missing is asked.
    panel, teachers = stubs(monkeypatch, {"a": 1, "b": 1, "c": 2}, set_aside=4)
    assert set(ask(panel, rows_of(300), tmp_path / "v.sqlite")["c"]) == {2}
    assert [t.calls.total() for t in teachers.values()] == [0, 0, 300]


def test_too_few_teachers_left_stops_with_one_line(tmp_path: Path, monkeypatch):
    def down(*_):
        raise CallFailed("HTTP 401: no", retry=False, fatal=True)

    panel, teachers = stubs(monkeypatch, {"a": 1, "b": down, "c": down})
    with pytest.raises(InputError, match="1 of 3 voters are left, and 2 are needed .*b: HTTP 401: no.*go"):
        ask(panel, rows_of(300), tmp_path / "v.sqlite")
    assert sum(teachers["b"].calls.values()) <= 8


def test_a_call_that_is_no_use_is_not_repeated_and_not_stored(tmp_path: Path, monkeypatch):
    def bad(number, _):
        if number == 3:
            raise CallFailed("HTTP 400: bad", retry=False)
        if number == 5:
            raise CallFailed("HTTP 400: context length", retry=False, too_long=True)
        return "System1"

    panel, teachers = stubs(monkeypatch, {"a": bad})
    votes = ask(panel, rows_of(8), tmp_path / "v.sqlite")
    assert list(votes["a"]) == [1, 1, 1, UNANSWERED, 1, UNANSWERED, 1, 1]
    assert set(teachers["a"].calls.values()) == {1}
    panel, teachers = stubs(monkeypatch, {"a": 2})
    assert list(ask(panel, rows_of(8), tmp_path / "v.sqlite")["a"]) == [1, 1, 1, 2, 1, UNANSWERED, 1, 1]
    assert dict(teachers["a"].calls) == {3: 1}


def test_a_defect_in_a_teacher_is_not_hidden(tmp_path: Path, monkeypatch):
    def breaks(*_):
        raise ZeroDivisionError("a defect")

    panel, _ = stubs(monkeypatch, {"a": breaks})
    with pytest.raises(ZeroDivisionError, match="a defect"):
        ask(panel, rows_of(3), tmp_path / "v.sqlite")


def test_an_unreadable_reply_is_asked_again_so_often_and_then_final(tmp_path: Path, monkeypatch):
    panel, teachers = stubs(monkeypatch, {"a": lambda number, times: "who knows" if times <= number else "System2"})
    votes = ask(panel, rows_of(5), tmp_path / "v.sqlite")
    assert list(votes["a"]) == [2, 2, 2, UNANSWERED, UNANSWERED]
    assert [teachers["a"].calls[i] for i in range(5)] == [1, 2, 3, 3, 3]
    assert ask(panel, rows_of(5), tmp_path / "v.sqlite") == votes
    assert teachers["a"].calls.total() == 12


# Rules


def test_no_more_teachers_are_asked_than_the_recipe_says(tmp_path: Path, monkeypatch):
    sides = {"a": 1, "b": 1, "c": lambda n, _: f"System{1 if n % 2 else 2}", "d": 2, "e": 2}
    panel, teachers = stubs(monkeypatch, sides, stop_early=3)
    votes = ask(panel, rows_of(20), tmp_path / "v.sqlite")
    for i in range(20):
        of_row = [votes[name][i] for name in sides]
        assert of_row == ([1, 1, 1, UNASKED, UNASKED] if i % 2 else [1, 1, 2, 2, 2])
    assert [t.calls.total() for t in teachers.values()] == [20, 20, 20, 10, 10]
    # A voter that costs nothing counts first, and weights count.
    panel, teachers = stubs(monkeypatch, {"a": 1, "b": 1, "c": 1}, ["rule"], stop_early=3, weights={"rule": 2})
    ask(panel, rows_of(4), tmp_path / "w.sqlite", {"rule": [1, 2, None, 1]})
    assert [dict(t.calls) for t in teachers.values()] == [{0: 1, 1: 1, 2: 1, 3: 1}, {1: 1, 2: 1}, {1: 1, 2: 1}]


def test_a_reserve_is_asked_at_a_tie_alone(tmp_path: Path, monkeypatch):
    says = {"a": 1, "b": lambda n, _: f"System{1 + n % 2}", "r": 1, "s": 2}
    reserve = {"r": {"reserve": True}, "s": {"reserve": True}}
    panel, _ = stubs(monkeypatch, says, settings=reserve, ties="ask")
    votes = ask(panel, rows_of(6), tmp_path / "v.sqlite")
    assert list(votes["r"]) == [UNASKED, 1] * 3
    assert set(votes["s"]) == {UNASKED}


def test_a_budget_of_calls_stops_cleanly_and_a_larger_one_goes_on(tmp_path: Path, monkeypatch):
    panel, teachers = stubs(monkeypatch, {"a": 1, "b": 2}, budget=BudgetConfig(calls=25))
    with pytest.raises(InputError, match=r"label.budget.calls: 25 of 25 are spent; .*--dry-run"):
        ask(panel, rows_of(50), tmp_path / "v.sqlite")
    assert teachers["a"].calls.total() + teachers["b"].calls.total() == 25
    with VoteStore(tmp_path / "v.sqlite") as store:
        left = remaining(panel, rows_of(50), store)
    assert left["a"].stored + left["b"].stored == 25
    assert left["a"].calls + left["b"].calls == 75
    assert (left["a"].tokens_in, left["a"].tokens_out) == (100 * left["a"].calls, 10 * left["a"].calls)
    panel, teachers = stubs(monkeypatch, {"a": 1, "b": 2}, budget=BudgetConfig(calls=100))
    votes = ask(panel, rows_of(50), tmp_path / "v.sqlite")
    assert (set(votes["a"]), set(votes["b"])) == ({1}, {2})
    assert teachers["a"].calls.total() + teachers["b"].calls.total() == 75


def test_a_budget_of_money_is_never_exceeded(tmp_path: Path, monkeypatch):
    # 100 tokens in and 10 out: 0.0003 a call.
    price = {"a": {"price": PriceConfig(2.0, 10.0)}}
    panel, teachers = stubs(monkeypatch, {"a": 1}, settings=price, budget=BudgetConfig(cost=0.0101))
    with pytest.raises(InputError, match=r"label.budget.cost: 0.\d+ of 0.0101"):
        ask(panel, rows_of(200), tmp_path / "v.sqlite")
    with VoteStore(tmp_path / "v.sqlite") as store:
        calls, cost = store.spent()
    assert cost == pytest.approx(0.0003 * calls)
    assert calls == teachers["a"].calls.total()
    assert 0.0101 - 0.0015 < cost <= 0.0101


def test_memory_does_not_grow_with_the_examples(tmp_path: Path, monkeypatch):
    class Rows:
        def __init__(self, count: int):
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __iter__(self):
            return ({"id": f"{i:06d}", "prompt": f"Question no. {i}: {'x' * 500}", "completion": "y" * 500}
                    for i in range(self.count))  # fmt: skip

    class Quick(Stub):
        async def ask(self, prompt: str) -> Reply:
            await asyncio.sleep(0)
            return Reply('{"reason": "so", "system": "System1"}', None, 100, 10)

    monkeypatch.setattr("lorapar.labeling.panel.make_teacher", lambda config, at: Quick("quick", None))
    panel = make_panel(LabelConfig(teachers=[TeacherConfig(model="quick", in_flight=32)]), "target")
    ask(panel, Rows(2_000), tmp_path / "warm.sqlite")  # type: ignore[arg-type]
    count = int(os.environ.get("LORAPAR_MEMORY_EXAMPLES", 10_000))
    reset_peak_memory()
    before = peak_memory_bytes()
    votes = ask(panel, Rows(count), tmp_path / "v.sqlite")  # type: ignore[arg-type]
    grown = peak_memory_bytes() - before
    print(f"{count} examples of 1 kB: peak grew by {grown / 1e6:.1f} MB")
    assert votes["quick"].count(1) == count
    # A byte a vote and 8 of an id's hash, twice while they are sorted; the examples themselves would be 1 kB each.
    assert grown < 6e6 + 30 * count


def test_time_is_bounded_by_the_call_not_by_each_byte(tmp_path: Path):
    began = time.monotonic()
    with running(fails=1.0, hang=30.0) as url:
        # Every reply fails, a fifth of them by silence.
        panel = make_panel(LabelConfig(teachers=endpoints(url, ["ada"], timeout=0.3, attempts=2), set_aside=1000), "t")
        votes = ask(panel, rows_of(20), tmp_path / "v.sqlite")
    assert set(votes["ada"]) == {UNANSWERED}
    assert time.monotonic() - began < 25


def test_local_teachers_are_loaded_one_at_a_time(tiny_folder, monkeypatch):
    """torch's default dtype is that of the model that loads, for every thread: two at once got mixed weights."""
    from lorapar.labeling import local

    loading, most = [], []

    def load(config):
        loading.append(config.name)
        most.append(len(loading))
        time.sleep(0.05)
        loading.pop()
        return tiny_model()

    monkeypatch.setattr(local, "load_model", load)
    teachers = [local.LocalTeacher(TeacherConfig(model=str(tiny_folder), name=name), "t") for name in "abc"]

    async def check() -> None:
        await asyncio.gather(*(teacher.check() for teacher in teachers))

    asyncio.run(check())
    assert most == [1, 1, 1]
