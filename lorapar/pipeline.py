"""The order of the stages, and resuming.

    labels.jsonl → start/ + scores.safetensors → partition.safetensors → sft/ → grpo/ → metrics.json → adapter/ → report.html

A stage is a function of the recipe and of files; it writes its artefact whole, then its record into `stages.json`: a
fingerprint of everything it read. A stage whose fingerprint stands in the record, with its artefact there, is skipped.
"""

import contextlib
import datetime
import importlib.metadata
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import stages
from .artefacts import read_json, read_text, sha256_file, sha256_json, write_json, write_text
from .config import Recipe, load_recipe, parse
from .errors import InputError
from .memory import peak_memory_bytes, reset_peak_memory

log = logging.getLogger("lorapar")


@dataclass(frozen=True)
class Stage:
    """One step: what it runs, the recipe's sections and the files it reads, and the files it writes."""

    name: str
    run: Callable[[Recipe, Path], dict[str, Any]]
    sections: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Whether every process of a distributed launch takes part; the other stages run on the first one."""
        return self.name in ("sft", "grpo")


def plan(recipe: Recipe) -> list[Stage]:
    """The recipe's stages in their order; a training stage reads what the one before it wrote."""
    scored = recipe.partition.selection != "all"
    start, scores = "start/adapter_model.safetensors", "scores.safetensors"
    made = [
        Stage("label", stages.label_stage, ("model", "data", "label"), (), ("labels.jsonl",)),
        Stage("score", stages.score_stage, ("model", "lora", "start", "score", "seed"), ("labels.jsonl",),
              (start, scores) if scored else (start,)),
        Stage("partition", stages.partition_stage, ("partition", "seed"), (scores if scored else start,),
              ("partition.safetensors",)),
    ]  # fmt: skip
    adapter = "start"
    for name in recipe.stages:
        run = stages.sft_stage if name == "sft" else stages.grpo_stage
        reads = ("labels.jsonl", "partition.safetensors", f"{adapter}/adapter_model.safetensors")
        made.append(Stage(name, run, ("model", name, "stages", "seed"), reads, (f"{name}/adapter_model.safetensors",)))
        adapter = name
    trained = tuple(f"{name}/adapter_model.safetensors" for name in recipe.stages)
    made += [
        Stage("evaluate", stages.evaluate_stage, ("model", "evaluate", "stages"),
              ("labels.jsonl", "partition.safetensors", *trained), ("metrics.json",)),
        Stage("export", stages.export_stage, ("model", "export", "stages"), (trained[-1],),
              ("adapter/adapter_model.safetensors",)),
        Stage("report", stages.report_stage, (), ("labels.jsonl", "metrics.json"), ("report.html",)),
    ]  # fmt: skip
    return made


def run(recipe: Recipe | Path | str, only: str | None = None, update: bool = False) -> Path:
    """Run a recipe, or go on with it: every stage whose inputs have changed, in order. Returns the output folder.

    Args:
        recipe: a Recipe or a path to one. only: run this stage alone, on what the stages before it have written.
        update: take over an output folder made by another recipe, and redo what the change touches.

    Raises InputError for an unusable recipe or folder; any other exception is the failure of a stage.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    folder = Path(recipe.output_dir)
    with logging_to(folder / "run.log"):
        _claim(recipe, folder, update)
        names = [stage.name for stage in plan(recipe)]
        if only is not None and only not in names:
            raise InputError(f"stages: {only} is not one of this recipe's stages ({', '.join(names)})")
        for stage in plan(recipe):
            if only in (None, stage.name):
                _run_stage(stage, recipe, folder)
    return folder


def _run_stage(stage: Stage, recipe: Recipe, folder: Path) -> None:
    for name in stage.reads:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; run the stage that makes it before {stage.name}")
    wanted, record = fingerprint(stage, recipe, folder), records(folder).get(stage.name, {})
    done = record.get("fingerprint") == wanted and all((folder / name).is_file() for name in stage.writes)
    # Every process has read the record before the first one writes it.
    stages.wait_for_everyone()
    if done:
        log.info("%s: done before, skipped", stage.name)
        return
    if stage.trains and wanted not in (record.get("started"), record.get("fingerprint")):
        stages.discard_checkpoints(folder / stage.name)
    main = stages.is_main_process()
    if main:
        write_json(folder / "stages.json", records(folder) | {stage.name: {"started": wanted}})
    log.info("%s: started", stage.name)
    reset_peak_memory()
    began = time.perf_counter()
    facts = stage.run(recipe, folder) if main or stage.trains else {}
    seconds = time.perf_counter() - began
    if main:
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"fingerprint": wanted, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes(),
                  "finished": finished, **facts}  # fmt: skip
        write_json(folder / "stages.json", records(folder) | {stage.name: record})
        if stage.name != "report":
            stages.refresh_metrics(folder, records(folder))
    stages.wait_for_everyone()
    log.info("%s: done in %.1f s%s", stage.name, seconds, "".join(f", {k} {_short(v)}" for k, v in facts.items()))


def fingerprint(stage: Stage, recipe: Recipe, folder: Path) -> str:
    """A digest of the recipe's sections and the files that the stage reads, local data and model files included."""
    values = recipe.as_dict()
    inputs: dict[str, Any] = {section: values[section] for section in stage.sections}
    inputs["files"] = {name: sha256_file(folder / name) for name in stage.reads}
    if stage.name == "label":
        paths = [Path(source.name) for source in recipe.data.sources]
        inputs["data"] = {str(path): sha256_file(path) for path in paths if path.is_file()}
    return sha256_json(inputs)


def records(folder: Path) -> dict[str, Any]:
    """What the finished stages wrote of themselves into `stages.json`; empty where none has finished."""
    path = folder / "stages.json"
    return read_json(path) if path.exists() else {}


def _claim(recipe: Recipe, folder: Path, update: bool) -> None:
    """Write the resolved recipe into a new folder; refuse one that another recipe made."""
    path = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
    if path.exists():
        there = yaml.safe_load(read_text(path))
        difference = _first_difference(parse(there).as_dict(), recipe.as_dict())
        if difference and not update:
            key, old, new = difference
            raise InputError(
                f"{folder}: made by another recipe ({key} was {old!r}, is {new!r}); use another --output_dir, or "
                "--update to redo there what the change touches"
            )
    elif folder.is_dir() and any(p.name != "run.log" for p in folder.iterdir()):
        raise InputError(f"{folder}: not empty and holds no recipe.yaml; use another --output_dir")
    if stages.is_main_process():
        write_text(path, text)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
        log.info("lorapar %s, %s", importlib.metadata.version("lorapar"), versions)
    stages.wait_for_everyone()


def _first_difference(old: Any, new: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            found = _first_difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
            # Where the folder stands may change: it can be moved.
            if found and found[0] != "output_dir":
                return found
        return None
    return None if old == new else (at, old, new)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Our log on the terminal, one line an event, and in `path` with times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal, file = logging.StreamHandler(sys.stderr), logging.FileHandler(path, encoding="utf-8")
    terminal.setFormatter(logging.Formatter("lorapar: %(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [terminal, file] if stages.is_main_process() else []
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        file.emit(log.makeRecord(log.name, logging.ERROR, "", 0, "stopped: %r", (error,), None))
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
        file.close()
        log.setLevel(level)
        log.propagate = propagate


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
