"""is_correct beside reasoning-gym's own scorers: a few tasks of each kind, the rest with `make verdicts`."""

import pytest

from tests.peers import verdicts

# Numbers, expressions, lists, grids, several lines, words, letters, names of squares, hexadecimal.
FEW = [
    *("chain_sum", "polynomial_multiplication", "polynomial_equations", "number_sorting", "mini_sudoku", "n_queens"),
    *("word_sorting", "knights_knaves", "syllogism", "tsumego", "bitwise_arithmetic", "complex_arithmetic", "ab"),
    *("tower_of_hanoi", "cryptarithm", "dice", "manipulate_matrix", "countdown", "simple_integration"),
]


def judged(tasks, rows):
    counts, left = verdicts.of_reasoning_gym(tasks, rows)
    assert counts["false right"] == 0, left
    assert counts["right, and called so"] == counts["right"] > 0, left
    assert counts["wrong"] > 0


def test_a_few_tasks_agree_with_their_own_scorers():
    pytest.importorskip("reasoning_gym")
    judged(FEW, rows=4)


@pytest.mark.slow
def test_every_task_agrees_with_its_own_scorer():
    factory = pytest.importorskip("reasoning_gym.factory")
    judged(sorted(set(factory.DATASETS) - {"composite"}), rows=3)


def test_a_false_right_ends_with_status_1(monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(verdicts, "is_correct", lambda completion, answer: True)
    monkeypatch.setattr("sys.argv", ["verdicts", "--rows", "4", "chain_sum"])
    for variable in ("LORAPAR_MATH_VERIFY_TESTS", "LORAPAR_GSM8K_SOLUTIONS", "LORAPAR_MATH_SOLUTIONS"):
        monkeypatch.delenv(variable, raising=False)
    assert verdicts.main() == 1
    assert "FALSE RIGHT" in capsys.readouterr().out
    monkeypatch.setattr(verdicts, "is_correct", lambda completion, answer: False)
    assert verdicts.main() == 0
    assert "a right answer is called wrong" in capsys.readouterr().out
