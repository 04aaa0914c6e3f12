"""What a run says: our lines on the terminal, everything with its time in `run.log`, libraries calm.

Libraries' warnings go to `run.log` alone; their errors go to the terminal too. Their bars (loading weights, mapping a
data set) are off: a long step has one progress line of ours (`progress.py`).
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
from filelock import FileLock, Timeout
from transformers.utils import logging as transformers_logging

from .distributed import processes
from .errors import InputError, StageFailed

log = logging.getLogger("lorapar")
RUN_LOCK = ".run.log.lock"  # beside run.log; stays there, and means nothing once its process has ended
LIBRARIES = ("transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "torch", "py.warnings",
             "lm_eval")  # fmt: skip


class _RunLog(logging.FileHandler):
    """`run.log`, which must not stop a run or clutter the terminal where it cannot be written: on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def calm_libraries() -> Iterator[None]:
    """Libraries' bars off and their warnings held back, until the block ends."""
    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.captureWarnings(True)
    for logger in loggers:
        logger.handlers, logger.propagate = [terminal], False
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Our log on the terminal, one line an event, and in `path` with times and libraries' warnings.

    A second run in the same folder is refused meanwhile. Of the processes of a launch the main one alone logs.
    """
    if not processes.is_main():
        before = log.handlers, log.propagate
        log.handlers, log.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            log.handlers, log.propagate = before
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not run.log itself: Windows lets nobody write or read the bytes that are locked. The system releases the lock
    # however the process ends.
    lock = FileLock(path.with_name(RUN_LOCK))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{path.parent}: another lorapar is running there; wait for it, or stop it") from None
    try:
        with _logging(path):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _logging(path: Path) -> Iterator[None]:
    terminal, file = logging.StreamHandler(sys.stderr), _RunLog(path, encoding="utf-8")
    terminal.setFormatter(logging.Formatter("lorapar: %(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    libraries = [logging.getLogger(name) for name in LIBRARIES]
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [terminal, file], False
    log.setLevel(logging.INFO)
    for logger in libraries:
        logger.addHandler(file)
    try:
        yield
    except BaseException as error:
        # The terminal has one line of what is said in one, and the rest is for whoever looks for its cause.
        trace = sys.exc_info() if isinstance(error, StageFailed) else None
        file.emit(log.makeRecord(log.name, logging.ERROR, "", 0, "stopped: %r", (error,), trace))
        raise
    finally:
        for logger in libraries:
            logger.removeHandler(file)
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])
        file.close()
