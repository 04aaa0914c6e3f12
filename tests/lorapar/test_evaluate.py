"""Accuracy by system, its interval, and greedy answers that do not depend on the batch."""

import pytest

import lorapar
from lorapar.errors import InputError, RewardFailed
from lorapar.evaluating.evaluate import bootstrap, wilson
from tests.tiny import chat_tokenizer, tiny_model, tiny_tokenizer


def test_counts_by_system(monkeypatch):
    rows = [{"id": str(i), "prompt": "?", "answer": str(i), "system": 1 + (i > 3)} for i in range(10)]
    said = [str(i) if i in (0, 1, 5) else "no" for i in range(10)]
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_, **__: said)
    result = lorapar.evaluate(tiny_model(), tiny_tokenizer(), rows)
    assert result["accuracy"] == {"all": 0.3, "system1": 0.5, "system2": pytest.approx(1 / 6)}
    assert result["n"] == {"all": 10, "system1": 4, "system2": 6}
    assert [a["correct"] for a in result["answers"]] == [i in (0, 1, 5) for i in range(10)]
    low, high = result["interval"]["all"]
    assert low < 0.3 < high


def test_rows_without_a_system_give_the_whole_only(monkeypatch):
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_, **__: ["1"])
    result = lorapar.evaluate(tiny_model(), tiny_tokenizer(), [{"prompt": "?", "answer": "1"}])
    assert result["accuracy"] == {"all": 1.0}


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    # Brown, Cai & DasGupta 2001, and the closed forms at 0 and n: z²/(n + z²).
    [(0, 10, (0.0, 0.27753)), (10, 10, (0.72247, 1.0)), (5, 10, (0.23659, 0.76341)), (81, 263, (0.25529, 0.36620))],
)
def test_wilson_interval(successes, trials, expected):
    assert wilson(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="dataset: got 'no rows'"):
        lorapar.evaluate(tiny_model(), tiny_tokenizer(), [])


ROWS = [
    {"id": str(i), "prompt": "?", "answer": str(i), "system": 1 + (i > 3), "completion": f"it is {i}", "words": i}
    for i in range(10)
]


def evaluated(monkeypatch, said, metric, rows=ROWS):
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_, **__: said)
    return lorapar.evaluate(tiny_model(), tiny_tokenizer(), rows, metric=metric)


def test_a_metric_gives_means_with_a_bootstrap_interval_and_counts_none_apart(monkeypatch):
    def length(prompts, completions, completion_ids, words, completion, **columns):
        assert prompts == ["?"] * 10
        assert completion == [row["completion"] for row in ROWS]
        assert [len(ids) for ids in completion_ids] == [len(text) for text in completions]
        return [None if count == 9 else len(text) / 2 for text, count in zip(completions, words)]

    result = evaluated(monkeypatch, ["x" * (i + 1) for i in range(10)], length)
    assert "accuracy" not in result
    assert result["mean"] == {"all": 2.5, "system1": 1.25, "system2": 3.5}
    assert (result["n"], result["none"]) == ({"all": 9, "system1": 4, "system2": 5}, {"all": 1, "system2": 1})
    assert [a["value"] for a in result["answers"]] == [*(i / 2 for i in range(1, 10)), None]
    assert result["interval_by"] == "bootstrap"
    low, high = result["interval"]["all"]
    # The normal interval of 0.5, 1, ... 4.5 is 2.5 ± 0.89; the bootstrap's is that of the population's deviation.
    assert low == pytest.approx(2.5 - 0.84, abs=0.12)
    assert high == pytest.approx(2.5 + 0.84, abs=0.12)
    assert bootstrap([0.5, 1.0, 4.0]) == bootstrap([0.5, 1.0, 4.0])


def test_zeros_and_ones_have_wilson_s_interval(monkeypatch):
    result = evaluated(monkeypatch, ["5"] * 10, lambda completions, **_: [True, 0] * 5)
    assert (result["mean"]["all"], result["interval_by"]) == (0.5, "wilson")
    assert result["interval"]["all"] == wilson(5, 10)


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_rows_without_an_answer_are_counted_apart(monkeypatch, metric):
    rows = [{**row, "answer": "" if row["id"] in "012" else row["answer"]} for row in ROWS]
    result = evaluated(monkeypatch, [str(i) for i in range(5)] + ["no"] * 5, metric, rows)
    assert result["accuracy"] == {"all": 2 / 7, "system1": 1.0, "system2": 1 / 6}
    assert result["none"] == {"all": 3, "system1": 3}
    assert [a["correct"] for a in result["answers"]] == [None] * 3 + [True] * 2 + [False] * 5
    none = [{**row, "answer": ""} for row in ROWS]
    assert evaluated(monkeypatch, ["1"] * 10, metric, none)["accuracy"] == {}


def test_no_column_of_a_row_stands_for_what_the_model_has_answered(monkeypatch):
    rows = [{**row, "completions": row["answer"], "prompts": "?", "completion_ids": [1]} for row in ROWS]
    assert evaluated(monkeypatch, ["no"] * 10, None, rows)["accuracy"]["all"] == 0.0


def test_an_answer_may_be_a_number(monkeypatch):
    rows = [{**row, "answer": int(row["answer"])} for row in ROWS]
    given = [str(row["answer"]) for row in rows]
    assert evaluated(monkeypatch, given, None, rows)["accuracy"]["all"] == 1.0
    assert evaluated(monkeypatch, given, "closeness", rows)["mean"]["all"] == 1.0


def test_a_metric_of_the_user_s_by_name_async_and_in_chat_form(monkeypatch, tmp_path):
    (tmp_path / "my_metrics_of_the_test.py").write_text(
        "async def words(completions, **_):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = chat_tokenizer()
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_, **__: ["a b c", "a"])
    rows = [{"prompt": [{"role": "user", "content": "?"}], "answer": "1"}] * 2
    model = tiny_model(vocabulary=len(tokenizer))
    result = lorapar.evaluate(model, tokenizer, rows, metric="my_metrics_of_the_test:words")
    assert [a["value"] for a in result["answers"]] == [3.0, 1.0]
    assert evaluated(monkeypatch, ["2"] * 10, "closeness")["mean"]["all"] > 0.1
    with pytest.raises(InputError, match="evaluate.metric: unknown metric 'acuracy'; nearest: accuracy"):
        evaluated(monkeypatch, ["2"] * 10, "acuracy")
    with pytest.raises(RewardFailed, match=r"evaluate.metric: .* failed on row 3, whose completion begins '3'.*KeyErr"):
        evaluated(
            monkeypatch, [str(i) for i in range(10)], lambda words, **_: [1 if w != 3 else {}["x"] for w in words]
        )


def test_a_task_s_own_scorer_judges_its_rows(monkeypatch):
    row = {
        "prompt": "Make 10 of 2, 3 and 4.", "answer": "4 + 3*2", "task": "countdown",
        "metadata": '{"source_dataset": "countdown", "numbers": [2, 3, 4], "target": 10}',
    }  # fmt: skip
    assert evaluated(monkeypatch, ["2*3+4", "10"], None, [row, row])["accuracy"]["all"] == 0.5
