"""Running the command line in tests: in this process, or in a child that kills itself at a given moment."""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lorapar.cli import main

SOURCES = [
    {"name": "reasoning_gym:chain_sum", "size": 60, "config": {"min_terms": terms, "max_terms": terms,
                                                              "min_digits": 1, "max_digits": 1}}
    for terms in (2, 3)
]  # fmt: skip
TRAINER = {"max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "bf16": False, "gradient_checkpointing": False,
           "save_steps": 2, "logging_steps": 1, "report_to": "none"}  # fmt: skip


def recipe_values(model: Path) -> dict[str, Any]:
    """A recipe whose whole run takes seconds on the tiny model."""
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"sources": SOURCES, "held_out": 6},
        "lora": {"r": 4, "lora_alpha": 8},
        "score": {"examples": 8},
        "sft": {**TRAINER, "per_device_train_batch_size": 4},
        "grpo": {**TRAINER, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
                 "rewards": ["closeness"], "beta": 0.04},
        "evaluate": {"max_new_tokens": 4},
    }  # fmt: skip


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def lorapar(*words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def succeeds(*words: object) -> str:
    """The log of a command that must succeed."""
    code, _, err = lorapar(*words)
    assert code == 0, err
    return err


def refused(*words: object, says: tuple[str, ...] = (), alone: bool = False) -> str:
    """The one error line of a command that must be refused; `alone`: with no line of the log before it."""
    code, out, err = lorapar(*words)
    assert code == 2, f"exit status {code}\n{err}"
    lines = err.splitlines()
    assert lines[-1].startswith("lorapar: error: "), err
    assert all(line.startswith("lorapar: ") for line in lines), err
    assert sum(line.startswith("lorapar: error:") for line in lines) == 1, err
    assert not alone or len(lines) == 1, err
    assert out == ""
    for words_said in says:
        assert words_said in lines[-1], f"{words_said!r} is not in: {lines[-1]}"
    return lines[-1]


def tree(folder: Path, *but: str) -> dict[str, tuple[int, str]]:
    """{file: (time of change, sha256)} of everything in a folder, but the files named."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.log", *but)
    }


def records(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stages.json").read_text())


def done(folder: Path) -> list[str]:
    """The stages that have finished there."""
    return [name for name, record in records(folder).items() if "finished" in record]


def skipped(log: str) -> list[str]:
    """The stages that a log says were not done again."""
    return [line.split(": ")[1] for line in log.splitlines() if line.endswith(": done before, skipped")]


# In a child


def in_child(patch: Callable[..., None], arguments: tuple[Any, ...], *words: object) -> tuple[int, str]:
    """(exit status, stderr) of the command line in a process of its own, where `patch(*arguments)` is called first.

    Processes are forked off a server that has imported the libraries and run nothing, so each starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.lorapar.driver", "lorapar.pipeline.running", "lorapar.training.sft", "lorapar.training.grpo"]
    )
    with contextlib.ExitStack() as stack:
        import tempfile

        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stderr"
        child = context.Process(target=_child, args=(patch, arguments, [str(word) for word in words], str(log)))
        child.start()
        child.join(timeout=120)
        assert child.exitcode is not None, "the child did not end"
        return child.exitcode, log.read_text()


def _child(patch: Callable[..., None], arguments: tuple[Any, ...], words: list[str], log: str) -> None:
    # A shell that starts its jobs in the background has them ignore SIGINT, nohup SIGHUP; a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    patch(*arguments)
    os._exit(main(words))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_rename(name: str) -> None:
    """Die when the file `name` is written to its temporary file and not yet in its place."""
    artefacts = importlib.import_module("lorapar.files")
    flush = artefacts._flush_to_disk

    def patched(path: Path) -> None:
        flush(path)
        if name in path.parts or path.name.startswith(f".{name}."):
            kill_self()

    artefacts._flush_to_disk = patched


def kill_at_step(stage: str, step: int, send: int = signal.SIGKILL) -> None:
    """Die (or be interrupted) at the end of a training step."""
    progress = importlib.import_module("lorapar.progress")
    on_step_end = progress.TrainingProgress.on_step_end

    def patched(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if self.what == stage and state.global_step == step:
            os.kill(os.getpid(), send)

    progress.TrainingProgress.on_step_end = patched


def kill_while_scoring(saves: int) -> None:
    """Save the running sums after every batch, and die right after the save of that number."""
    sums = importlib.import_module("lorapar.scoring.sums")
    sums.SAVE_SECONDS, sums.SAVE_SHARE = 0.0, float("inf")
    save, count = sums.RunningSums.save, 0

    def patched(self: Any, path: Path, fingerprint: str) -> None:
        nonlocal count
        save(self, path, fingerprint)
        count += 1
        if count == saves:
            kill_self()

    sums.RunningSums.save = patched


def kill_in_checkpoint(stage: str, step: int, send: int = signal.SIGKILL) -> None:
    """Die (or be stopped) with half of a checkpoint's optimizer.pt written."""
    import torch

    save = torch.save

    def patched(value: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        save(value, target, *args, **kwargs)
        if str(target).endswith(f"{stage}/checkpoint-{step}/optimizer.pt"):
            os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), send)

    torch.save = patched


def slow_tokens_after(count: int, seconds: float) -> None:
    """Every token that a model makes after the first `count` takes so long."""
    llama = importlib.import_module("transformers.models.llama.modeling_llama").LlamaForCausalLM
    forward, calls = llama.forward, 0

    # `generate` looks at the signature.
    @functools.wraps(forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            time.sleep(seconds)
        return forward(self, *args, **kwargs)

    llama.forward = patched


def nothing() -> None:
    pass
