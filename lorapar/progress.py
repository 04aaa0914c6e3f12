"""One line of progress for a long step: a bar that redraws itself for a person, a log line now and then for a file."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from .distributed import processes

log = logging.getLogger("lorapar")
LOG_EVERY_SECONDS = 10.0


class Progress:
    """`update(n)` as the step goes on; speed and time left come with it. Use as a context manager."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = done
        self.began = self.logged = time.monotonic()
        # A redrawn line would fill a file, so only a terminal gets one.
        seen = sys.stderr.isatty() and processes.is_main()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit) if seen else None

    def update(self, n: int, **facts: str) -> None:
        self.done += n
        if self.bar is not None:
            if facts:
                self.bar.set_postfix(facts, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.logged >= LOG_EVERY_SECONDS or self.done >= self.total:
            self.logged = now
            speed = (self.done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / speed if speed > 0 else float("inf")
            said = "".join(f", {key} {value}" for key, value in facts.items())
            log.info(
                "%s: %d/%d, %.3g %s/s, %.0f s left%s", self.what, self.done, self.total, speed, self.unit, left, said
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class TrainingProgress(TrainerCallback):
    """The trainer's own bars and dictionaries, replaced by one `Progress` line with the loss or the reward."""

    SHOWN = (("loss", "loss"), ("reward", "reward"), ("grad_norm", "grad_norm"))

    def __init__(self, what: str):
        self.what = what
        self.progress: Progress | None = None
        self.facts: dict[str, str] = {}
        self.logged = self.unrewarded = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress = Progress(self.what, state.max_steps, "step", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for key, name in self.SHOWN:
            if logs and key in logs:
                # TRL logs None where no completion of the steps got a reward.
                self.facts[name] = "none" if logs[key] is None else f"{float(logs[key]):.3g}"
        if logs and "reward" in logs:
            self.logged += 1
            self.unrewarded += logs["reward"] is None
            if logs["reward"] is None and self.unrewarded == 1 and state.is_world_process_zero:
                log.warning("%s: step %d: every reward was None or nan, so it taught nothing", self.what,
                            state.global_step)  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(state.global_step - self.progress.done, **self.facts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.__exit__()
            if self.unrewarded:
                log.warning("%s: every reward was None or nan in %d of %d logged steps", self.what, self.unrewarded,
                            self.logged)  # fmt: skip
