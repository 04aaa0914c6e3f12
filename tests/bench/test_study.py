"""bench/study.py: what is run and what is not run again, a kill at any point; bench/evidence.py: its statistics."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import evidence, study
from lorapar.files import read_jsonl
from lorapar.pipeline.records import records
from lorapar.recipe.reading import load_recipe
from tests.lorapar.driver import recipe_values, write_recipe
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
OWN = "float32"


def test_the_main_arms_come_first_at_five_seeds_then_the_others_at_three():
    runs = study.plan(list(study.ARMS), None, ["bfloat16", OWN])
    main = len(study.MAIN) * 5
    assert {(run.arm, run.seed) for run in runs[:main]} == {(arm, seed) for arm in study.MAIN for seed in range(5)}
    assert [run.arm for run in runs[: len(study.MAIN)]] == list(study.MAIN)
    assert len(runs) == len(set(runs)) == main + 3 * (len(study.ARMS) - len(study.MAIN)) + main
    assert {run.precision for run in runs[-main:]} == {OWN}
    assert len({run.name for run in runs}) == len(runs)


def test_what_is_the_same_but_for_grpo_is_taken_from_the_arm_that_has_it():
    assert study.parent_of("all, twice the rate") == "all"
    assert study.parent_of("random, twice the rate") == "random"
    assert study.parent_of("rank") == study.parent_of("all, all rows") == "scores"


def test_arms_by_name():
    assert study.listed_arms("scores; all, all rows") == ["scores", "all, all rows"]
    with pytest.raises(argparse.ArgumentTypeError, match="no arm 'score'; allowed: scores; all;"):
        study.listed_arms("score")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "score"], "no arm 'score'"),
        (["--precision", "bf16"], "no precision 'bf16'; allowed: bfloat16, float32, float16"),
        (["--recipe", "missing.yaml"], "missing.yaml: no such file"),
        (["--budgt", "3"], "unrecognized arguments"),
    ],
)
def test_what_is_misspelt_is_refused_before_any_work(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_half_a_line_is_cut_off_and_the_rest_kept(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    with path.open("a+b") as file:
        assert study.whole_lines(file) == [{"a": 1}, {"a": 2}]
        file.write(b'{"a": 3}\n')
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_line_is_of_no_run_once_its_arm_means_something_else():
    line = {"arm": "all", "seed": 1, "precision": OWN, "overrides": study.ARMS["all"]}
    assert study.planned(line) == study.Planned("all", 1, OWN)
    assert study.planned(line | {"overrides": {}}) is None
    assert study.planned(line | {"arm": "gone"}) is None


def test_two_studies_do_not_write_to_one_file(tmp_path, monkeypatch, capsys):
    import fcntl

    with (tmp_path / "lines.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert study.main(["--output", str(tmp_path / "lines.jsonl")]) == 2
    assert "another study is writing to it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_study_repeats_no_finished_run_and_tears_no_line(tmp_path):
    """Killed with -9 while its second run trains, then the same command."""
    save_tiny_model(tmp_path / "model")
    values = recipe_values(tmp_path / "model")
    values["grpo"] |= {"max_steps": 6, "save_steps": 1}
    recipe, output, folder = write_recipe(tmp_path / "r.yaml", values), tmp_path / "lines.jsonl", tmp_path / "runs"
    command = [sys.executable, "-m", "bench.study", "--recipe", str(recipe), "--arms", "scores;random;all", "--seeds",
               "1", "--precision", OWN, "--output", str(output), "--folder", str(folder)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    going = folder / "random-0-float32"
    began = time.monotonic()
    while not list(going.glob("grpo/checkpoint-*")):
        assert first.poll() is None
        assert time.monotonic() - began < 300
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    lines = output.read_bytes()
    assert [json.loads(line)["arm"] for line in lines.splitlines()] == ["scores"]
    labelled = records(folder / "scores-0-float32")
    output.write_bytes(lines + b'{"arm": "random", "se')
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert output.read_bytes().startswith(lines)
    made = read_jsonl(output)
    assert [line["arm"] for line in made] == ["scores", "random", "all"]
    assert records(folder / "scores-0-float32") == labelled
    said = (folder / "random-0-float32.log").read_text()
    assert said.count("grpo: started") == 2
    assert said.count("sft: done in") == 1  # before the kill, and not again
    # The labels and scores of the first run served the others.
    assert "label: done before, skipped" in said
    assert "score: done before, skipped" in said
    for line in made:
        for stage, by in line["answers"].items():
            for system, bits in by.items():
                assert set(bits) <= {"0", "1"}
                assert line["accuracy"][stage][system] == bits.count("1") / len(bits)
    assert len({line["rows"] for line in made}) == 1
    assert made[0]["answers"]["base"] == made[1]["answers"]["base"] == made[2]["answers"]["base"]
    whole = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "3 of 3 runs have a line" in whole.stdout
    assert read_jsonl(output) == made


def drawn(arm, seed, accuracy, rows=(40, 60), random=None):
    """A line with answers drawn at the given (first, last) accuracy of each system."""
    random = random or np.random.default_rng([seed, len(arm)])
    stages = study.ARMS[arm].get("stages", ["sft", "grpo"])
    answers = {"base": {s: "0" * n for s, n in zip(study.SYSTEMS, rows)}}
    for when, stage in enumerate(stages):
        answers[stage] = {
            s: "".join(str(int(random.random() < accuracy[s][when])) for _ in range(n))
            for s, n in zip(study.SYSTEMS, rows)
        }
    return {"arm": arm, "seed": seed, "precision": OWN, "overrides": study.ARMS[arm], "answers": answers,
            "device": "a device"}  # fmt: skip


def test_the_interval_is_that_of_a_plain_bootstrap_over_seeds_and_rows():
    random = np.random.default_rng(3)
    values = (random.random((5, 80)) < random.random((5, 1))).astype(int)
    mean, low, high = evidence.interval(values)
    assert mean == values.mean()
    plain = []
    for _ in range(4000):
        seeds, rows = random.integers(0, 5, 5), random.integers(0, 80, 80)
        plain.append(values[seeds][:, rows].mean())
    assert np.allclose([low, high], np.quantile(plain, [0.025, 0.975]), atol=0.02)
    # Seeds that all agree leave the rows' part alone.
    same = np.repeat(values[:1], 5, axis=0)
    _, low, high = evidence.interval(same)
    share = same.mean()
    assert high - low == pytest.approx(2 * 1.96 * (share * (1 - share) / 80) ** 0.5, rel=0.15)


def test_arms_are_compared_at_the_seeds_that_both_have():
    better = {"system1": (0.9, 0.8), "system2": (0.2, 0.4)}
    worse = {"system1": (0.9, 0.5), "system2": (0.2, 0.3)}
    scores = evidence.Arm([drawn("scores", seed, better) for seed in (0, 1, 2, 3)])
    other = evidence.Arm([drawn("all", seed, worse) for seed in (2, 1, 7, 3)])
    values, needed = evidence.difference(scores, other, "change", "system1")
    assert values.shape == (3, 40)

    def change(line):
        first, last = (np.array(list(line["answers"][stage]["system1"])) == "1" for stage in ("sft", "grpo"))
        return last.astype(int) - first.astype(int)

    expected = [change(drawn("scores", seed, better)) - change(drawn("all", seed, worse)) for seed in (1, 2, 3)]
    assert np.array_equal(values, expected)
    means = np.mean(expected, axis=1)
    assert evidence.difference(scores, other.at((1, 2)), "change", "system1")[1] == 0  # too few to say
    assert needed == max(2, int(np.ceil((2.8 * means.std(ddof=1) / means.mean()) ** 2)))


def test_where_grpo_comes_first_the_last_stage_is_sft():
    arm = evidence.Arm([drawn("grpo first", 0, {"system1": (0.0, 1.0), "system2": (0.0, 1.0)})])
    assert arm.bits["first"]["system1"].mean() == 0
    assert arm.bits["last"]["system1"].mean() == 1


def test_the_page_says_what_was_not_run_and_whether_importance_beats_chance():
    good, bad = {"system1": (1.0, 1.0), "system2": (0.0, 1.0)}, {"system1": (1.0, 0.0), "system2": (0.0, 0.5)}
    lines = [drawn("scores", seed, good) for seed in range(5)]
    lines += [drawn("all", seed, bad) for seed in range(5)] + [drawn("random", seed, good) for seed in range(3)]
    groups = evidence.grouped(lines)
    page, table = evidence.page(groups), evidence.readme_table(groups)
    assert "- as many elements, chosen at random: 2 of the planned seeds" in page
    assert "- whole tiles: 3 of the planned seeds" in page
    assert "LoRA-PAR minus plain LoRA: System 1 +100.0 [+100.0, +100.0] points (better)" in table
    assert "System 2 +0.0 [+0.0, +0.0] points (no clear difference)" in table
    assert table.startswith("Means over 3 to 5 seeds (a device, float32)")
    assert "**Choosing elements by importance has done no better here than choosing as many at random.**" in table
    better = [drawn("scores", seed, good) for seed in range(3)] + [drawn("random", seed, bad) for seed in range(3)]
    assert "done better than choosing as many at random in every comparison." in evidence.readme_table(
        evidence.grouped(better)
    )
    few = evidence.grouped([line for line in lines if line["seed"] < 2])
    assert "(too few seeds to say)" in evidence.readme_table(few)
    assert not re.search("better|worse|no clear|importance", evidence.readme_table(few))
    text = f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter"
    assert evidence.with_figures(text, "new") == f"before\n{evidence.BEGIN}\nnew\n{evidence.END}\nafter"
    with pytest.raises(ValueError, match="are not both there"):
        evidence.with_figures("no marks", "new")


def test_the_page_readme_and_the_yardstick_are_those_of_the_lines():
    groups = evidence.grouped(evidence.read_lines(sorted(study.RESULTS.glob("*.jsonl"))))
    gsm8k = evidence.read_lines(sorted(study.RESULTS.glob("*.jsonl")), evidence.GSM8K)
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page(groups, gsm8k)
    readme = evidence.README.read_text(encoding="utf-8")
    assert readme == evidence.with_figures(readme, evidence.readme_table(groups))
    assert json.loads(evidence.YARDSTICK.read_text(encoding="utf-8")) == json.loads(
        json.dumps(evidence.yardstick(groups))
    )


def test_a_way_beyond_the_paper_is_a_default_only_where_one_system_is_better_and_neither_is_worse():
    own = {"system1": (1.0, 0.5), "system2": (0.0, 0.5)}

    def chosen(system1, system2, seeds=3):
        way = {"system1": (1.0, system1), "system2": (0.0, system2)}
        lines = [drawn("scores", seed, own) for seed in range(seeds)]
        return evidence.chosen(
            evidence.grouped([*lines, *(drawn("renewed", seed, way) for seed in range(seeds))])[("a device", OWN)]
        )

    assert chosen(1.0, 0.5) == ["renewed"]
    assert chosen(1.0, 0.0) == []
    assert chosen(0.5, 0.5) == []
    assert chosen(1.0, 1.0, seeds=2) == []


def test_the_recipe_s_defaults_are_those_that_the_study_chose():
    recipe = load_recipe(ROOT / study.RECIPE)
    on = {
        "renewed": recipe.score.renew,
        "cost": recipe.partition.system1_cost > 0,
        "watched": recipe.grpo.watch_rows > 0,
    }
    arms = next(iter(evidence.grouped(evidence.read_lines(sorted(study.RESULTS.glob("*.jsonl")))).values()))
    assert {way for way, is_on in on.items() if is_on} == {way.split()[0] for way in evidence.chosen(arms)}


def test_gsm8k_s_line_is_shown_as_counts():
    page = evidence.gsm8k_table([])
    assert page.endswith("Not run.")
    line = drawn("scores", 0, {"system1": (0.0, 1.0), "system2": (0.0, 0.0)}) | {"seconds": 1500.0}
    assert "| LoRA-PAR | 0 | 0 of 40 | 0 of 40 | 40 of 40 | 0 of 60 | 0 of 60 | 0 of 60 | 25 |" in evidence.gsm8k_table(
        [line]
    )
