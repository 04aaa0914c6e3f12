"""Evaluation while stage 1 trains, on rows put aside: the checkpoint that is kept by it, and stopping early.

transformers evaluates, saves and stops. What it leaves open is done here: it loads the best step only where that step
has a checkpoint under the path that it had when it was written, and a resumed run forgets how many evaluations brought
no improvement. Both are read off the log that each checkpoint holds.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from transformers import EarlyStoppingCallback, TrainingArguments

from ..adapter.attach import restore_factors
from ..distributed import processes
from ..errors import InputError, require

log = logging.getLogger("lorapar")
# What TRL's SFT trainer logs of an evaluation and that can be compared; aux_loss: of a mixture of experts.
METRICS = ("loss", "mean_token_accuracy", "entropy", "aux_loss")


def evaluates(config: TrainingArguments) -> bool:
    """Whether the trainer evaluates while it trains."""
    return _word(config.eval_strategy) != "no" or config.eval_on_start


def check_evaluation(setting: Callable[[str], Any], patience: int | None) -> None:
    """InputError for settings of stage 1's trainer, by name, that need evaluations which nothing makes.

    patience: `sft.early_stopping_patience`.
    """
    evaluated, saved = _word(setting("eval_strategy")), _word(setting("save_strategy"))
    best = setting("load_best_model_at_end")
    needs = "unless sft.eval_strategy is steps or epoch"
    require(evaluated != "no" or not best, "sft.load_best_model_at_end", True, f"false {needs}")
    require(evaluated != "no" or saved != "best", "sft.save_strategy", saved, f"steps, epoch or no {needs}")
    require(saved in (evaluated, "best") or not best, "sft.save_strategy", saved,
            f"{evaluated}, as sft.eval_strategy, or best, with load_best_model_at_end")  # fmt: skip
    if best and saved == evaluated == "steps":
        every, save = setting("eval_steps") or setting("logging_steps"), setting("save_steps")
        # Shares of all steps, which are exact only as whole numbers.
        whole = round(save * 1_000_000) % max(1, round(every * 1_000_000)) == 0 and (save < 1) == (every < 1)
        require(whole, "sft.save_steps", save, f"a multiple of sft.eval_steps: {every:g}, with load_best_model_at_end")
    require(evaluated != "no" or patience is None, "sft.early_stopping_patience", patience, f"nothing {needs}")
    require(best or patience is None, "sft.early_stopping_patience", patience,
            "nothing unless sft.load_best_model_at_end is true: the last one is no better")  # fmt: skip
    metric = setting("metric_for_best_model")
    if metric is not None and evaluated != "no":
        allowed = ", ".join(f"eval_{name}" for name in METRICS)
        require(str(metric).removeprefix("eval_") in METRICS, "sft.metric_for_best_model", metric, f"one of {allowed}")


def _word(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


class EarlyStopping(EarlyStoppingCallback):
    """Stops training once `patience` evaluations in a row brought no better metric, counted over resumed runs too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        best, waited = None, 0
        for value in _evaluations(args, state.log_history).values():
            improved = best is None or (value > best if args.greater_is_better else value < best)
            best, waited = (value, 0) if improved else (best, waited + 1)
        self.early_stopping_patience_counter = waited
        if waited >= self.early_stopping_patience:
            # Stopped before, and killed between the checkpoint and the end of the stage.
            control.should_training_stop = True


def _evaluations(args: TrainingArguments, history: list[dict[str, Any]]) -> dict[int, float]:
    """{step: the metric that the best checkpoint is chosen by}, as evaluated so far."""
    metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    return {int(entry["step"]): float(entry[metric]) for entry in history if metric in entry}


def keep_best(trainer: Any) -> dict[str, Any]:
    """Put the checkpoint with the best metric into the model, bit for bit; returns the facts for the stage's record.

    Of equals the first is kept. Raises InputError where no checkpoint has a finite metric.
    """
    args, folder = trainer.args, Path(cast(str, trainer.args.output_dir))
    values = _evaluations(args, trainer.state.log_history)
    # As the main process sees them, when it has written the last.
    there = processes.from_main(lambda: [step for step in values if (folder / f"checkpoint-{step}").is_dir()])
    saved = {step: values[step] for step in there}
    metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    step = best_step(saved, bool(args.greater_is_better))
    if step is None:
        raise InputError(
            f"sft.load_best_model_at_end: none of {len(saved)} checkpoints in {folder} has a finite {metric} "
            f"({len(values)} evaluations); lower sft.learning_rate, or save at the steps that are evaluated"
        )
    log.info("sft: step %d is kept: its %s of %.4f is the best of %s", step, metric, saved[step],
             "1 checkpoint" if len(saved) == 1 else f"{len(saved)} checkpoints")  # fmt: skip
    if step != trainer.state.global_step:
        restore_factors(trainer.model, folder / f"checkpoint-{step}")
    return {"step": step, "of": trainer.state.global_step, metric: saved[step]}


def best_step(values: Mapping[int, float], greater: bool) -> int | None:
    """The first step with the best finite value; None where there is none."""
    finite = {step: value for step, value in sorted(values.items()) if math.isfinite(value)}
    return min(finite, key=lambda step: -finite[step] if greater else finite[step], default=None)
