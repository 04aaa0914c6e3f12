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
from scipy import stats

from bench import evidence, study
from lorapar.errors import InputError
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
    assert study.parent_of("watched, twice the rate") == study.parent_of("watched") == "rows aside"


def test_arms_by_name():
    assert study.listed_arms("scores; all, all rows; scores") == ["scores", "all, all rows"]
    assert study.listed_precisions("float32,float32") == ["float32"]
    with pytest.raises(argparse.ArgumentTypeError, match="no arm 'score'; allowed: scores; all;"):
        study.listed_arms("score")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "score"], "no arm 'score'"),
        (["--precision", "bf16"], "no precision 'bf16'; allowed: bfloat16, float32, float16"),
        (["--recipe", "missing.yaml"], "missing.yaml: no such file"),
        (["--budgt", "3"], "unrecognized arguments"),
        (["--processes", "0"], "'0': expected a whole number of at least 1"),
        (["--seeds", "-1"], "'-1': expected a whole number of at least 1"),
        (["--summary", "--output", "x.jsonl"], "leave out --recipe and --output"),
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
    assert study.read_lines(path) == [{"a": 1}, {"a": 2}]
    with path.open("a+b") as file:
        study.cut_to_whole_lines(file)
        assert file.tell() > 0
        file.write(b'{"a": 3}\n')
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    path.write_text("")
    assert study.read_lines(path) == []


def test_a_line_is_of_no_run_once_its_arm_means_something_else():
    line = {"arm": "all", "seed": 1, "precision": OWN, "overrides": study.ARMS["all"]}
    assert study.planned(line) == study.Planned("all", 1, OWN)
    assert study.planned(line | {"overrides": {}}) is None
    assert study.planned(line | {"arm": "gone"}) is None


@pytest.mark.parametrize("name", ["lines.jsonl", "runs/lock"])
def test_two_studies_use_neither_one_file_nor_one_folder(name, tmp_path, capsys):
    import fcntl

    (tmp_path / "runs").mkdir()
    with (tmp_path / name).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        words = ["--output", str(tmp_path / "lines.jsonl"), "--folder", str(tmp_path / "runs")]
        assert study.main(words) == 2
    assert f"{tmp_path / name}: another study is using it" in capsys.readouterr().err


def test_arms_and_rates_are_the_recipe_s_own_times_a_factor_and_the_paper_s_rule_holds_in_each(tmp_path):
    values = recipe_values(tmp_path / "model")
    values["grpo"]["learning_rate"] = 3e-5
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert study.overrides("all, half the rate", recipe) == {"partition.selection": "all", "grpo.learning_rate": 1.5e-5}
    words = study.Planned("renewed, twice the rate", 1, OWN).command(recipe, tmp_path)
    given = dict(zip(words[words.index("--seed") :: 2], words[words.index("--seed") + 1 :: 2]))
    assert given["--grpo.learning_rate"] == "6e-05"
    assert (given["--score.renew"], given["--partition.system1_cost"], given["--grpo.watch_rows"]) == (
        "true",
        "0.0",
        "0",
    )


def test_a_recipe_s_digest_follows_what_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\noutput_dir: runs/x\n")
    before = study.recipe_digest(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\n# a remark\noutput_dir: runs/y\n")
    assert study.recipe_digest(tmp_path / "own.yaml") == before
    (tmp_path / "base.yaml").write_text("seed: 2\n")
    assert study.recipe_digest(tmp_path / "own.yaml") != before


def test_no_run_is_begun_that_would_not_end_within_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "labels", lambda *_: None)
    recipe, output = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path / "model")), tmp_path / "lines.jsonl"
    line = {"arm": "scores", "seed": 0, "precision": OWN, "overrides": {}, "seconds": 600.0}
    other = line | {"recipe": "another", "seconds": 9000.0}
    output.write_text(
        "".join(json.dumps(row) + "\n" for row in (line | {"recipe": study.recipe_digest(recipe)}, other))
    )
    words = ["--recipe", str(recipe), "--output", str(output), "--folder", str(tmp_path / "runs")]
    before = output.read_bytes()
    assert study.main([*words, "--budget", "9", "--arms", "scores;all", "--precision", OWN, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 runs have a line" in said
    assert "3 runs are left; none would end in time: the longest took 10.0 minutes" in said
    assert output.read_bytes() == before


def test_rows_that_evaluate_left_out_are_not_in_a_line(tmp_path):
    for name, rows in (
        ("labels.jsonl", [{"id": f"r{i}", "split": "held_out", "system": 1 + i % 2} for i in range(6)]),
        ("answers.jsonl", [{"model": m, "id": f"r{i}", "correct": i == 1} for m in study.MODELS for i in range(4)]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.json").write_text('{"partition": {}, "seconds": {"sft": 1.0}}')
    line = study.told(study.Planned("scores", 0, OWN), study.ROOT / study.RECIPE, tmp_path, tmp_path, {})
    assert line["answers"]["grpo"] == {"system1": "00", "system2": "10"}
    assert line["accuracy"]["base"] == {"system1": 0.0, "system2": 0.5}


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
    (folder / "copying-a").mkdir()
    subprocess.run([*command, "--processes", "2"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert output.read_bytes().startswith(lines)
    made = read_jsonl(output)
    assert made[0]["arm"] == "scores"
    assert sorted(line["arm"] for line in made) == ["all", "random", "scores"]
    assert not (folder / "copying-a").exists()
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


def test_the_interval_is_a_bootstrap_over_seeds_and_rows_with_the_seeds_part_as_wide_as_t_s():
    random = np.random.default_rng(3)
    values = (random.random((5, 80)) < random.random((5, 1))).astype(int)
    mean, low, high = evidence.interval(values)
    assert mean == values.mean()
    wider = 2.776 / 1.96 * (5 / 4) ** 0.5
    plain = []
    for _ in range(4000):
        seeds, rows = random.integers(0, 5, 5), random.integers(0, 80, 80)
        plain.append(mean + wider * (values[seeds].mean() - mean) + values[:, rows].mean() - mean)
    assert np.allclose([low, high], np.quantile(plain, [0.025, 0.975]), atol=0.02)
    # Seeds that all agree leave the rows' part alone.
    same = np.repeat(values[:1], 5, axis=0)
    _, low, high = evidence.interval(same)
    share = same.mean()
    assert high - low == pytest.approx(2 * 1.96 * (share * (1 - share) / 80) ** 0.5, rel=0.15)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.12])
def test_two_arms_that_are_alike_are_told_apart_in_one_study_of_twenty_at_most(seeds, spread):
    random, trials, wrong = np.random.default_rng(5), 300, 0
    for _ in range(trials):
        hard = random.beta(2, 2, 120)
        arms = np.clip(hard + random.normal(0, spread, (2, seeds, 1)), 0.02, 0.98)
        one, other = (random.random(arms.shape) < arms).astype(int)
        wrong += evidence.verdict(one - other) != "no clear difference"
    # Three standard deviations of the count above 5 %.
    assert wrong <= 0.05 * trials + 3 * (0.05 * 0.95 * trials) ** 0.5
    assert wrong > 0 or spread == 0


def test_arms_are_compared_at_the_seeds_that_both_have():
    better = {"system1": (0.9, 0.8), "system2": (0.2, 0.4)}
    worse = {"system1": (0.9, 0.5), "system2": (0.2, 0.3)}
    scores = evidence.Arm([drawn("scores", seed, better) for seed in (0, 1, 2, 3)])
    other = evidence.Arm([drawn("all", seed, worse) for seed in (2, 1, 7, 3)])
    values = evidence.difference(scores, other, "change", "system1")
    assert values.shape == (3, 40)

    def change(line):
        first, last = (np.array(list(line["answers"][stage]["system1"])) == "1" for stage in ("sft", "grpo"))
        return last.astype(int) - first.astype(int)

    expected = [change(drawn("scores", seed, better)) - change(drawn("all", seed, worse)) for seed in (1, 2, 3)]
    assert np.array_equal(values, expected)


def test_how_many_seeds_a_difference_needs_is_said_from_five_seeds_up():
    random = np.random.default_rng(7)
    values = random.normal(0.1, 0.1, (5, 40))
    means = values.mean(1)
    effect = means.mean() / means.std(ddof=1)
    count = int(evidence.needed(values).removeprefix("about "))
    # The noncentral t's own power, which the sum of two quantiles stands for.
    power = {n: 1 - stats.nct.cdf(stats.t.ppf(0.975, n - 1), n - 1, effect * n**0.5) for n in (count, count - 1)}
    assert power[count] > 0.78
    assert power[count - 1] < 0.82
    assert evidence.needed(values[:4]) == evidence.needed(0 * values) == "–"


def test_a_watched_run_that_kept_its_last_step_is_its_own_control():
    accuracy = {"system1": (0.9, 0.8), "system2": (0.2, 0.4)}
    lines = [drawn("watched", seed, accuracy) for seed in range(3)]
    for line, kept in zip(lines, (24, 12, 24)):
        line["watched"] = {"kept": kept, "losses": {"0": 0.1, "12": 0.1, "24": 0.1}}
    aside = drawn("rows aside", 2, accuracy, random=np.random.default_rng(11))
    arms = evidence.grouped([*lines, aside, drawn("scores", 0, accuracy)])["a device", OWN]
    assert arms["rows aside"].seeds == [0, 2]
    values = evidence.difference(arms["watched"], arms["rows aside"], "last", "system1")
    assert not values[0].any()
    assert values[1].any()


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
    in_bfloat16 = evidence.grouped([line | {"precision": "bfloat16"} for line in lines] + lines[:2])
    assert "- LoRA-PAR, float32: 3 of the planned seeds" in evidence.not_run(in_bfloat16)
    assert "- LoRA-PAR:" not in evidence.not_run(in_bfloat16)
    assert "LoRA-PAR minus plain LoRA: System 1 +100.0 [+100.0, +100.0] points (better)" in table
    assert "System 2 +0.0 [+0.0, +0.0] points (no clear difference)" in table
    assert table.startswith("Held-out accuracy, means over 3 to 5 seeds (a device, float32)")
    assert "**Choosing elements by importance has done no better here than choosing as many at random:**" in table
    better = [drawn("scores", seed, good) for seed in range(3)] + [drawn("random", seed, bad) for seed in range(3)]
    assert "done better than choosing as many at random in every comparison." in evidence.readme_table(
        evidence.grouped(better)
    )
    both = {"system1": (1.0, 0.0), "system2": (0.0, 1.0)}
    twice = [drawn("scores" + evidence.FAST, seed, both) for seed in range(5)]
    twice += [drawn("random" + evidence.FAST, seed, good) for seed in range(5)]
    assert "has done worse than choosing as many at random in some of" in evidence.readme_table(
        evidence.grouped([*lines, *twice])
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


def test_lines_that_cannot_be_pooled_are_refused(tmp_path):
    line = drawn("scores", 0, {"system1": (1.0, 1.0), "system2": (0.0, 1.0)})
    line |= {"recipe": study.recipe_digest(), "rows": "a"}

    def read(*lines):
        (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        return evidence.read_lines([tmp_path / "lines.jsonl"])

    assert len(read(line, line | {"seed": 1}, line | {"recipe": "another", "rows": "b"})) == 2
    with pytest.raises(InputError, match="two lines of one run: a device, float32, scores, 0"):
        read(line, line)
    with pytest.raises(InputError, match="several sets of held-out rows"):
        read(line, line | {"seed": 1, "rows": "b"})


def test_changes_are_compared_only_where_the_stages_are_the_same():
    accuracy = {"system1": (0.9, 0.8), "system2": (0.2, 0.4)}
    arms = {name: evidence.Arm([drawn(name, seed, accuracy) for seed in range(3)])
            for name in ("scores", "all", "grpo first", "all, all rows")}  # fmt: skip
    cells = {row.split(" | ")[0]: row.split(" | ")[2:] for row in evidence.differences(arms).splitlines()[4:]}
    assert len(cells) == 3
    for name, words in evidence.WORDS.items():
        if (row := cells.get(f"| {words}")) is not None:
            assert (row[0] == row[4] == "–") == (name != "all")
            assert row[2] != "–"


def test_gsm8k_s_line_is_shown_as_counts():
    assert evidence.gsm8k_table([]).endswith("Not run.")
    line = drawn("scores", 0, {"system1": (0.0, 1.0), "system2": (0.0, 0.0)}) | {"seconds": 1500.0, "threads": 2}
    row = evidence.gsm8k_table([line]).splitlines()[-1]
    assert row.endswith("| LoRA-PAR | 0 | 0 of 40 | 0 of 40 | 40 of 40 | 0 of 60 | 0 of 60 | 0 of 60 | 25 (2) |")
