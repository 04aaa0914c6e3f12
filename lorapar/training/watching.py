"""The other system's loss, watched on rows put aside while a stage trains, and the checkpoint that is kept by it.

Beyond the paper, which takes what stage 2 ends with: GRPO on System 2 can undo what stage 1 taught System 1. The loss
is computed before the first step and ahead of each checkpoint, so every whole checkpoint has its loss on file. Kept is,

    of the checkpoints whose loss is at most start + rise, the last; if there is none, that of the lowest loss.

Training itself is the same to the bit, watched or not.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..adapter.attach import restore_factors
from ..distributed import processes
from ..errors import InputError, require
from ..files import read_json, sha256_json, write_json
from ..scoring.batches import Example, mean_answer_loss

log = logging.getLogger("lorapar")
# Beside a stage's checkpoints: the losses by step, and in the end the step that was kept.
WATCHED = "watched.json"


class LossWatch:
    """The losses of a stage so far, by step: the start's is that of step 0.

    Args:
        folder: where the stage's checkpoints are, and `watched.json`. examples: the rows put aside. system: theirs.
        rise: how far the loss may rise above the start's, in nats an answer token.
    """

    def __init__(self, folder: Path, examples: list[Example], system: int, rise: float):
        self.folder, self.examples, self.system, self.rise = folder, examples, system, rise
        self.losses: dict[int, float] = {}
        self._digest = sha256_json([[example.ids, example.targets] for example in examples])

    def recorded(self) -> dict[int, float]:
        """The losses of these rows that an earlier process has left in the folder; none where the start's is not there.

        A file that is not ours counts as none: the checkpoints beside it are then passed over.
        """
        try:
            found = read_json(self.folder / WATCHED)
            losses = {int(step): float(loss) for step, loss in found["losses"].items()}
        except (InputError, AttributeError, KeyError, TypeError, ValueError):
            return {}
        return losses if found.get("digest") == self._digest and 0 in losses else {}

    def go_on_from(self, step: int | None) -> None:
        """Take the losses on file up to `step`, the checkpoint that the stage resumes from; None: it starts anew."""
        recorded = processes.from_main(self.recorded)
        self.losses = {} if step is None else {at: loss for at, loss in recorded.items() if at <= step}

    def measure(self, trainer: Any) -> None:
        """Note the loss of the trainer's model as it is now, in the file and in the trainer's log."""
        device, step = trainer.accelerator.device, int(trainer.state.global_step)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss = mean_answer_loss(trainer.model, self.examples, trainer.args.per_device_eval_batch_size)
        self.losses[step] = loss
        self._write(trainer)
        # Past TRL's own `log`, which would close the interval that the stage's logged means are taken over.
        Trainer.log(trainer, {f"system{self.system}_loss": loss})
        change = "" if step == 0 else f", {loss - self.losses[0]:+.4f} since the start"
        log.info("%s: step %d: System %d's loss is %.4f on %d rows put aside%s", trainer.stage, step, self.system, loss,
                 len(self.examples), change)  # fmt: skip

    def keep(self, trainer: Any) -> dict[str, Any]:
        """Put the checkpoint that the rule keeps into the model; returns the facts for the stage's record."""
        step, within = kept_step(self.losses, self.rise)
        count, limit = len(self.losses) - 1, self.losses[0] + self.rise
        if within:
            log.info("%s: step %d is kept: of %d checkpoints the last whose loss is at most %.4f", trainer.stage, step,
                     count, limit)  # fmt: skip
        else:
            log.warning("%s: step %d is kept, whose loss is the lowest of %d checkpoints: none is at most %.4f",
                        trainer.stage, step, count, limit)  # fmt: skip
        if step != trainer.state.global_step:
            # The first process may still be writing.
            processes.wait()
            restore_factors(trainer.model, self.folder / f"checkpoint-{step}")
        facts = self._facts() | {"kept": step}
        self._write(trainer, kept=step)
        return facts

    def _facts(self) -> dict[str, Any]:
        losses = {str(step): loss for step, loss in sorted(self.losses.items())}
        return {"system": self.system, "rows": len(self.examples), "rise": self.rise, "losses": losses}

    def _write(self, trainer: Any, **more: Any) -> None:
        if trainer.is_world_process_zero():
            write_json(self.folder / WATCHED, self._facts() | more | {"digest": self._digest})


def kept_step(losses: Mapping[int, float], rise: float) -> tuple[int, bool]:
    """(the checkpoint that is kept, whether its loss is at most start + rise); losses by step, the start's under 0."""
    steps = [step for step in sorted(losses) if step > 0]
    within = [step for step in steps if losses[step] <= losses[0] + rise]
    if within:
        return within[-1], True
    return min(steps, key=lambda step: (math.isnan(losses[step]), losses[step])), False


def check_watching(config: TrainingArguments) -> None:
    """InputError for settings of the trainer that would not leave every checkpoint there until one is chosen."""
    given = str(getattr(config.save_strategy, "value", config.save_strategy))
    beside = "beside grpo.watch_rows, which chooses among the checkpoints"
    require(given in ("steps", "epoch"), "grpo.save_strategy", given, f"steps or epoch {beside}")
    require(config.save_total_limit is None, "grpo.save_total_limit", config.save_total_limit, f"null {beside}")
    require(not config.load_best_model_at_end, "grpo.load_best_model_at_end", True, f"false {beside}")
