"""The order of the stages, and resuming.

    labels.jsonl → start/, scores.safetensors → partition.safetensors → sft/ → grpo/ → metrics.json → adapter/ → report

A stage is a function of the recipe and of files; it writes its artefact whole, then its record into `stages.json`: a
fingerprint of everything it read. A stage whose fingerprint stands in the record, with its artefact there, is skipped.
"""

import contextlib
import datetime
import errno
import importlib.metadata
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .. import stage as stages
from ..data.labels import check_whole, refresh_metrics
from ..errors import InputError, OutOfMemory
from ..files import (
    TEMPORARY,
    disk_is_full,
    read_json,
    read_text,
    remove_left_over,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)
from ..labeling.review import read_corrections
from ..logs import RUN_LOCK, calm_libraries, logging_to
from ..memory.advice import check_memory, out_of_memory
from ..memory.process import is_out_of_memory, peak_memory_bytes, release_freed, reset_peak_memory
from ..recipe.reading import dump_yaml, parse_yaml
from ..recipe.sections import Recipe, load_recipe, parse

log = logging.getLogger("lorapar")
# Keys that say how a result is come by and not what it is, so they may change between two commands: where the folder
# stands (it can be moved), how fast and for how much teachers are asked, how much of a batch is held at once.
ANOTHER_WAY = re.compile(
    r"output_dir|label\.(budget|store|set_aside|enough)\b.*|(score|evaluate)\.batch_size"
    r"|(sft|grpo)\.(longest_first|activation_offloading|gradient_checkpointing)"
    r"|sft\.micro_batch_tokens|grpo\.(rollout_batch_size|logprob_tokens)"
    r"|label\.teachers\[\d+\]\.(api_key_env|price|in_flight|per_minute|timeout|attempts|backoff|check_model)\b.*"
)


@dataclass(frozen=True)
class Stage:
    """One step: what it runs, the recipe's sections and the files it reads, the files it writes, and those that it
    `shows` where they are there."""

    name: str
    run: Callable[[Recipe, Path], dict[str, Any]]
    sections: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    shows: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether every process of a distributed launch takes part; the other stages run on the first one."""
        return self.name in ("sft", "grpo")


def adapter_files(folder: str) -> tuple[str, ...]:
    """The files without which an adapter folder loads neither here nor in PEFT, the weights first."""
    return tuple(f"{folder}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "lorapar.json"))


def plan(recipe: Recipe) -> list[Stage]:
    """The recipe's stages in their order; a training stage reads what the one before it wrote."""
    scored = recipe.partition.selection != "all"
    start, scores = "start/adapter_model.safetensors", "scores.safetensors"
    # What says how an adapter's weights are used, which the weights themselves do not show: lora_alpha, lora_dropout.
    adapted = ("model", "lora", "start")
    # When scoring stops depends on θ only where it waits for the kept sets.
    stop = ("partition",) if recipe.score.until_stable is not None else ()
    made = [
        Stage("label", stages.label_stage, ("model", "data", "label"), (),
              ("labels.jsonl", *(["votes.jsonl"] if recipe.label.teachers else []))),
        Stage("score", stages.score_stage, (*adapted, "score", "seed", *stop), ("labels.jsonl",),
              (*adapter_files("start"), scores) if scored else adapter_files("start")),
        Stage("partition", stages.partition_stage, ("partition", "seed"), (scores if scored else start,),
              ("partition.safetensors",)),
    ]  # fmt: skip
    adapter = "start"
    for name in recipe.stages:
        run = stages.sft_stage if name == "sft" else stages.grpo_stage
        reads = ("labels.jsonl", "partition.safetensors", f"{adapter}/adapter_model.safetensors")
        made.append(Stage(name, run, (*adapted, name, "seed"), reads, adapter_files(name)))
        adapter = name
    trained = tuple(f"{name}/adapter_model.safetensors" for name in recipe.stages)
    made += [
        Stage("evaluate", stages.evaluate_stage, (*adapted, "evaluate", "stages"),
              ("labels.jsonl", "partition.safetensors", *trained), ("metrics.json", "answers.jsonl")),
        Stage("export", stages.export_stage, (*adapted, "export"), (trained[-1],),
              (*adapter_files("adapter"), *(["merged/config.json"] if recipe.export.merged else []))),
        # Of a folder with labels alone as well: they want looking at before anything is trained on them.
        Stage("report", stages.report_stage, (), ("labels.jsonl",), ("report.html",),
              ("metrics.json", "votes.jsonl", "dropped.jsonl", "scores.safetensors", "partition.safetensors",
               *(f"{name}/log_history.json" for name in recipe.stages))),
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
    names = [stage.name for stage in plan(recipe)]
    if only is not None and only not in names:
        raise InputError(f"stages: {only} is not one of this recipe's stages ({', '.join(names)})")
    with calm_libraries(), as_input_error(folder):
        stages.check_recipe(recipe, folder, only)
        _check_folder(recipe, folder, update)
        with logging_to(folder / "run.log"):
            _claim(recipe, folder)
            for stage in plan(recipe):
                if only in (None, stage.name):
                    _run_stage(stage, recipe, folder)
    return folder


def label_only(recipe: Recipe, what: str) -> str:
    """What the label stage's teachers have still to be asked ("dry_run"), or the path of the file for "review"."""
    folder = Path(recipe.output_dir)
    with calm_libraries(), as_input_error(folder):
        stages.check_recipe(recipe, folder, "label")
        if what == "dry_run":
            return stages.label_dry_run(recipe, folder)
        if not (folder / "recipe.yaml").is_file():
            raise InputError(f"{folder}: not a run's output folder, it holds no recipe.yaml; run label first")
        return str(stages.label_review(recipe, folder))


def _run_stage(stage: Stage, recipe: Recipe, folder: Path) -> None:
    for name in stage.reads:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; run the stage that makes it before {stage.name}")
    wanted, record = fingerprint(stage, recipe, folder), records(folder).get(stage.name, {})
    done = record.get("fingerprint") == wanted and all((folder / name).is_file() for name in stage.writes)
    if done and (cut := _cut_short(folder, record)):
        log.warning("%s: %s; made again", stage.name, cut)
        done = False
    # Every process has read the record before the first one writes it.
    stages.wait_for_everyone()
    if done:
        _check_whole(folder, stage.writes)
        log.info("%s: done before, skipped", stage.name)
        return
    # Before anything of this stage's is given up: what it reads may be damaged, and what it needs may not be there.
    _check_whole(folder, stage.reads)
    main = stages.is_main_process()
    release_freed()
    if main or stage.trains:
        check_memory(stage.name, recipe, folder)
    if wanted not in (record.get("started"), record.get("fingerprint")):
        stages.discard_checkpoints(recipe, folder, stage.name)
    if main:
        write_json(folder / "stages.json", records(folder) | {stage.name: {"started": wanted}})
    # No process may go on from a checkpoint that the first is about to remove.
    stages.wait_for_everyone()
    log.info("%s: started", stage.name)
    reset_peak_memory()
    began = time.perf_counter()
    made = _times(stage, folder)
    try:
        facts = stage.run(recipe, folder) if main or stage.trains else {}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(out_of_memory(stage.name, recipe, folder)) from error
    except InputError:
        # Refused before it wrote anything: what stood there is still what its record says.
        if main and record and made == _times(stage, folder):
            write_json(folder / "stages.json", records(folder) | {stage.name: record})
        raise
    seconds = time.perf_counter() - began
    if main:
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"fingerprint": wanted, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes(),
                  "finished": finished, **facts}  # fmt: skip
        # Adapters carry no digest of their own; our other safetensors do.
        weights = [name for name in stage.writes if name.endswith("/adapter_model.safetensors")]
        record |= {"sha256": {name: sha256_file(folder / name) for name in weights}} if weights else {}
        write_json(folder / "stages.json", records(folder) | {stage.name: record})
        if stage.name != "report":
            planned = [planned.name for planned in plan(recipe)]
            refresh_metrics(folder, {name: r for name, r in records(folder).items() if name in planned})
    stages.wait_for_everyone()
    log.info("%s: done in %.1f s%s", stage.name, seconds, _said(facts))


def _check_whole(folder: Path, names: tuple[str, ...]) -> None:
    """InputError for an artefact that is missing, corrupt, or, an adapter, not what its stage wrote."""
    check_whole(folder, names)
    for stage, record in records(folder).items():
        for name, digest in record.get("sha256", {}).items():
            if name in names and sha256_file(folder / name) != digest:
                raise InputError(f"{folder / name}: corrupt: not the file that {stage} wrote (another sha256); restore "
                                 "it, or delete it to have it made again")  # fmt: skip


def _cut_short(folder: Path, record: dict[str, Any]) -> str | None:
    """Which file of those whose `bytes` a stage recorded is missing or shorter now; None where all are there.

    A merged model goes by size alone: to hash it would cost every command many seconds.
    """
    for name, written in record.get("bytes", {}).items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if there < written:
            return f"{folder / name} holds {there} of the {written} bytes that were written"
    return None


def _times(stage: Stage, folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in stage.writes if (folder / name).exists()}


def fingerprint(stage: Stage, recipe: Recipe, folder: Path) -> str:
    """A digest of the recipe's sections and the files that the stage reads, local data and model files included.

    Model weights go by size and time of change, like a Makefile's: hashing them would cost a run many seconds a stage.
    """
    values = recipe.as_dict()
    for name in ("score", "sft", "grpo", "evaluate"):
        values[name] = {key: value for key, value in values[name].items() if not ANOTHER_WAY.fullmatch(f"{name}.{key}")}
    inputs: dict[str, Any] = {section: values[section] for section in stage.sections}
    shown = [name for name in stage.shows if (folder / name).is_file()]
    inputs["files"] = {name: sha256_file(folder / name) for name in (*stage.reads, *shown)}
    if stage.name == "label":
        if recipe.lora.get("base") and "probe" in str(recipe.label.voters):
            inputs["base"] = recipe.lora["base"]  # what the probe asks
        paths = [Path(source.name).expanduser() for source in recipe.data.sources]
        paths += [Path(path).expanduser() for path in (recipe.label.template, recipe.label.corrections) if path]
        inputs["data"] = {str(path): sha256_file(path) for path in paths if path.is_file()}
        if (folder / "review.csv").is_file():
            inputs["review"] = read_corrections(folder / "review.csv")
    if "model" in stage.sections:
        place = Path(recipe.model.name).expanduser()
        files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
        stats = {file.name: file.stat() for file in files if file.suffix in (".safetensors", ".gguf", ".json")}
        inputs["weights"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return sha256_json(inputs)


def records(folder: Path) -> dict[str, Any]:
    """What the finished stages wrote of themselves into `stages.json`; empty where none has finished."""
    path = folder / "stages.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(record, dict) for record in found.values()):
        raise InputError(f"{path}: corrupt: it holds no records of stages; delete it to do every stage again")
    return found


def _check_folder(recipe: Recipe, folder: Path, update: bool) -> None:
    """Refuse an output folder that is not ours, or that another recipe made, before a byte is written there."""
    path = folder / "recipe.yaml"
    for place in (folder, *folder.parents):
        if place.is_file():
            raise InputError(f"output_dir: {place} is a file; give a folder")
    if not path.exists():
        # A process killed at its very start leaves no more than these.
        ours = ("run.log", RUN_LOCK)
        strange = [p.name for p in sorted(folder.glob("*")) if p.name not in ours and not p.match(TEMPORARY)]
        if strange:
            raise InputError(f"{folder}: not empty ({strange[0]}) and holds no recipe.yaml; use another --output_dir")
        return
    records(folder)
    if update:
        return
    try:
        there = parse(parse_yaml(read_text(path))).as_dict()
    except (InputError, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: corrupt, or of another version ({error}); --update writes it anew") from None
    difference = _first_difference(there, recipe.as_dict())
    if difference:
        key, old, new = difference
        raise InputError(
            f"{folder}: made by another recipe ({key} was {old!r}, is {new!r}); use another --output_dir, or "
            "--update to redo there what the change touches"
        )


def _claim(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe where it is not there yet, and clear away what a killed process has left."""
    path, text = folder / "recipe.yaml", dump_yaml(recipe.as_dict())
    if stages.is_main_process():
        remove_left_over(folder)
        if not path.exists() or path.read_bytes() != text.encode():
            write_text(path, text)
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
        # Out of a checkout that was never installed there is no metadata of our own.
        log.info("version %s, %s", __version__, ", ".join(versions))
    stages.wait_for_everyone()


def _first_difference(old: Any, new: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            found = _first_difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
            if found and not ANOTHER_WAY.fullmatch(found[0]):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        differences = (_first_difference(*pair, f"{at}[{i}]") for i, pair in enumerate(zip(old, new)))
        return next((found for found in differences if found), None)
    return None if old == new else (at, old, new)


@contextlib.contextmanager
def as_input_error(folder: Path) -> Iterator[None]:
    """Say in one line what the user can mend and libraries raise as their own: a full disk, a folder closed to us."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        if disk_is_full(error, there):
            raise InputError(f"{folder}: the disk is full; free some space and run the same command again") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # noqa: SIM102
            if str(error.filename).startswith(str(folder)):
                raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from error
        raise


def _said(facts: dict[str, Any]) -> str:
    """The facts of one number or word, for the line that ends a stage."""
    short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items() if not isinstance(v, dict | list)}
    return "".join(f", {key} {value}" for key, value in short.items() if value is not None)
