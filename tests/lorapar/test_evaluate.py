"""Accuracy by system, its interval, and greedy answers that do not depend on the batch."""

import pytest

import lorapar
from lorapar.errors import InputError
from lorapar.evaluating.evaluate import wilson
from tests.tiny import tiny_model, tiny_tokenizer


def test_counts_by_system(monkeypatch):
    rows = [{"id": str(i), "prompt": "?", "answer": str(i), "system": 1 + (i > 3)} for i in range(10)]
    said = [str(i) if i in (0, 1, 5) else "no" for i in range(10)]
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_: said)
    result = lorapar.evaluate(tiny_model(), tiny_tokenizer(), rows)
    assert result["accuracy"] == {"all": 0.3, "system1": 0.5, "system2": pytest.approx(1 / 6)}
    assert result["n"] == {"all": 10, "system1": 4, "system2": 6}
    assert [a["correct"] for a in result["answers"]] == [i in (0, 1, 5) for i in range(10)]
    low, high = result["interval"]["all"]
    assert low < 0.3 < high


def test_rows_without_a_system_give_the_whole_only(monkeypatch):
    monkeypatch.setitem(lorapar.evaluate.__globals__, "answer_greedily", lambda *_: ["1"])
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
