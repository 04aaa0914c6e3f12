"""Greedy answers on held-out rows, checked by the maths verifier, with Wilson intervals by system."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.answers import is_correct
from ..data.rows import without_arrows_nulls
from ..data.tokens import check_known, prompt_ids
from ..errors import require
from ..model.generate import answer_greedily
from ..model.positions import positions_of
from ..progress import Progress

log = logging.getLogger("lorapar")
Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
GROUPS = ("all", "system1", "system2")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Mapping[str, Any]] | Any,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    description: str = "evaluate",
) -> dict[str, Any]:
    """Answer every row greedily and count what is right.

    Args:
        dataset: rows with prompt, answer and, for the figures by system, system.
        max_new_tokens: an answer's length limit, or less where the model's positions end; batch_size: prompts generated
            at a time.

    Returns {"accuracy": {group: share}, "interval": {group: [low, high]}, "n": {group: rows}, "answers": [...]} for the
    groups all, system1, system2 that have rows. A row is right where `lorapar.rewards.is_correct` says so.
    """
    rows = [dict(row) for row in without_arrows_nulls(dataset)]
    require(len(rows) > 0, "dataset", "no rows", "at least one held-out row")
    with Progress(description, len(rows), "row") as progress:
        ids = [prompt_ids(row, tokenizer) for row in rows]
        for row, prompt in zip(rows, ids):
            check_known(prompt, model, tokenizer, str(row.get("id", "(no id)")))
        rows, ids = _answerable(rows, ids, max_new_tokens, positions_of(getattr(model, "config", None)))
        completions = answer_greedily(model, tokenizer, ids, max_new_tokens, batch_size, progress.update)
    answers = [
        {
            "id": row.get("id"),
            "system": row.get("system"),
            "answer": row["answer"],
            "completion": completion,
            "correct": is_correct(completion, row["answer"]),
        }
        for row, completion in zip(rows, completions)
    ]
    result: dict[str, Any] = {"accuracy": {}, "interval": {}, "n": {}, "answers": answers}
    for group in GROUPS:
        hits = [a["correct"] for a in answers if group == "all" or a["system"] == int(group[-1])]
        if hits:
            result["accuracy"][group] = sum(hits) / len(hits)
            result["interval"][group] = wilson(sum(hits), len(hits))
            result["n"][group] = len(hits)
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


def wilson(successes: int, trials: int) -> list[float]:
    """The Wilson score interval of a proportion at 95 % (Wilson 1927): [low, high]."""
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At 0 and at 1 rounding could leave the share itself just outside.
    return [min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))]
