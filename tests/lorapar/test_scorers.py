"""reasoning-gym's own scorers, which decide where a task has many right answers, on any text a model may write."""

import functools
import inspect
import itertools
import json
import re
import sys
import threading
import time

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from lorapar import InputError
from lorapar.data import task_scores
from lorapar.data.sources import read_source
from lorapar.data.task_scores import check_tasks, is_right, score_by_task, within
from lorapar.recipe.sections import SourceConfig
from lorapar.rewards import REWARDS

# Without an answer or an example of one; several tasks in one; and those that take seconds a row.
NOT_HERE = ("boxnet", "rush_hour", "composite", "knight_swap")


@functools.cache
def rows_of(task, size=1, seed=7, **options):
    """Rows as a labelled file holds them."""
    source = SourceConfig(name=f"reasoning_gym:{task}", size=size, seed=seed, config=options)
    rows = [row for _, row in read_source(source)]
    return json.loads(json.dumps([{**row, "id": f"{task} {i}"} for i, row in enumerate(rows)]))


def reward(name, texts, rows):
    columns = {key: [row.get(key) for row in rows] for key in ("answer", "task", "metadata", "task_config")}
    return REWARDS[name](prompts=["?"] * len(texts), completions=texts, completion_ids=None, **columns)


def test_of_every_task_the_answer_itself_is_right_in_the_usual_forms_and_another_is_not():
    forms = (
        "{}",
        "<answer>\n{}\n</answer>",
        "<think>Is it 5?</think>\n{}",
        "Here it is:\n```\n{}\n```",
        "My grid:\n\n{}",
    )
    for task in sorted(set(DATASETS) - set(NOT_HERE)):
        (row,) = rows_of(task)
        for form in forms:
            assert is_right(form.format(row["answer"]), row), (task, form, row["answer"])
        assert not is_right("<think>\n" + row["answer"], row), task
        for wrong in ("", "nan", "[NaN, NaN, NaN]", "no idea", "{}", "-12345.678", "inf"):
            assert not is_right(wrong, row), (task, wrong)
        # The scorer itself agrees, on what is left of the row after JSON.
        check_tasks([row])


def test_countdown_takes_every_valid_expression_and_nothing_else():
    right = 0
    for row in rows_of("countdown", 12, seed=0, min_numbers=4, max_numbers=4, max_target=200):
        metadata = json.loads(row["metadata"])
        numbers, target = metadata["numbers"], metadata["target"]
        for order, signs in itertools.product(itertools.permutations(numbers), itertools.product("+-*", repeat=3)):
            text = "".join(f"{n}{sign}" for n, sign in zip(order, [*signs, ""]))
            if eval(text) == target and text != row["answer"].replace(" ", ""):
                right += 1
                assert reward("accuracy", [text, f"<answer>{text}</answer>"], [row, row]) == [1.0, 1.0], text
                break
        used = "+".join(map(str, numbers))
        # The target alone, other numbers, a number twice, all numbers and another value.
        for wrong in (str(target), f"{target}+0", f"{used}-{used}+{target}", f"{used}+{numbers[0]}", used + "*0"):
            assert reward("accuracy", [wrong], [row]) == [0.0], wrong
    assert right >= 3


def test_one_expression_for_every_puzzle_is_no_answer():
    for row in rows_of("puzzle24", 3):
        numbers = json.loads(row["metadata"])["numbers"]
        assert is_right("6+6+6+6", row) == (sorted(numbers) == [6, 6, 6, 6])
        assert is_right(row["answer"], row)


@pytest.mark.parametrize(
    ("task", "options", "wrong"),
    # Each gets the full score of the task's own scorer (reasoning-gym 0.1.25).
    [
        ("complex_arithmetic", {}, "nan"),
        ("game_of_life_halting", {}, "I do not know"),
        ("number_sorting", {"min_numbers": 3, "max_numbers": 3}, "[NaN, NaN, NaN]"),
        ("coin_flip", {"min_trials": 15, "max_trials": 15}, "0"),
        ("letter_jumble", {}, "{} and so on"),
        ("simple_integration", {}, "Integral({integrand}, {variable})"),
    ],
)
def test_what_a_task_s_scorer_takes_and_is_wrong(task, options, wrong):
    rows = rows_of(task, 6, **options)
    texts = [wrong.format(row["answer"], **json.loads(row["metadata"])) for row in rows]
    scorer = reasoning_gym.create_dataset(task, **options)
    entries = [{"answer": row["answer"], "metadata": json.loads(row["metadata"])} for row in rows]
    assert 1 in [scorer.score_answer(text, entry) for text, entry in zip(texts, entries)]
    assert not any(is_right(text, row) for text, row in zip(texts, rows))


def test_a_task_s_options_reach_its_scorer():
    # Two places are asked for, and the default tolerance is that of six.
    (row,) = rows_of("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=2)
    near = f"{float(row['answer']) + 0.004:.3f}"
    assert json.loads(row["task_config"]) == {"max_num_decimal_places": 2, "min_num_decimal_places": 2}
    assert score_by_task(near, row) == 1
    assert score_by_task(near, {**row, "task_config": None}) == 0
    (row,) = rows_of("word_ladder", min_word_length=5, max_word_length=5)
    assert check_tasks([row]) is None
    assert score_by_task(row["answer"].lower(), row) == 1


def test_many_right_answers_of_tasks_that_give_only_an_example():
    (row,) = rows_of("graph_color", num_colors=3)
    colours = json.loads(row["answer"])
    other = {vertex: {1: 2, 2: 3, 3: 1}[colour] for vertex, colour in colours.items()}
    assert is_right(json.dumps(other), row)
    assert not is_right(json.dumps(dict.fromkeys(colours, 1)), row)
    (row,) = rows_of("rubiks_cube")
    assert is_right(row["answer"] + " U U U U", row)
    assert not is_right(row["answer"] + " U", row)
    with pytest.raises(InputError, match="rush_hour gives no right answer"):
        rows_of("rush_hour")


HOSTILE = (
    "9**9**9",
    "9**9**9**9**9",
    "10**99999999",
    "((((9**99)**99)**99)**99)**99",
    "exp(exp(exp(exp(9.9))))",
    "1e99999999",
    "9" * 5000,
    "(" * 400 + "1" + ")" * 400,
    "-" * 900 + "1",
    "[" * 900,
    '{"a":' * 900,
    "U999999999",
    "A+999999999",
    "x**99/(x+1)**99*sin(x)**99*cos(x)**99/(x**2+x+1)**50",
    "<answer>" * 900,
    "[x for a in [1]*99 for b in [1]*99 for c in [1]*99 for d in [1]*99]",
    "1+" * 30000 + "1",
    "a b c\n" * 9000,
)
RUNS_CODE = (
    "__import__('pathlib').Path('{}').write_text('')",
    "open('{}', 'w')",
    "[open('{}', 'w')]",
    "(lambda: open('{}', 'w'))()",
    "5 + len(str(open('{}', 'w')))",
    "print.__self__.open('{}', 'w')",
    "sin(open('{}', 'w'))",
)


def test_no_text_makes_a_scorer_fail_stall_or_run_code(tmp_path):
    made, slowest = tmp_path / "made", 0.0
    for task in sorted(set(DATASETS) - set(NOT_HERE) - {"futoshiki", "zebra_puzzles", "sokoban"}):
        (row,) = rows_of(task)
        score_by_task("warm up", row)
        for text in (*HOSTILE, *(code.format(made) for code in RUNS_CODE)):
            began = time.perf_counter()
            score = score_by_task(text, row)
            slowest = max(slowest, time.perf_counter() - began)
            assert 0 <= score < 1, (task, text[:40])
        assert not made.exists(), task
    assert slowest < 6


def reached(data_set):
    """(the source of all that a data set's scorer calls of itself, and the attributes that it reads there)."""
    source, attributes, seen, found = "", set(), set(), ["score_answer"]
    while found:
        name = found.pop()
        method = inspect.getattr_static(data_set, name, None)
        method = getattr(method, "__func__", method)
        if name not in seen and inspect.isfunction(method):
            source += inspect.getsource(method)
            found += re.findall(r"self\.(\w+)", inspect.getsource(method))
        elif not inspect.isfunction(method):
            attributes.add(name)
        seen.add(name)
    return source, attributes


def test_what_scorers_evaluate_and_read_is_known():
    """Of a newer reasoning-gym too: whoever adds a task to a table has read its scorer."""
    for task in sorted(set(DATASETS) - {"composite"}):
        source, attributes = reached(DATASETS[task][0])
        # number_sorting evaluates the row's own answer alone.
        if re.search(r"\b(?:eval|exec|parse_expr|sympify)\(", source) and task != "number_sorting":
            assert task in task_scores.FORMS, f"{task}: its scorer evaluates text"
        # Sokoban's are the same whatever its options.
        if attributes and task != "sokoban":
            assert task in task_scores.BY_OPTIONS, f"{task}: its scorer reads {attributes}"


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_scorer_is_stopped_in_any_thread_and_nothing_later_is(in_thread):
    found = []

    def stubborn():
        while True:
            try:
                sum(range(1000))
            except BaseException:
                break
        return 1.0

    def endless():
        while True:
            sum(range(1000))

    def run():
        began = time.monotonic()
        found.extend([within(0.1, endless), within(0.1, stubborn), within(5, lambda: 0.5)])
        sum(range(1_000_000))
        found.append(time.monotonic() - began)

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
    else:
        run()
    assert found[:3] == [0.0, 1.0, 0.5]
    assert found[3] < 3


def test_a_call_that_never_began_is_not_struck_later(monkeypatch):
    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        within(0.05, lambda: 1.0)
    monkeypatch.undo()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        sum(range(1000))


def test_threads_that_score_together_leave_stdout_as_it_was():
    shown, row = sys.stdout, {"answer": "1 + 2", "task": "countdown", "metadata": json.dumps(
        {"source_dataset": "countdown", "numbers": [1, 2], "target": 3})}  # fmt: skip
    threads = [threading.Thread(target=lambda: [score_by_task("2 + 1", row) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.stdout is shown


def test_columns_of_the_same_names_that_are_no_task_s_are_left_alone():
    for columns in ({"task": "sudoku", "metadata": "{}"}, {"task": 3, "metadata": None}, {"metadata": "no JSON"},
                    {"task": "sudoku", "metadata": '{"source_dataset": "mine"}'}):  # fmt: skip
        assert is_right("so it is 5", {"answer": "5", **columns})
        assert score_by_task("5", {"answer": "5", **columns}) is None


def test_a_row_that_its_own_scorer_does_not_take_is_refused():
    (row,) = rows_of("countdown")
    with pytest.raises(InputError, match="scorer of countdown gives the answer of row countdown 0 itself 0.05, exp"):
        check_tasks([{**row, "answer": "1 + 2"}])
    with pytest.raises(InputError, match="scorer of arc_agi failed on the answer of row x itself"):
        check_tasks([{"id": "x", "answer": "1", "task": "arc_agi", "metadata": '{"source_dataset": "arc_agi"}'}])


def test_plain_numbers_and_words_are_right_in_any_usual_form():
    (number,), (word,) = rows_of("chain_sum"), rows_of("color_cube_rotation")
    gold = number["answer"]
    for text in (f"The sum is {gold}.", f"I get 1 + 2 = {gold}", f"{gold}.0", f"#### {gold} apples"):
        assert is_right(text, number), text
    assert is_right(f"The answer is {word['answer'].title()}.", word)
    # Where the form is the question, the value is not enough.
    (fraction,) = rows_of("fraction_simplification")
    one, two = re.findall(r"\d+", fraction["answer"])
    assert is_right(f"{one}/{two}", fraction)
    assert not is_right(f"{2 * int(one)}/{2 * int(two)}", fraction)


def test_task_score_gives_parts_and_none_for_other_rows():
    (row,) = rows_of("mini_sudoku")
    lines = row["answer"].splitlines()
    part = "\n".join([*lines[:2], "9 9 9 9", "9 9 9 9"])
    whole, some, none = reward("task_score", [row["answer"], part, "?"], [row] * 3)
    assert (whole, none) == (1.0, 0.0)
    assert 0.3 < some < 0.6
    # A board is no number, however near its last digit comes.
    assert reward("closeness", [row["answer"], part], [row] * 2) == [1.0, 0.0]
    assert reward("task_score", ["5", "5"], [{"answer": "5"}, {"answer": ""}]) == [None, None]
