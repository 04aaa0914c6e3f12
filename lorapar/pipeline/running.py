"""Running a recipe, or going on with a run: every stage whose inputs have changed, in order.

A stage is a function of the recipe and of files; it writes its artefact whole, then its record (records.py).
"""

import contextlib
import datetime
import errno
import importlib.metadata
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorapar_kernels import backend

from .. import __version__
from ..distributed import launch, processes
from ..errors import InputError, OutOfMemory, require
from ..files import (
    TEMPORARY,
    disk_is_full,
    expanded,
    read_text,
    remove_left_over,
    write_json,
    write_text,
)
from ..labeling import stage as labeling
from ..logs import RUN_LOCK, calm_libraries, logging_to
from ..memory.advice import NEEDS_MODEL, check_memory, check_targets, out_of_memory
from ..memory.needs import data_is_here
from ..memory.process import is_out_of_memory, peak_memory_bytes, release_freed, reset_peak_memory
from ..model.load import choose_device
from ..recipe.reading import dump_yaml, load_recipe, parse, parse_yaml
from ..recipe.sections import Recipe, changes_result
from ..stage import LABELS, Run, Stage
from ..training import stage as training
from .order import stages_of
from .records import check_whole, cut_short, fingerprint, is_done, made_with, manifest, records, refresh_metrics

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("lorapar")
SEEN_AFTER = 60.0  # seconds after which a network file system has shown a new file to every machine
CANNOT_BE_WRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)


def run(recipe: Recipe | Path | str, only: str | Sequence[str] | None = None, update: bool = False) -> Path:
    """Run a recipe, or go on with it: every stage whose inputs have changed, in order. Returns the output folder.

    Args:
        recipe: a Recipe or a path to one. only: run this stage, or these, on what those before have written.
        update: take over an output folder made by another recipe, and redo what the change touches.

    Raises InputError for an unusable recipe or folder; any other exception is the failure of a stage.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    this, stages = _run_of(recipe), stages_of(recipe)
    names = [stage.name for stage in stages]
    chosen = names if only is None else [only] if isinstance(only, str) else list(only)
    for name in chosen:
        if name not in names:
            adds = "; score.renew: true adds it" if name == "renew" else ""
            raise InputError(f"stages: {name} is not one of this recipe's stages ({', '.join(names)}){adds}")
    with calm_libraries(), as_input_error(this.folder):
        launch.join(choose_device(recipe.model.device).type == "cpu")
        with launch.watching():
            check_settings(this, chosen)
            processes.from_main(lambda: _check_folder(recipe, this.folder, update))
            with logging_to(this.folder / "run.log"):
                _run_stages(this, stages, chosen)
    return this.folder


def _run_stages(run: Run, stages: Sequence[Stage], chosen: Sequence[str]) -> None:
    _claim(run.recipe, run.folder)
    for stage in stages:
        if stage.name in chosen:
            _run_stage(stage, run)
        if len(chosen) == len(stages) and stage.name == "label":
            processes.from_main(lambda: _check_rows(stages, run))


def finished_run(recipe: Recipe, reads: Sequence[str]) -> Run:
    """The run that a recipe has made, to be read: nothing is written there.

    Raises InputError where its folder is not there, or another recipe's, and where a file of `reads`, of the folder, is
    missing or not what its stage wrote.
    """
    this = _run_of(recipe)
    with as_input_error(this.folder):
        if not (this.folder / "recipe.yaml").is_file():
            raise InputError(f"{this.folder}: not a run's output folder, it holds no recipe.yaml; run the recipe first")
        _check_folder(recipe, this.folder, False, f"the run's own recipe is {this.folder / 'recipe.yaml'}")
        check_whole(this, reads)
    return this


def _run_of(recipe: Recipe) -> Run:
    return Run(recipe, expanded(recipe.output_dir, "output_dir"))


def label_only(recipe: Recipe, what: str) -> str:
    """What the label stage's teachers have still to be asked ("dry_run"), or the path of the file for "review"."""
    this = _run_of(recipe)
    with calm_libraries(), as_input_error(this.folder):
        check_settings(this, ["label"])
        if what == "dry_run":
            return labeling.dry_run(this)
        if not (this.folder / "recipe.yaml").is_file():
            raise InputError(f"{this.folder}: not a run's output folder, it holds no recipe.yaml; run label first")
        return str(labeling.review(this))


def labelled_rows(recipe: Recipe) -> "Dataset | None":
    """The rows that the recipe's stages would have, for a plan: those in its folder where `label` would leave them as
    they are, else as it would label them here. None where that takes a teacher, the model, or data from elsewhere.

    Nothing is asked or written. Raises InputError for settings of the trainers that cannot work, whatever the device.
    """
    for name in recipe.stages:
        training.check_settings(getattr(recipe, name), name)
    this, label = _run_of(recipe), stages_of(recipe)[0]
    with calm_libraries():
        labeling.check(this)
        if (this.folder / LABELS).is_file() and is_done(label, this, fingerprint(label, this)):
            return this.labels()
        return labeling.labelled_alone(this) if data_is_here(recipe) else None


def check_settings(run: Run, chosen: Sequence[str]) -> None:
    """Raise InputError for settings that a stage cannot run with, before any work is done.

    chosen: the stages that will run. Where those are "label" and "report" alone, the trainers' settings are not
    checked: a machine that only labels may lack what they need (bf16).
    """
    try:
        backend.forced()
    except ValueError as error:
        raise InputError(str(error)) from None
    base = run.recipe.lora.get("base")
    require(not run.is_sharded() or base != "int8", "lora.base", base, "nf4 or bf16 with a base that is sharded")
    stages = stages_of(run.recipe)
    for stage in stages:
        # lm-evaluation-harness has 14,000 tasks, whose files take seconds to read, and need not be where others run.
        unasked = stage.name == "benchmark" and stage.name not in chosen
        if not unasked and not (stage.trains and {*chosen} <= {"label", "report"}):
            stage.check(run)
    if len(chosen) == len(stages) and not (run.folder / LABELS).is_file():
        # Before teachers are paid for rows that the run could not use.
        check_targets(run.recipe)


def _check_rows(stages: Sequence[Stage], run: Run) -> None:
    """Refuse labelled rows that a later stage could not use, before the stages between are paid for."""
    there = records(run.folder)
    for stage in stages:
        if "finished" not in there.get(stage.name, {}):
            stage.check_rows(run)


def _run_stage(stage: Stage, run: Run) -> None:
    folder, main = run.folder, processes.is_main()
    # By what the main process sees: on a network file system the others may see it later.
    wanted, record, done = processes.from_main(lambda: _looked_up(stage, run))
    if done:
        log.info("%s: done before, skipped", stage.name)
        return
    takes_part = main or stage.together
    release_freed()
    planned_for = stage.name in NEEDS_MODEL
    if planned_for and takes_part:
        check_memory(stage.name, run.recipe, run.lengths())
    processes.from_main(lambda: _begin(stage, run, wanted, record))
    log.info("%s: started", stage.name)
    made = made_with(stage, run) if main else {}
    reset_peak_memory()
    began, waited = time.perf_counter(), processes.waited()
    written = _times(stage, folder)
    try:
        facts = stage.run(run) if takes_part else {}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(out_of_memory(stage.name, run.recipe, run.lengths() if planned_for else None)) from error
    except InputError:
        # Refused before it wrote anything: what stood there is still what its record says.
        if main and record and written == _times(stage, folder):
            write_json(folder / "stages.json", records(folder) | {stage.name: record})
        raise
    busy = time.perf_counter() - began - (processes.waited() - waited)
    of_each = processes.gather((round(busy, 3), peak_memory_bytes()))
    seconds = time.perf_counter() - began
    if main:
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        together = {"busy_seconds": [busy for busy, _ in of_each]} if len(of_each) > 1 else {}
        record = {"fingerprint": wanted, "made_with": made, "seconds": round(seconds, 3), **together,
                  "peak_memory_bytes": max(peak for _, peak in of_each),
                  "finished": finished, **facts, "files": manifest(folder, stage)}  # fmt: skip
        write_json(folder / "stages.json", records(folder) | {stage.name: record})
        if stage.name != "report":
            planned = [planned.name for planned in stages_of(run.recipe)]
            refresh_metrics(folder, {name: r for name, r in records(folder).items() if name in planned})
    processes.wait()
    log.info("%s: done in %.1f s%s", stage.name, seconds, _said(facts))


def _looked_up(stage: Stage, run: Run) -> tuple[str, dict[str, Any], bool]:
    """(the stage's fingerprint, its record so far, whether it is done); InputError where what it reads is not whole."""
    folder = run.folder
    for name in stage.reads:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; run the stage that makes it before {stage.name}")
    wanted, record = fingerprint(stage, run), records(folder).get(stage.name, {})
    done = is_done(stage, run, wanted) and all((folder / name).is_file() for name in stage.writes)
    if done and (fault := cut_short(folder, record)):
        log.warning("%s: %s; made again", stage.name, fault)
        done = False
    # Check the inputs before earlier work is discarded: they may be damaged, or need more memory than there is.
    check_whole(run, stage.writes if done else stage.reads)
    return wanted, record, done


def _begin(stage: Stage, run: Run, wanted: str, record: dict[str, Any]) -> None:
    if wanted not in (record.get("started"), record.get("fingerprint")):
        stage.discard(run)
    write_json(run.folder / "stages.json", records(run.folder) | {stage.name: {"started": wanted}})


def _times(stage: Stage, folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in stage.writes if (folder / name).exists()}


TAKE_OVER = "use another --output_dir, or --update to redo there what the change touches"


def _check_folder(recipe: Recipe, folder: Path, update: bool, advice: str = TAKE_OVER) -> None:
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
        raise InputError(f"{folder}: made by another recipe ({key} was {old!r}, is {new!r}); {advice}")


def _claim(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe where it is not there yet, and clear away what a killed process has left."""
    path, text = folder / "recipe.yaml", dump_yaml(recipe.as_dict())
    if processes.is_main():
        remove_left_over(folder)
        if not path.exists() or path.read_bytes() != text.encode():
            write_text(path, text)
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
        # Out of a checkout that was never installed there is no metadata of our own.
        log.info("version %s, %s", __version__, ", ".join(versions))
    _check_shared(folder)


def _check_shared(folder: Path) -> None:
    """InputError where a process does not see a file that the main one has just made: it is on another machine, and the
    folder is not shared. (A copy of the folder there has all that was written before.)"""
    if processes.count() == 1:
        return
    sign = folder / processes.from_main(lambda: _new_file(folder))
    until = time.monotonic() + SEEN_AFTER
    while not sign.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    hosts = processes.gather(None if sign.is_file() else socket.gethostname())
    if processes.is_main():
        sign.unlink()
    blind = [f"process {rank} on {host}" for rank, host in enumerate(hosts) if host is not None]
    if blind:
        raise InputError(f"output_dir: {folder} is another folder for {', '.join(blind)}; give one on a file system "
                         "that all machines share")  # fmt: skip


def _new_file(folder: Path) -> str:
    handle, path = tempfile.mkstemp(prefix=".launch.", suffix=".tmp", dir=folder)
    os.close(handle)
    return Path(path).name


def _first_difference(old: Any, new: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            found = _first_difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
            if found and changes_result(found[0]):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        differences = (_first_difference(*pair, f"{at}[{i}]") for i, pair in enumerate(zip(old, new)))
        return next((found for found in differences if found), None)
    return None if old == new else (at, old, new)


@contextlib.contextmanager
def as_input_error(folder: Path) -> Iterator[None]:
    """Turn what libraries raise for a full disk, or a folder that cannot be written, into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Not Path.is_dir, which fails by itself on a name that is too long.
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.isdir(place))
        if disk_is_full(error, there):
            raise InputError(f"{folder}: the disk is full; free some space and run the same command again") from error
        if not isinstance(error, OSError):
            raise
        ours = str(error.filename).startswith((str(folder), str(folder.absolute())))
        # /proc has room for no file, and says that there is no such one.
        if ours and (error.errno in CANNOT_BE_WRITTEN or (error.errno == errno.ENOENT and there != folder)):
            raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from error
        raise


def _said(facts: dict[str, Any]) -> str:
    """The facts of one number or word, for the line that ends a stage."""
    short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items() if not isinstance(v, dict | list)}
    return "".join(f", {key} {value}" for key, value in short.items() if value is not None)
