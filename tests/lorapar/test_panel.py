"""Teachers, rules and rows that cannot serve: one line each, before anybody is paid."""

from pathlib import Path

import pytest

from lorapar.errors import InputError
from lorapar.labeling import ask, make_panel
from lorapar.labeling.panel import UNANSWERED
from lorapar.labeling.stage import panel_of
from lorapar.recipe.reading import parse
from lorapar.recipe.sections import BudgetConfig, LabelConfig, PriceConfig, TeacherConfig

from .teaching_server import requests_of, running, tally
from .test_teachers import endpoints, rows_of, stubs

KEY = "sk-test-0123456789abcdef"


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"api_key_env": "LORAPAR_TEST_UNSET"}, "label.teachers[0].api_key_env: the environment variable "
                                                "LORAPAR_TEST_UNSET is not set"),
        ({"api_key_env": KEY}, "label.teachers[0].api_key_env: expected the name of an environment variable"),
        ({"base_url": f"http://user:{KEY}@127.0.0.1/v1"}, "label.teachers[0].base_url: expected http"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEY}"}, "label.teachers[0].base_url: expected http"),
        ({"base_url": "127.0.0.1:8000"}, "label.teachers[0].base_url: expected http"),
        ({"parameters": {"api_key": KEY}}, "label.teachers[0].parameters.api_key: not allowed"),
        ({"parameters": {"extra_headers": {}}}, "label.teachers[0].parameters.extra_headers: not allowed"),
        ({"parameters": {"stream": True}}, "label.teachers[0].parameters.stream: not allowed"),
        ({"in_flight": 0}, "label.teachers[0].in_flight: got 0, expected at least 1"),
        ({"per_minute": -1.0}, "label.teachers[0].per_minute: got -1.0, expected more than 0"),
        ({"price": PriceConfig(-1, 0)}, "label.teachers[0].price"),
        ({"base_url": None, "parameters": {"temperature": 0}}, "label.teachers[0].parameters.temperature: a local"),
        ({"base_url": None, "per_minute": 5.0}, "label.teachers[0].per_minute: only for a teacher behind a base_url"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_serve_is_refused_by_its_key(teacher, says):
    with pytest.raises(InputError) as raised:
        make_panel(LabelConfig(teachers=[TeacherConfig(**{"model": "m", "base_url": "http://h/v1", **teacher})]), "t")
    assert str(raised.value).startswith(says)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ({"ties": "ask"}, "label.ties: ask needs a teacher with reserve: true"),
        ({"stop_early": 4}, "label.stop_early: got 4, but all votes together weigh 3"),
        ({"enough": 4}, "label.enough: got 4, but 3 voters are asked first"),
        ({"weights": {"x": 2.0}}, "label.weights.x: no voter of that name; there are rule, a, b"),
        ({"weights": {"a": 0.0}}, "label.weights.a: got 0.0, expected more than 0"),
        ({"budget": BudgetConfig(cost=1.0)}, "label.budget.cost: no teacher has a price"),
        ({"budget": BudgetConfig(calls=0)}, "label.budget.calls: got 0, expected at least 1"),
        ({"column": "kind"}, "label.column: got 'kind', expected nothing beside label.teachers"),
    ],
)
def test_rules_that_cannot_hold(monkeypatch, label, says):
    with pytest.raises(InputError) as raised:
        stubs(monkeypatch, {"a": 1, "b": 1}, ["rule"], **label)
    assert str(raised.value).startswith(says)


def test_rules_of_voters_alone_are_held_to_as_well():
    def recipe(**label):
        return parse({"model": "m", "data": {"sources": ["x.jsonl"]}, "label": label})

    with pytest.raises(InputError, match=r"label.weights.stepps: no voter of that name; there are steps"):
        panel_of(recipe(voters=["steps"], weights={"stepps": 2.0}), ["steps"])
    with pytest.raises(InputError, match=r"label.ties: got 'ask', expected system1, system2 or drop: there is no"):
        panel_of(recipe(voters=["steps"], ties="ask"), ["steps"])
    assert panel_of(recipe(voters=["steps"], weights={"steps": 2.0}), ["steps"]) is None


def test_names_and_teachers_come_once():
    def panel(*teachers, local=()):
        made = [TeacherConfig(**{"base_url": "http://h/v1", **teacher}) for teacher in teachers]
        return make_panel(LabelConfig(teachers=made), "t", local)

    with pytest.raises(InputError, match="2 voters are called 'a'"):
        panel({"model": "a"}, {"model": "a", "parameters": {"seed": 1}})
    with pytest.raises(InputError, match="2 voters are called 'operations'"):
        panel({"model": "operations"}, local=["operations"])
    with pytest.raises(InputError, match=r"teachers\[1\]: the same model, place and parameters as label.teachers\[0\]"):
        panel({"model": "a"}, {"model": "a", "name": "b"})
    assert len(panel({"model": "a"}, {"model": "a", "name": "b", "parameters": {"seed": 1}}).members) == 2
    with pytest.raises(InputError, match="label.teachers.0..reserve: true, but label.ties is system2"):
        panel({"model": "a", "reserve": True}, {"model": "b"})


def test_completions_of_one_prompt_are_asked_about_one_by_one(tmp_path: Path, monkeypatch):
    panel, teachers = stubs(monkeypatch, {"a": 1})
    rows = rows_of(3)
    other = {**rows[1], "completion": "another way"}
    assert list(ask(panel, [*rows, other], tmp_path / "v.sqlite")["a"]) == [1, 1, 1, 1]
    assert teachers["a"].calls.total() == 4


def test_before_the_first_call_an_endpoint_is_looked_at(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LORAPAR_TEST_KEY", KEY)
    store = tmp_path / "v.sqlite"
    with running(key="another", context=400) as url:
        with pytest.raises(InputError, match="api_key_env: the key in LORAPAR_TEST_KEY is refused by") as raised:
            ask(
                make_panel(LabelConfig(teachers=endpoints(url, api_key_env="LORAPAR_TEST_KEY")), "t"), rows_of(3), store
            )
        assert KEY not in str(raised.value)
        with pytest.raises(InputError, match="api_key_env: no key, which is refused by"):
            ask(make_panel(LabelConfig(teachers=endpoints(url)), "t"), rows_of(3), store)
    with running(key=KEY, context=700) as url:

        def keyed(*models, **more):
            return make_panel(LabelConfig(teachers=endpoints(url, models, api_key_env="LORAPAR_TEST_KEY", **more)), "t")

        with pytest.raises(InputError, match=r"teachers\[1\].model: .* lists no model 'adda', but ada"):
            ask(keyed("bob", "adda"), rows_of(3), store)
        long = [*rows_of(3), {"id": "long", "prompt": "word " * 500, "completion": "no. 4: "}]
        with pytest.raises(InputError, match=r"teachers\[0\].context: row long needs about \d+ tokens and 256 for the"):
            ask(keyed("ada", "bob"), long, store)
        assert requests_of(tally(url)) == 0
        votes = ask(keyed("ada", "x", check_model=False), rows_of(3), store)
        assert UNANSWERED not in votes["x"]
    gone = make_panel(LabelConfig(teachers=endpoints("http://127.0.0.1:9/v1", ["a", "b"])), "t")
    with pytest.raises(InputError, match="label.teachers: none can be reached: a at http://127.0.0.1:9/v1: no connect"):
        ask(gone, rows_of(3), store)


def test_one_teacher_out_of_reach_is_set_aside_where_enough_are_left(tmp_path: Path):
    with running() as url:
        teachers = [*endpoints(url, ["ada", "bob"]), *endpoints("http://127.0.0.1:9/v1", ["cyd"])]
        votes = ask(make_panel(LabelConfig(teachers=teachers), "t"), rows_of(3), tmp_path / "v.sqlite")
        assert set(votes["cyd"]) == {UNANSWERED}
        with pytest.raises(InputError, match="label.enough: 2 of 3 voters are left, and 3 are needed"):
            ask(make_panel(LabelConfig(teachers=teachers, enough=3), "t"), rows_of(4), tmp_path / "v.sqlite")


def test_a_vote_belongs_to_teacher_parameters_template_and_example(tmp_path: Path):
    with running() as url:

        def asked(rows, target="t", **settings) -> int:
            before = requests_of(tally(url))
            label = LabelConfig(teachers=endpoints(url, ["ada"], **settings))
            ask(make_panel(label, target), rows, tmp_path / "v.sqlite")
            return requests_of(tally(url)) - before

        assert asked(rows_of(4)) == 4
        # How a vote is come by is no part of it.
        assert asked(rows_of(4), name="other", in_flight=3, timeout=9.0, price=PriceConfig(1, 1)) == 0
        assert asked(rows_of(6)) == 2
        assert asked(rows_of(6), parameters={"temperature": 0.5}) == 6
        assert asked(rows_of(6), target="u") == 6
        assert asked([{**row, "completion": "no"} for row in rows_of(6)]) == 6
        assert asked(rows_of(6)) == 0
        assert tally(url)["parameters"] == [{}, {"temperature": 0.5}]
