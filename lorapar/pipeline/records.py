"""What the stages of a run have written of themselves into `stages.json`, and whether it still holds.

A stage's record holds a fingerprint of everything that it read, its time and memory, and digests of the weights
it wrote. A stage with the same fingerprint in its record, and its files in the folder, is done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter.attach import saved_shapes
from ..adapter.layers import check_fits
from ..errors import InputError
from ..files import read_json, sha256_file, sha256_json, why_not_whole, write_json
from ..partitioning.partition import Partition
from ..recipe.sections import changes_result
from ..scoring.scores import load_scores
from ..stage import LABELS, PARTITION, PARTITION_RENEWED, SCORES, SCORES_RENEWED, Run, Stage, weights_of

# Left out of a fingerprint where they are not set: folders made before these keys still hold.
LATER_KEYS = {
    "model": ("chat_template", "chat_template_kwargs", "eos_token", "pad_token"),
    "sft": ("eval_rows", "early_stopping_patience"),
    "grpo": ("watch_rows",),
    "evaluate": ("metric",),
    "partition": ("system1_cost",),
    "export": ("gguf",),
}


def fingerprint(stage: Stage, run: Run) -> str:
    """A digest of the recipe's sections and the files that the stage reads, local data and model files included.

    Model weights go by size and time of change, like a Makefile's: hashing them would cost a run many seconds a stage.
    """
    recipe, values = run.recipe, _values(run)
    inputs: dict[str, Any] = {section: values[section] for section in stage.sections}
    inputs["files"] = _files(stage, run)
    inputs |= stage.inputs(run) | stage.outside(run)
    if "model" in stage.sections:
        place = Path(recipe.model.name).expanduser()
        files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
        stats = {file.name: file.stat() for file in files if file.suffix in (".safetensors", ".gguf", ".json")}
        template = recipe.model.chat_template or ""
        if "{" not in template and Path(template).expanduser().is_file():
            inputs["chat_template"] = sha256_file(Path(template).expanduser())
        inputs["weights"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return sha256_json(inputs)


def made_with(stage: Stage, run: Run) -> dict[str, Any]:
    """What decides a stage's result in the recipe and the run's folder: {"recipe": digest, "files": {name: sha256}}.

    Unlike a fingerprint it is the same where base, data and the folder itself have been moved, and for other values of
    keys that change no result.
    """
    return {"recipe": _of_recipe(stage, run), "files": _files(stage, run)}


def is_done(stage: Stage, run: Run, wanted: str) -> bool:
    """Whether a stage has been done with its inputs as they are; `wanted`: its fingerprint."""
    record = records(run.folder).get(stage.name, {})
    # A label stage's fingerprint has its data's files in the place of the recipe's section data.
    of_recipe = "made_with" not in record or record["made_with"]["recipe"] == _of_recipe(stage, run)
    return record.get("fingerprint") == wanted and of_recipe


def why_another(stage: Stage, run: Run) -> str | None:
    """What a finished stage's result is of that is not the recipe and the folder's files as they are; None: of these.

    A file that is not there any more, such as scores deleted for the space that they take, is not looked at.
    """
    record = records(run.folder)[stage.name]
    if "made_with" not in record:  # of an earlier version
        missing = next((name for name in stage.reads if not (run.folder / name).is_file()), None)
        other = missing is None and record["fingerprint"] != fingerprint(stage, run)
        return f"{missing}, which is missing" if missing else "another recipe, or other files" if other else None
    was, now = record["made_with"], made_with(stage, run)
    if was["recipe"] != now["recipe"]:
        return "another recipe"
    return next((f"another {name}" for name, digest in now["files"].items() if digest != was["files"].get(name)), None)


def _of_recipe(stage: Stage, run: Run) -> str:
    values = _values(run)
    return sha256_json({section: _deciding(values[section], section) for section in stage.sections} | stage.inputs(run))


def _deciding(value: Any, at: str) -> Any:
    """A section's values without the keys that change no result."""
    if isinstance(value, dict):
        return {key: _deciding(item, f"{at}.{key}") for key, item in value.items() if changes_result(f"{at}.{key}")}
    return [_deciding(item, f"{at}[{i}]") for i, item in enumerate(value)] if isinstance(value, list) else value


def _files(stage: Stage, run: Run) -> dict[str, str]:
    """{file of the run's folder that the stage reads: sha256}, of those that are there."""
    names = (*stage.reads, *stage.optional_reads)
    return {name: sha256_file(run.folder / name) for name in names if (run.folder / name).is_file()}


def _values(run: Run) -> dict[str, Any]:
    """The recipe's values as fingerprints hold them."""
    recipe, values = run.recipe, run.recipe.as_dict()
    for name in ("model", "score", "sft", "grpo", "evaluate"):
        values[name] = {key: value for key, value in values[name].items() if changes_result(f"{name}.{key}")}
    # The stages that learn from tokens say it by themselves; labels are the same.
    del values["data"]["loss"]
    # It shows in which stages there are and which files they read, and the stages before are the same without it.
    del values["score"]["renew"]
    for name, later in LATER_KEYS.items():
        values[name] = {key: value for key, value in values[name].items() if value or key not in later}
    if not recipe.grpo.watch_rows:
        del values["grpo"]["watch_rise"]
    return values


def records(folder: Path) -> dict[str, Any]:
    """The stages' records in `stages.json`; {"started": fingerprint} for a stage that has not finished."""
    path = folder / "stages.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(record, dict) for record in found.values()):
        raise InputError(f"{path}: corrupt: it holds no records of stages; delete it to do every stage again")
    return found


def manifest(folder: Path, stage: Stage) -> dict[str, dict[str, Any]]:
    """{file: {"sha256" | "bytes": ...}} of the files a stage has written that hold no checksum of their own.

    Adapters' weights by their digest. Files of the folders that it writes whole (a merged model) by their size alone:
    hashing those would cost every command many seconds. Our other safetensors hold a digest of their own, and labels
    may be edited.
    """
    weights = [name for name in stage.writes if name.endswith("/adapter_model.safetensors")]
    whole = [path for name in stage.folders for path in sorted((folder / name).iterdir()) if path.is_file()]
    return {
        **{name: {"sha256": sha256_file(folder / name)} for name in weights},
        **{path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size} for path in whole},
    }


def recorded_files(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest in a stage's record; older records keep digests and sizes apart."""
    files = {name: dict(facts) for name, facts in record.get("files", {}).items()}
    for key in ("sha256", "bytes"):
        for name, value in record.get(key, {}).items():
            files.setdefault(name, {})[key] = value
    return files


def cut_short(folder: Path, record: dict[str, Any]) -> str | None:
    """Which file of a stage's manifest is missing or shorter than it was written; None where all are there."""
    for name, facts in recorded_files(record).items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < facts.get("bytes", 0):
            return f"{folder / name} holds {size} of the {facts['bytes']} bytes that were written"
    return None


def check_whole(run: Run, names: Sequence[str]) -> None:
    """Read the artefacts that a stage is about to use or has written, and check that the adapters fit the partition.

    Raises InputError for one that is missing, corrupt, of another model, or, an adapter, not what its stage wrote.
    """
    folder = run.folder
    if LABELS in names:
        run.labels()
    for name in names:
        fault = None if name == LABELS else why_not_whole(folder / name)
        if fault:
            raise InputError(f"{folder / name}: {fault}; restore it, or delete it to have it made again")
    for scores in {SCORES, SCORES_RENEWED} & set(names):
        load_scores(folder / scores)
    for partition in {PARTITION, PARTITION_RENEWED} & set(names):
        active = Partition.load(folder / partition).active("sft")
        for name in names:
            if name.endswith("/adapter_model.safetensors"):
                check_fits(saved_shapes((folder / name).parent), active, str(folder / partition))
    for stage, record in records(folder).items():
        for name, facts in recorded_files(record).items():
            if name in names and "sha256" in facts and sha256_file(folder / name) != facts["sha256"]:
                raise InputError(f"{folder / name}: corrupt: not the file that {stage} wrote (another sha256); restore "
                                 "it, or delete it to have it made again")  # fmt: skip


def refresh_metrics(folder: Path, records: dict[str, Any]) -> None:
    """Put each finished stage's seconds, peak memory and optimizer state into metrics.json, where that exists; and the
    benchmarks of tasks.json, as long as the adapters are those that they measured."""
    path = folder / "metrics.json"
    if not path.exists():
        return
    done = {name: record for name, record in records.items() if "seconds" in record}
    metrics = {key: value for key, value in read_json(path).items() if key != "tasks"}
    write_json(
        path,
        metrics
        | {
            "optimizer_state_bytes": {n: r["optimizer_state_bytes"] for n, r in done.items() if n in ("sft", "grpo")},
            "seconds": {name: record["seconds"] for name, record in done.items()},
            # Of the seconds above, those in which completions were generated.
            "rollout_seconds": {n: r["rollout_seconds"] for n, r in done.items() if "rollout_seconds" in r},
            "peak_memory_bytes": {name: record["peak_memory_bytes"] for name, record in done.items()},
        }
        | _benchmarks(folder, done),
    )


def _benchmarks(folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    """{"tasks": the figures of tasks.json}, or nothing where it measured other adapters than the finished ones."""
    path = folder / "tasks.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    trained = [name for name in ("sft", "grpo") if name in done]
    adapters = {name: recorded_files(done[name]).get(weights_of(name), {}).get("sha256") for name in trained}
    return {"tasks": found["tasks"]} if found["adapters"] == adapters else {}
