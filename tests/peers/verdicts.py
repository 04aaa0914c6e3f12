"""is_correct beside others who judge answers: agreement, and wrong answers that it calls right (`make verdicts`).

    python -m tests.peers.verdicts [--rows 25] [TASK ...]

- reasoning-gym's own scorers over all of its tasks: each right answer, and answers that the scorer gives less than its
  full score (those of other rows, and the right one in another order), in six forms.
- Math-Verify's own cases, where LORAPAR_MATH_VERIFY_TESTS names a checkout's `tests` folder.
- The solutions of models to GSM8K with their verdicts, where LORAPAR_GSM8K_SOLUTIONS names
  `example_model_solutions.jsonl` of github.com/openai/grade-school-math; their number a second on one core.
- MATH's solutions, where LORAPAR_MATH_SOLUTIONS names a .jsonl file of rows with a `solution`: the answer that each
  marks, against the solution and against itself in other forms.

Ends with status 1 if a wrong answer was called right. What is left, and why, is printed at the end.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapar.data.answers import is_correct, marked_answer

FORMS = {
    "bare": "{}",
    "stated": "The answer is {}.",
    "boxed": "\\boxed{{{}}}",
    "tag": "<answer>{}</answer>",
    "bold": "**{}**",
    "hashes": "#### {}",
}
LATEX_FORMS = {
    "stated": "So the answer is ${}$.",
    "minerva": "Final Answer: The final answer is ${}$. I hope it is correct.",
    "boxed": "\\[\n\\boxed{{{}}}\n\\]",
    "thought": "<think>Perhaps 1, or \\boxed{{2}}.</think>\n<answer>{}</answer>",
    "hashes": "#### {}",
}
# Why tasks of reasoning-gym have rows that are not judged here.
WITHOUT_ANSWER = "its rows hold no answer: only the task's own scorer can judge"


def wrong_answers(rows: list[dict[str, Any]], index: int) -> Iterator[str]:
    """Answers of other rows, and this row's in the reverse order, as text."""
    answer = str(rows[index]["answer"])
    for step in (1, 2, 7):
        yield str(rows[(index + step) % len(rows)]["answer"])
    for separator in (", ", "\n"):
        yield separator.join(reversed(answer.split(separator)))
    if answer.startswith("[") and answer.endswith("]"):
        yield f"[{', '.join(reversed(answer[1:-1].split(', ')))}]"


def score(dataset: Any, answer: str, row: dict[str, Any]) -> float:
    """The task's own score; 0 where its scorer fails on what it is given."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return float(dataset.score_answer(answer, row) or 0.0)
        except Exception:
            return 0.0


def of_reasoning_gym(tasks: list[str], rows: int) -> tuple[collections.Counter, list[str]]:
    """(counts over all tasks, what is left): right answers in all forms, and wrong ones by the task's own scorer."""
    import reasoning_gym

    total, left = collections.Counter(), []
    for task in tasks:
        dataset = reasoning_gym.create_dataset(task, size=rows, seed=1)
        entries = [dataset[index] for index in range(rows)]
        counts = collections.Counter()
        for index, entry in enumerate(entries):
            answer = entry["answer"]
            if answer is None or score(dataset, str(answer), entry) < 1.0:
                counts["unjudged"] += 1
                continue
            answer = str(answer)
            wrong = {one for one in wrong_answers(entries, index) if one not in (answer, "None")}
            wrong = [one for one in sorted(wrong) if score(dataset, one, entry) < 1.0]
            for form, template in FORMS.items():
                right = is_correct(template.format(answer), answer)
                counts["right"] += 1
                counts["right, and called so"] += right
                if not right:
                    left.append(f"{task}, {form}: a right answer is called wrong: {answer[:80]!r}")
                for one in wrong:
                    false = is_correct(template.format(one), answer)
                    counts["wrong"] += 1
                    counts["false right"] += false
                    if false:
                        left.append(f"{task}, {form}: FALSE RIGHT {one[:80]!r} for {answer[:80]!r}")
        if counts["unjudged"]:
            left.append(f"{task}: {counts['unjudged']} of {rows} rows: {WITHOUT_ANSWER}")
        print(
            f"  {task:24s} right {counts['right, and called so']:4d} of {counts['right']:4d}, "
            f"false rights {counts['false right']} of {counts['wrong']}",
            flush=True,
        )
        total += counts
    return total, left


# Cases of Math-Verify's that are judged otherwise here, by what their right answer is.
MATH_VERIFY_WHY = {
    "\\sum": "sums are compared letter by letter",
    "1 + \\frac{1}{\\mathrm{e}}": "1 - 1/e is not 1 + 1/e: its own case is a slip",
    "(9+1)": "a sum that is left to the reader is no answer",
    "\\frac3{3}": "a fraction that is left to the reader is no answer",
    "0.33": "a rounded value is right from six digits on",
    "2.6667": "a rounded value is right from six digits on",
    "{1,3}": "a set is no pair",
    "+ \\begin{pmatrix}": "a sum of matrices that is left to the reader is no answer",
    "\\end{pmatrix} \\begin{pmatrix}": "a product of matrices that is left to the reader is no answer",
    "\n 9 \n": "it reads formulas within a line alone; here a number stands on its own line",
    "I hope it is correct. Note": "a gold that is a whole solution without a sign for its answer",
    "[Note": "a completion that goes on for pages after its answer",
    "|z|": "the values of |z| and of z are told apart",
    "p=7,q=2": "pairs under one name each are not read as pairs",
    "\\zzz": "a chain with an unknown command in it",
    "W(n)": "a name with another argument",
    "not it's not 10": "denied twice",
    "-2 \\\\le x": "an interval and its inequality are the same here",
    "35 cm": "a measure and a number in braces are not read as a list",
    "1.22": "a right answer with a comma is a list",
    "0.111": "a right answer with a comma is a list",
}


# Run where Math-Verify's `tests` is the package of that name, which ours is here.
CASES = """
import importlib, json, pathlib
cases = []
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    module = importlib.import_module(f"tests.{path.stem}")
    for function in list(vars(module).values()):
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize" and "gold" in mark.args[0] and function.__module__ == module.__name__:
                names = [name.strip() for name in mark.args[0].split(",")]
                cases += [{"file": path.stem, **dict(zip(names, values))} for values in mark.args[1]]
print(json.dumps(cases))
"""


def of_math_verify(folder: Path) -> tuple[collections.Counter, list[str]]:
    """(counts, what is left) of the cases that Math-Verify's own tests are parametrised with."""
    if folder.name != "tests":
        raise SystemExit(f"LORAPAR_MATH_VERIFY_TESTS must name the folder `tests` of a checkout, got {folder}")
    run = subprocess.run([sys.executable, "-c", CASES], cwd=folder.parent, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"LORAPAR_MATH_VERIFY_TESTS: its tests do not import: {run.stderr.strip().splitlines()[-1]}")
    counts, left = collections.Counter(), []
    for case in json.loads(run.stdout):
        # Its loose mode, in which f(x) is f(y), is not what a reward is for.
        if case.get("strict") is False:
            continue
        expected, verdict = bool(case.get("expected", case.get("result"))), is_correct(case["pred"], case["gold"])
        counts["cases"] += 1
        counts["agree"] += verdict == expected
        if verdict != expected:
            why = next(
                (why for sign, why in MATH_VERIFY_WHY.items() if sign in case["pred"] or sign in case["gold"]), ""
            )
            counts["right here, wrong by its tests"] += verdict
            left.append(
                f"Math-Verify, {case['file']}: {'right' if verdict else 'wrong'} here: {case['pred'][-60:]!r} for "
                f"{case['gold'][-60:]!r}{': ' if why else ''}{why}"
            )
    return counts, left


def gsm8k_solutions(path: Path) -> list[tuple[str, str, bool]]:
    """(solution, right answer, verdict) of each model's solution to each of GSM8K's test questions."""
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = row["ground_truth"].rpartition("A: ")[2]
        cases += [(one["solution"], answer, one["is_correct"]) for one in row.values() if isinstance(one, dict)]
    return cases


def of_gsm8k(path: Path) -> tuple[collections.Counter, list[str]]:
    cases = gsm8k_solutions(path)
    began = time.thread_time()
    verdicts = [is_correct(solution, answer) for solution, answer, _ in cases]
    seconds = time.thread_time() - began
    counts = collections.Counter(
        {
            "cases": len(cases),
            "agree": sum(verdict == right for verdict, (_, _, right) in zip(verdicts, cases)),
            "false right": sum(verdict and not right for verdict, (_, _, right) in zip(verdicts, cases)),
            "a second of one core": round(len(cases) / seconds),
        }
    )
    left = [
        f"GSM8K: {'right' if verdict else 'wrong'} here: {solution[-60:]!r} for {answer!r}"
        for verdict, (solution, answer, right) in zip(verdicts, cases)
        if verdict != right
    ]
    return counts, left


def of_math(path: Path) -> tuple[collections.Counter, list[str]]:
    counts, left = collections.Counter(), []
    for line in path.read_text(encoding="utf-8").splitlines():
        solution = json.loads(line)["solution"]
        answer = marked_answer(solution)
        for form, text in [("solution", solution), *((form, one.format(answer)) for form, one in LATEX_FORMS.items())]:
            right = is_correct(text, answer)
            counts["cases"] += 1
            counts["agree"] += right
            if not right:
                left.append(f"MATH, {form}: a right answer is called wrong: {answer!r}")
    return counts, left


def main() -> int:
    parser = argparse.ArgumentParser(description="is_correct beside others who judge answers")
    parser.add_argument("tasks", nargs="*", help="tasks of reasoning-gym; all of them by default")
    parser.add_argument("--rows", type=int, default=25, help="rows a task")
    arguments = parser.parse_args()
    from reasoning_gym.factory import DATASETS

    tasks = arguments.tasks or sorted(set(DATASETS) - {"composite"})
    print(f"reasoning-gym, {len(tasks)} tasks, {arguments.rows} rows each, {len(FORMS)} forms:")
    results = {"reasoning-gym": of_reasoning_gym(tasks, arguments.rows)}
    for title, variable, judge in (
        ("Math-Verify's cases", "LORAPAR_MATH_VERIFY_TESTS", of_math_verify),
        ("GSM8K's solutions", "LORAPAR_GSM8K_SOLUTIONS", of_gsm8k),
        ("MATH's solutions", "LORAPAR_MATH_SOLUTIONS", of_math),
    ):
        if os.environ.get(variable):
            results[title] = judge(Path(os.environ[variable]).resolve())
        else:
            print(f"{title}: left out, {variable} names nothing")
    print("\nLeft:")
    for _, left in results.values():
        for line in left:
            print(f"  {line}")
    print()
    for title, (counts, _) in results.items():
        print(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    return 1 if sum(counts["false right"] for counts, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
