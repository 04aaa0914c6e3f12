"""A user's rewards in GRPO: what they may return, what is said where they fail, and rewards that teach nothing."""

import functools
import json
import logging
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lorapar
from lorapar import InputError
from lorapar.errors import NothingLearned, RewardFailed
from lorapar.rewards import accuracy, checked, closeness
from lorapar.training.tally import RewardTally
from tests.lorapar.driver import lorapar as command
from tests.lorapar.driver import refused, skipped, succeeds
from tests.lorapar.test_training import ROWS, fresh, grpo_config, letters
from tests.tiny import tiny_tokenizer


def trained(folder, rewards, rows=ROWS, **keys):
    model, made = fresh()
    keys = {"weight_decay": 0.0, "max_steps": 2} | keys
    _, result = lorapar.grpo(model, tiny_tokenizer(), rows, made, grpo_config(folder, **keys), rewards)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    return result


def indices(completions, **_):
    return [index / 3 for index in range(len(completions))]


class Judge:
    def __call__(self, completions, **_):
        return indices(completions)


class SlowJudge:
    async def __call__(self, completions, **_):
        return indices(completions)


async def asked(completions, **_):
    return indices(completions)


MEAN = sum(range(8)) / 8 / 3


@pytest.mark.parametrize(
    ("reward", "mean"),
    [
        (lambda completions, **_: np.arange(8) / 3, MEAN),
        (lambda completions, **_: torch.arange(8) / 3, MEAN),
        (lambda completions, **_: (index / 3 for index in range(8)), MEAN),
        (lambda completions, **_: [True, False] * 4, 0.5),
        (functools.partial(lambda completions, by, **_: [index * by for index in range(8)], by=2), 7.0),
        (Judge(), MEAN),
        (asked, MEAN),
        (SlowJudge(), MEAN),
        # What is not finite counts as None, in every group.
        (lambda completions, **_: [float("inf"), 1.0, float("nan"), 3.0, -float("inf"), 1.0, None, 3.0], 2.0),
        (lambda completions, **_: [1e39, 1.0, 2.0, 3.0] * 2, 2.0),
    ],
)
def test_what_a_reward_may_return(tmp_path, reward, mean):
    entry = trained(tmp_path, [reward], max_steps=1).history[0]
    assert entry["reward"] == pytest.approx(mean)


def fails_at(wanted):
    def one_of_mine(completions, answer, **_):
        return [1.0 if value != wanted else {}["missing"] for value in answer]

    return one_of_mine


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (fails_at("3"), r"one_of_mine failed on row n3, .*KeyError: 'missing' \(test_user_rewards.py:\d+\)"),
        (lambda completions, **_: [1.0], r"returned 1 values, expected a list of 4 numbers or None.*rewards.py:\d+\)"),
        (lambda completions, **_: 1.0, "returned float, expected a list of 4 numbers"),
        (lambda completions, **_: None, "returned NoneType, expected a list of 4 numbers"),
        (lambda completions, **_: torch.tensor(1.0), "returned 1 values, expected a list of 4"),
        (lambda completions, **_: "good", "returned str, expected a list"),
        (lambda completions, **_: dict.fromkeys(range(4), 1.0), "returned dict, expected a list"),
        (lambda completions, **_: [1, 2, "good", 4], r"returned 'good' \(str\) for row n3, whose comp.* begins 'c'"),
        (lambda completions, **_: torch.ones(4, 2), r"returned 'tensor\(\[1., 1.\]\)' \(Tensor\) for row n1"),
        (lambda completions, **_: [[1.0]] * 4, r"returned '\[1.0\]' \(list\) for row n1"),
        (lambda completions: [1.0] * 4, r"failed on row n1, .*unexpected keyword argument.*rewards.py:\d+\)"),
        (lambda completions, **_: indices(completions[0].nothing), r"AttributeError: .*rewards.py:\d+\)"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_said_in_one_line_with_its_row(reward, says):
    columns = {"answer": ["1", "2", "3", "4"], "id": ["n1", "n2", "n3", "n4"], "trainer_state": None}
    with pytest.raises(RewardFailed, match=says) as raised:
        checked(reward)(prompts=["?"] * 4, completions=list("abcd"), completion_ids=[[1]] * 4, **columns)
    assert "\n" not in str(raised.value)


def test_an_async_reward_that_fails_names_its_row_too(tmp_path):
    async def judge(completions, answer, **_):
        if "5" in answer:
            raise ConnectionError("no\nanswer")
        return indices(completions)

    rows = ROWS.add_column("id", [f"row-{place}" for place in range(len(ROWS))])
    with pytest.raises(RewardFailed, match=r"judge failed on row row-\d+, .*ConnectionError: no answer \(test_user"):
        trained(tmp_path, [judge], rows.filter(lambda row: row["answer"] == "5"))


def test_nan_is_said_once_with_its_row_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lorapar"):
        trained(tmp_path, [lambda completions, **_: [float("nan"), *indices(completions)[1:]]])
    said = [record.getMessage() for record in caplog.records if "nan" in record.getMessage()]
    assert len(said) == 2
    assert re.search(r"returned nan for completion 1, whose completion begins '.*'; it counts as None", said[0])
    assert re.search(r"grpo: 2 values of .* were nan or infinite and counted as None", said[1])


def test_a_number_beyond_every_float_counts_as_none():
    checked_one = checked(lambda completions, **_: [10**400, Fraction(10**400), 10**39, 2.0])
    assert checked_one(["?"] * 4, ["a"] * 4) == [None, None, None, 2.0]
    assert checked_one.not_finite == 3


@pytest.mark.parametrize("value", [None, float("nan")])
def test_steps_without_a_reward_are_skipped_counted_and_said(tmp_path, caplog, value):
    steps = iter(range(9))

    def now_and_then(completions, **_):
        return [value] * len(completions) if next(steps) != 1 else indices(completions)

    with caplog.at_level(logging.WARNING, "lorapar"):
        result = trained(tmp_path, [now_and_then], max_steps=3)
    assert [entry.get("reward") for entry in result.history[:3]] == [None, pytest.approx(MEAN), None]
    assert "grpo: step 1: every reward was None or nan, so it taught nothing" in caplog.messages
    assert "grpo: every reward was None or nan in 2 of 3 logged steps" in caplog.messages


def test_rewards_that_are_equal_in_every_group_are_the_error(tmp_path, caplog):
    says = (
        r"grpo: nothing was trained: in all 4 groups the completions' rewards were equal \(mean 1\), so they gave no "
        r"gradient; try a higher grpo.temperature \(now 0.9\) or more grpo.num_generations \(now 4\).*"
        r"max_completion_length \(now 4\)"
    )
    with pytest.raises(NothingLearned, match=says):
        trained(tmp_path, [lambda completions, **_: [1.0] * len(completions)], temperature=0.9)
    with pytest.raises(NothingLearned, match="no reward function gave a value to any of 16 completions"):
        trained(tmp_path, [lambda completions, **_: [None] * len(completions)])
    # Long before the end, and also where weight decay moves the weights.
    with caplog.at_level(logging.INFO, "lorapar"):
        trained(tmp_path, [lambda completions, **_: [0] * len(completions)], max_steps=6, weight_decay=0.1)
    early, last = [message for message in caplog.messages if "groups the completions' rewards were equal" in message]
    assert early.startswith("grpo: after 5 batches, in all 10 groups")
    assert last.startswith("grpo: in all 12 groups the completions' rewards were equal (mean 0)")


def test_the_tally_by_hand():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [nan, nan], [2.0, nan], [nan, nan], [nan, nan]])
    tally = RewardTally()
    tally.add(rewards, torch.ones(2), 2, apart=False)
    # Sums 1 and 1; nothing and 2; nothing and nothing.
    assert (tally.groups, tally.equal, tally.completions, tally.unscored, tally.total) == (3, 3, 6, 3, 4.0)
    apart = RewardTally()
    apart.add(rewards, torch.ones(2), 2, apart=True)
    assert apart.equal == 2
    weighted = RewardTally()
    weighted.add(rewards, torch.tensor([1.0, 3.0]), 2, apart=False)
    assert weighted.equal == 2


def test_prompts_without_an_answer_are_told_before_the_first_step(tmp_path, caplog):
    def blank(count):
        return ROWS.map(lambda row, place: {"answer": "" if place < count else row["answer"]}, with_indices=True)

    with caplog.at_level(logging.WARNING, "lorapar"):
        trained(tmp_path, [accuracy, letters], blank(24))
    count = sum(system == 2 for system in ROWS["system"][:24])
    said = f"grpo.rewards: {count} of 24 prompts have no answer; accuracy gives them None; name the column with"
    assert any(message.startswith(said) for message in caplog.messages)
    for rows in (blank(48), ROWS.remove_columns("answer")):
        with pytest.raises(
            InputError, match="accuracy and closeness give no value without an answer, and none of the 24"
        ):
            trained(tmp_path, [accuracy, letters, closeness], rows)


def test_a_reward_that_cannot_be_called_is_refused_at_once(tmp_path):
    def alone(completions):
        return [1.0 for _ in completions]

    def needs(completions, difficulty, **columns):
        return [1.0 for _ in completions]

    for reward, why in ((alone, "unexpected keyword argument 'prompts'"), (needs, "a required argument: 'difficulty'")):
        with pytest.raises(
            InputError, match=rf"grpo.rewards: .*{why}.*needs \*\*columns.*answer.*test_user_rewards.py:\d"
        ):
            trained(tmp_path, [reward])
        with pytest.raises(InputError, match=f"evaluate.metric: .*{why}"):
            lorapar.evaluate(fresh()[0], tiny_tokenizer(), ROWS, metric=reward)
    with pytest.raises(InputError, match="unknown reward 'acuracy'; nearest: accuracy"):
        trained(tmp_path, ["acuracy"])
    with pytest.raises(InputError, match="expected at least one, got none"):
        trained(tmp_path, [])


# The command


DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BOOM = """

def boom(completions, answer, **_):
    return [len(text) / int(value[:0] or 0) for text, value in zip(completions, answer)]
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """docs/rewards.md's own, with a function that fails; and what its recipe says."""
    (code,) = re.findall(r"```python\n(# my_rewards.py\n.*?)```", DOCS, flags=re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(grpo:\n  rewards.*?)```", DOCS, flags=re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code + BOOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield yaml.safe_load(recipe)
    sys.modules.pop("my_rewards", None)


def test_the_command_says_one_line_and_the_log_has_the_rest(finished, changed_recipe, my_module):
    recipe = changed_recipe(grpo={"rewards": ["my_rewards:boom"]})
    code, _, said = command("grpo", recipe, "--output_dir", finished, "--update")
    assert code == 1
    assert all(line.startswith("lorapar: ") for line in said.splitlines())
    *_, last = said.splitlines()
    assert re.search("error: grpo.rewards: my_rewards:boom failed on row [0-9a-f]+, whose completion begins", last)
    line = (finished.parent / "my_rewards.py").read_text().splitlines().index(BOOM.splitlines()[3]) + 1
    assert f"ZeroDivisionError: division by zero (my_rewards.py:{line})" in last
    assert "Traceback (most recent call last)" in (finished / "run.log").read_text()


def test_the_documented_reward_and_metric_in_a_run(finished, changed_recipe, my_module):
    said = succeeds("run", changed_recipe(**my_module), "--output_dir", finished, "--update")
    assert skipped(said)[:4] == ["label", "score", "partition", "sft"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["metric"] == "my_rewards:overlap"
    assert set(metrics["mean"]["grpo"]) == {"all", "system1", "system2"}
    assert metrics["n"]["base"]["all"] == 12
    answers = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    assert all(0 <= answer["value"] <= 1 for answer in answers)
    assert "rewards/short/mean" in (finished / "grpo" / "log_history.json").read_text()
    assert "my_rewards:overlap" in (finished / "report.html").read_text()
    refused("run", changed_recipe(evaluate={"metric": "accurate"}), "--output_dir", finished, "--update",
            says=("evaluate.metric: unknown metric 'accurate'; nearest: accuracy",), alone=True)  # fmt: skip


def test_a_folder_made_before_there_were_metrics_is_done_before(finished, recipe_file):
    old = (finished / "recipe.yaml").read_text()
    assert "  metric: null\n" in old
    (finished / "recipe.yaml").write_text(old.replace("  metric: null\n", ""))
    said = succeeds("run", recipe_file, "--output_dir", finished)
    assert len(skipped(said)) == 8


def test_rows_without_an_answer_are_refused_before_anything_is_scored(changed_recipe, tmp_path):
    rows = [{"question": f"{i} + 1?", "text": "a long story " * 9, "sys": 1 + i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "question", "completion": "text"}
    data = {"sources": [{"name": str(tmp_path / "rows.jsonl")}], "columns": columns, "held_out": 2}
    recipe = changed_recipe(data=data, label={"column": "sys"})
    line = refused("run", recipe, "--output_dir", tmp_path / "run",
                   says=("grpo.rewards: closeness gives no value without an answer, and none of the",))  # fmt: skip
    assert "data.columns.answer" in line
    assert (tmp_path / "run" / "labels.jsonl").is_file()
    assert not (tmp_path / "run" / "start").exists()
