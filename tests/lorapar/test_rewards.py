"""Right and wrong answers in every usual form, and the rewards built on them."""

import math
import threading
import time

import pytest

from lorapar.data.answers import extract_answer, is_correct, marked_answer
from lorapar.errors import InputError
from lorapar.rewards import resolve_rewards

RIGHT = [
    # numbers as people write them
    ("72", "72"),
    (" 72.\n", "72"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1,234,567", "1234567"),
    ("$5", "5"),
    ("5", "$5"),
    ("$5.00", "5"),
    ("18$.", "18"),
    ("€24", "24"),
    (".5", "0.5"),
    ("+5", "5"),
    ("(5)", "5"),
    ("-3", "-3"),
    ("−3", "-3"),
    ("-$3", "-3"),
    ("so the result is -3", "-3"),
    ("1e3", "1000"),
    ("seven apples", "7"),
    # percent, fractions
    ("50%", "50"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("50 percent", "0.5"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("2 1/2", "2.5"),
    ("-2 1/2", "-2.5"),
    ("0.333333", "1/3"),
    # units
    ("18 dollars", "18"),
    ("18", "18 dollars"),
    ("60 km/h", "60"),
    ("5 m^2", "5"),
    # LaTeX and algebra
    (r"\boxed{18}", "18"),
    (r"The answer is $\boxed{18}$. I hope it is correct.", "18"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\dfrac{6}{8}", "3/4"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{\text{18 dollars}}", "18"),
    (r"\$18", "18"),
    (r"18^\circ", "18"),
    (r"\[ x = 7 \]", "7"),
    (r"5 \times 10^3", "5000"),
    (r"The total is \(3 \times 4 = 12\).", "12"),
    ("10^3", "1000"),
    ("2x+3", "3+2x"),
    ("x = 5", "5"),
    # in running text
    ("She has 3 and buys 4.\nSo 3 + 4 = 7\n#### 7", "7"),
    ("so he pays 3 * 6 = 18 dollars", "18"),
    ("The total is $64.\nHope this helps!", "64"),
    ("The answer is 18 dollars, which is 2 per day.", "18"),
    ("18 is 3 times 6.\nAnswer: 18", "18"),
    ("The answer is:\n24", "24"),
    ("3 out of 4, so the answer is 3/4", "0.75"),
    # the last stated answer counts, a tag wins
    ("The answer is 5. No wait, the answer is 6.", "6"),
    ("I think 5.\n<answer>6</answer> (not 7)", "6"),
    ("<reasoning>\n1 + 5\n</reasoning>\n<answer>\n6\n</answer>\n", "6"),
    # words
    ("Yes.", "yes"),
    ("**Paris**", "Paris"),
    ("The answer is: Paris.", "paris"),
    (r"\text{Yes}", "yes"),
    ("3:30", "3:30"),
]
WRONG = [
    ("7", "72"),
    ("72", "7"),
    ("1.5", "15"),
    ("15", "1.5"),
    ("-3", "3"),
    ("3", "-3"),
    ("1.0001", "1"),
    ("0.33", "1/3"),
    ("5000%", "50%"),
    ("0.5", "50"),
    ("1,5", "5"),
    ("1,5", "15"),
    ("100", "1e3"),
    ("seven", "8"),
    ("1/0", "1"),
    ("", "5"),
    ("   ", "5"),
    ("5", ""),
    ("I don't know", "5"),
    ("The answer is not 18.", "18"),
    ("the answer is 6. no, the answer is 5.", "6"),
    ("<answer>7</answer> 6", "6"),
    ("<answer></answer> 6", "6"),
    ("18 19", "18"),
    ("5+2", "2"),
    ("10-3", "3"),
    ("7 + x", "7"),
    # sums left to the reader: the question's echo is no answer
    ("7 - 2", "5"),
    ("7 + 9 - 0 = 7 + 9 - 0", "16"),
    ("12/2", "6"),
    (r"\frac{12}{2}", "6"),
    (r"3 \times 4", "12"),
    (r"\boxed{3 \cdot 4}", "12"),
    (r"$\sqrt{4}$", "2"),
    ("2^{3}", "8"),
    ("1 - 1/2", "1/2"),
    ("5 m^2", "2"),
    ("2x+3", "3x+2"),
    (r"\frac{1}{3}", "0.5"),
    ("3:45", "3:30"),
    ("3:45", "3"),
    ("2020-01-05", "2020-02-04"),
    ("1 2 4", "1 2 3"),
    ("north-east", "east-north"),
    ("no", "yes"),
    ("Yes and no", "yes"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right_answers_are_right(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong_answers_are_wrong(completion, answer):
    assert not is_correct(completion, answer)


def test_powers_too_large_to_work_out_are_wrong_at_once():
    began = time.monotonic()
    assert not any(is_correct(text, "5") for text in ("10^99999999", "9^9^9^9", r"10^{10^{10}}", "99999!"))
    assert time.monotonic() - began < 2


def test_math_verify_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_correct(r"\frac{35}{70}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_extract_answer():
    assert extract_answer(r"first \boxed{1}, then \boxed{\frac{1}{2}} indeed") == r"\frac{1}{2}"
    assert extract_answer("a\n#### 7\nor rather the answer is 8.") == "8"
    assert extract_answer("<answer>cut off 7") == "cut off 7"
    assert extract_answer("I count 3 of them.\nThat is all.") == "I count 3 of them."
    assert marked_answer("The answer is 8.") == ""
    assert marked_answer("48/2 = 24\n#### 24 ") == "24"


def rewards_of(name, texts, answers=None):
    function = resolve_rewards([name])[0]
    columns = {} if answers is None else {"answer": answers}
    as_text = function(prompts=["?"] * len(texts), completions=texts, completion_ids=[[1]] * len(texts), **columns)
    as_chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert function(prompts=["?"] * len(texts), completions=as_chat, **columns) == as_text
    return as_text


def test_rewards_by_answer():
    texts, answers = ["5", "6", "none", "5"], ["5", "5", "5", ""]
    assert rewards_of("accuracy", texts, answers) == [1.0, 0.0, 0.0, None]
    assert rewards_of("correct", texts, answers) == [2.0, 0.0, 0.0, None]
    assert rewards_of("closeness", texts, answers) == [1.0, pytest.approx(0.5 * math.exp(-1 / 3)), 0.0, None]
    # Repeating the question is worth nothing.
    assert rewards_of("closeness", ["2 + 3"], ["5"]) == [0.0]
    # Errors beyond what a float holds are worth nothing, and do not fail.
    assert rewards_of("closeness", ["9" * 400], ["5"]) == [pytest.approx(0)]
    with pytest.raises(InputError, match="needs a column 'answer'"):
        rewards_of("accuracy", texts)


def test_rewards_by_form():
    good = "<reasoning>\n1 + 4\nis 5\n</reasoning>\n<answer>\n5\n</answer>\n"
    one_line = "<reasoning>1 + 4</reasoning> <answer>5</answer>"
    chatter = good + "Any more questions?"
    assert rewards_of("strict_format", [good, one_line, chatter, "5"]) == [0.5, 0.0, 0.0, 0.0]
    assert rewards_of("soft_format", [good, one_line, chatter, "5"]) == [0.5, 0.5, 0.5, 0.0]
    after = len("Any more questions?")
    assert rewards_of("tags", [good, one_line, chatter, "5"]) == [
        0.5,
        0.0,
        pytest.approx(0.5 - 0.001 * after),
        0.0,
    ]
    assert rewards_of("tags", [good + "x" * 9000]) == [0.0]
    assert rewards_of("integer", [good, "-1,000", "5.0", "5 dollars", ""]) == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_resolve_rewards_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_the_test.py").write_text("def brevity(completions, **_):\n    return [1.0]\nNAME = 3\n")
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    brevity, accuracy = resolve_rewards(["my_rewards_of_the_test:brevity", "accuracy"])
    assert brevity(completions=["a"]) == [1.0]
    assert accuracy.__name__ == "accuracy"
    for name, message in [
        ("accurracy", "unknown reward 'accurracy'; nearest: accuracy"),
        ("no_such_module:f", "importing 'no_such_module' failed"),
        ("my_broken_rewards:f", "ZeroDivisionError"),
        ("my_rewards_of_the_test:brevty", "has no function 'brevty'"),
        ("my_rewards_of_the_test:NAME", "has no function 'NAME'"),
    ]:
        with pytest.raises(InputError, match=message):
            resolve_rewards([name])
    with pytest.raises(InputError, match="at least one"):
        resolve_rewards([])
