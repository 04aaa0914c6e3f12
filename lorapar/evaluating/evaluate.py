"""Greedy answers on held-out rows and what they are worth: right or wrong, or by a metric, with intervals by system."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from torch import nn

from ..data.rows import without_arrows_nulls
from ..data.tokens import check_known, prompt_ids
from ..distributed import processes
from ..errors import require
from ..intervals import bootstrap, wilson
from ..model.generate import answer_greedily
from ..model.positions import positions_of
from ..progress import Progress
from ..rewards import Reward, accuracy, check_call, checked, is_async, resolve_reward

log = logging.getLogger("lorapar")
# What a metric is given of each answer, whatever columns the rows have.
GIVEN = ("prompt", "prompts", "completions", "completion_ids")
GROUPS = ("all", "system1", "system2")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Mapping[str, Any]] | Any,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    description: str = "evaluate",
    metric: str | Reward | None = None,
) -> dict[str, Any]:
    """Answer every row greedily and say what the answers are worth.

    In a launch every process calls it with the same arguments, answers its part of the batches, and returns the same;
    the main process alone calls the metric.

    Args:
        dataset: rows with prompt, what the metric reads (answer), and, for the figures by system, system.
        max_new_tokens: an answer's length limit, or less where the model's positions end; batch_size: prompts generated
            at a time.
        metric: a reward function of TRL's form, `f(prompts, completions, completion_ids, **columns) -> list of numbers
            or None`, the name of one of `lorapar.rewards`, or "module:function". It is called once, with every row; the
            columns are the rows' own (`completion` is a list of references). None: accuracy.

    Returns {"accuracy": {group: share}, "interval": {group: [low, high]}, "n": {group: rows}, "none": {group: rows},
    "answers": [...]} for the groups all, system1, system2 that have rows. With another metric, "mean" stands for
    "accuracy". Rows for which the metric is None (of accuracy: rows without an answer) are counted in "none" alone.
    "interval_by": Wilson's score interval where every value is 0 or 1, else the bootstrap's percentiles; both at 95 %.
    Raises RewardFailed where the metric fails or returns anything else.
    """
    reward = resolve_metric(metric)
    rows = [dict(row) for row in without_arrows_nulls(dataset)]
    require(len(rows) > 0, "dataset", "no rows", "at least one held-out row")
    check_call(reward, columns_of(rows), "evaluate.metric")
    with Progress(description, len(rows), "row") as progress:
        ids = [prompt_ids(row, tokenizer) for row in rows]
        for row, prompt in zip(rows, ids):
            check_known(prompt, model, tokenizer, str(row.get("id", "(no id)")))
        rows, ids = _answerable(rows, ids, max_new_tokens, positions_of(getattr(model, "config", None)))
        completions = answer_greedily(
            model, tokenizer, ids, max_new_tokens, batch_size, progress.update, shared=True
        )  # fmt: skip
    values = processes.from_main(lambda: _values(reward, rows, completions, tokenizer))
    answers = [
        {
            "id": row.get("id"),
            "system": row.get("system"),
            "answer": row.get("answer"),
            "completion": completion,
            **({"correct": None if value is None else value == 1} if reward is accuracy else {"value": value}),
        }
        for row, completion, value in zip(rows, completions, values)
    ]
    mean = "accuracy" if reward is accuracy else "mean"
    by = "wilson" if all(value in (0, 1) for value in values if value is not None) else "bootstrap"
    result: dict[str, Any] = {mean: {}, "interval": {}, "interval_by": by, "n": {}, "none": {}, "answers": answers}
    for group in GROUPS:
        of_group = [v for v, row in zip(values, rows) if group == "all" or row.get("system") == int(group[-1])]
        found = [value for value in of_group if value is not None]
        if len(found) < len(of_group):
            result["none"][group] = len(of_group) - len(found)
        if found:
            result[mean][group] = sum(found) / len(found)
            result["interval"][group] = wilson(int(sum(found)), len(found)) if by == "wilson" else bootstrap(found)
            result["n"][group] = len(found)
    return result


def _answerable(
    rows: list[dict[str, Any]], ids: list[list[int]], new: int, positions: int | None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows whose prompt leaves positions for an answer, and their ids; the log says which do not, or leave few."""
    room = [positions - len(prompt) for prompt in ids] if positions is not None else [new] * len(ids)
    keep = [i for i, left in enumerate(room) if left > 0]
    require(bool(keep), "dataset", f"prompts of at least {min(map(len, ids))} tokens",
            f"shorter ones than the model's {positions} positions")  # fmt: skip
    if len(keep) < len(rows):
        log.warning("evaluate: %d of %d rows left out: their prompt takes all of the model's %d positions",
                    len(rows) - len(keep), len(rows), positions)  # fmt: skip
    short = sum(room[i] < new for i in keep)
    if short:
        log.warning("evaluate: %d of %d prompts leave fewer of the model's %d positions than evaluate.max_new_tokens: "
                    "%d; their answers end there", short, len(keep), positions, new)  # fmt: skip
    return [rows[i] for i in keep], [ids[i] for i in keep]


def resolve_metric(metric: str | Reward | None) -> Reward:
    """The function that a metric names, or is."""
    return (
        accuracy if metric is None else resolve_reward(metric, "evaluate.metric") if isinstance(metric, str) else metric
    )


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that a metric is given; none may stand for what the model has answered."""
    return [name for name in {name: None for row in rows for name in row} if name not in GIVEN]


def _values(reward: Reward, rows: list[dict[str, Any]], completions: list[str], tokenizer: Any) -> list[float | None]:
    """The metric's value of each completion, which it is given as TRL gives it to a reward."""
    given: list[Any] = [
        [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text
        for row, text in zip(rows, completions)
    ]
    arguments = {
        "prompts": [row["prompt"] for row in rows],
        "completions": given,
        "completion_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions],
        **{name: [row.get(name) for row in rows] for name in columns_of(rows)},
    }
    function = checked(reward, "evaluate.metric")
    if not is_async(reward):
        return function(**arguments)
    # In a thread of its own: where this one has a loop already (a notebook), a second cannot run in it.
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, cast(Any, function(**arguments))).result()
