"""`lorapar push`: what a run has made, as a repository of the hub.

The repository is the adapter folder, so that PEFT and vLLM load it by its name; beside it lie the partition, the
recipe, the metrics, the report and a card. What a run keeps for itself stays: rows, answers, scores, the trainers'
checkpoints; merged and GGUF models too, which are of another kind than an adapter's repository.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from ..data.tables import form_of
from ..errors import InputError
from ..exporting.card import Published, hub_card
from ..files import read_json, read_text, write_json, write_text
from ..logs import calm_libraries
from ..model.locate import ALIAS, ALIAS_ORIGIN
from ..partitioning.partition import Partition
from ..pipeline.records import check_whole, records
from ..pipeline.running import as_input_error, finished_run
from ..recipe.reading import dump_yaml
from ..recipe.sections import Recipe
from ..reporting.report import report
from ..stage import LABELS, Run, adapter_files, partition_of
from .base import HUB_ID, Base, licence_of, published_base
from .push import check_repository, check_token, push
from .redact import Redacted, check_nothing_private, shorten_paths

MESSAGE = "Adapter, partition, report and card, by lorapar push"
# What the report reads beside recipe, metrics and labels (reporting/artefacts.py).
REPORTED = ("answers.jsonl", "votes.jsonl", "dropped.jsonl", "scores.safetensors", "partition.safetensors",
            "scores_renewed.safetensors", "partition_renewed.safetensors", "sft/log_history.json",
            "grpo/log_history.json", "grpo/watched.json")  # fmt: skip
ALIAS_LICENCE = "apache-2.0"


def push_verb(recipe: Recipe, repository: str, dry_run: bool, private: bool, with_answers: bool) -> str:
    """Publish a finished run, or say what would go where; returns the text to print.

    Raises InputError, before anything is sent, for a name that is no owner/name, a run that has not been exported since
    it was trained, and where there is no token; what `push` raises where the hub refuses.
    """
    check_repository(repository)
    run = finished_run(recipe, ())
    _check_exported(run)
    token = "" if dry_run else check_token()
    # Not in the run's folder, which is only read.
    with tempfile.TemporaryDirectory(prefix="lorapar-push-") as temporary, as_input_error(Path(temporary)):
        with calm_libraries():
            files, base, replaced = _collect(run, repository, Path(temporary), with_answers)
        if dry_run:
            return _preview(run, repository, private, with_answers, files, base, replaced)
        url = push(files, repository, private, MESSAGE, token)
        notes = [base.note] if base.note else []
        return "\n".join([f"{url}: {_size(files.values())}", *notes])


def _check_exported(run: Run) -> None:
    """InputError unless adapter/ is what the last training stage left, and the metrics are of it."""
    folder, recipe = run.folder, run.recipe
    last, there = recipe.stages[-1], records(run.folder)
    exported = there.get("export", {}).get("finished")
    if exported is None or not (folder / "adapter").is_dir():
        raise InputError(f"{folder}: the run has not been exported; run `lorapar export` first")
    trained = there.get(last, {}).get("finished")
    if trained is None or exported < trained:
        raise InputError(f"{folder}: adapter/ is older than {last}/; run `lorapar export` again")
    evaluated = there.get("evaluate", {}).get("finished")
    if (folder / "metrics.json").is_file() and evaluated is not None and evaluated < trained:
        raise InputError(f"{folder}: metrics.json is of an adapter before this one; run `lorapar evaluate` again")
    check_whole(run, (LABELS, partition_of(recipe, last), *adapter_files("adapter")))


def _collect(
    run: Run, repository: str, temporary: Path, with_answers: bool
) -> tuple[dict[str, Path], Base, dict[str, str]]:
    """({name in the repository: file}, the base, what was replaced in recipe and metrics by its key)"""
    folder, recipe = run.folder, run.recipe
    out, behind = temporary / "out", temporary / "report"
    settings = read_json(folder / "adapter" / "adapter_config.json")
    base = published_base(settings, recipe.model.name)
    named = Redacted(recipe.as_dict())
    values = named.values
    if "model.name" in named.replaced or base.on_hub:
        values["model"] = values["model"] | {"name": ALIAS if base.weights else base.name}
    write_text(out / "recipe.yaml", dump_yaml(values))
    write_json(
        out / "adapter_config.json", settings | {"base_model_name_or_path": base.name, "revision": base.revision}
    )
    metrics: dict[str, Any] = {}
    if (folder / "metrics.json").is_file():
        shown = Redacted(read_json(folder / "metrics.json"))
        metrics = shown.values
        named.replaced.update(shown.replaced)
        write_json(out / "metrics.json", metrics)
    for name in ("recipe.yaml", "metrics.json"):
        if (out / name).is_file():
            # The report's date is its newest artefact's.
            shutil.copystat(folder / name, out / name)
            _place(out / name, behind / name)
    for name in REPORTED:
        if (folder / name).is_file():
            _place(folder / name, behind / name)
    report(behind, list(cast(Iterable[dict[str, Any]], run.labels())), answers=with_answers)
    own = {str(folder), str(folder.absolute())} | ({str(settings["base_model_name_or_path"])} - {base.name})
    private = own | set(named.replaced.values())
    write_text(out / "report.html", shorten_paths(read_text(behind / "report.html"), private))
    write_text(out / "README.md", hub_card(_published(run, repository, base, values, metrics), folder / "adapter"))
    as_it_is = {path.name: path for path in sorted((folder / "adapter").iterdir()) if path.is_file()}
    partition = {"lorapar_partition.safetensors": folder / partition_of(recipe, recipe.stages[-1])}
    files = as_it_is | partition | {path.name: path for path in sorted(out.iterdir())}
    check_nothing_private(files.items(), private)
    return files, base, named.replaced


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)  # scores of a large model are gigabytes
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _published(run: Run, repository: str, base: Base, recipe: dict[str, Any], metrics: dict[str, Any]) -> Published:
    """What the card says, out of the recipe as it is published."""
    config, made = run.recipe, Partition.load(run.folder / partition_of(run.recipe, run.recipe.stages[-1]))
    facts = made.summary()
    sources = [source["name"] for source in recipe["data"]["sources"]]
    theta = f"θ {facts['theta']:g}, α {config.partition.alpha:g}, β {config.partition.beta:g}"
    active = [f"{100 * facts['fraction'][f'active_{stage}']:.1f} % in {stage.upper()}" for stage in config.stages]
    settings = {
        "rank": f"{made.metadata.get('rank')} trainable, started as `{config.start}`",
        "alpha": f"{config.lora.get('lora_alpha', 8)}",
        "partition": f"{theta}, {config.partition.granularity} granularity, by {config.partition.selection}",
        "active elements": ", ".join(active),
        "seed": str(config.seed),
    }
    for stage in config.stages:
        section = recipe[stage]
        keys = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "num_generations")
        told = [f"{key} {section[key]:g}" for key in keys if isinstance(section.get(key), int | float)]
        settings[stage.upper()] = ", ".join([*told, *(f"reward `{name}`" for name in section.get("rewards", []))])
    return Published(
        repository=repository,
        base=base.name,
        on_hub=base.on_hub,
        revision=base.revision,
        base_facts=base.facts,
        weights=base.weights,
        stages={stage: getattr(config, stage).systems for stage in config.stages},
        data=list(dict.fromkeys(sources)),
        selection=config.partition.selection,
        datasets=hub_datasets(sources),
        settings=settings,
        metrics=metrics,
        licence=ALIAS_LICENCE if base.name == ALIAS_ORIGIN else licence_of(Path(config.model.name).expanduser()),
        vllm=records(run.folder)["export"].get("vllm", {}),
    )


def hub_datasets(sources: Iterable[str]) -> list[str]:
    """The hub ids among sources' names, owner/name or owner/name:config."""
    names = dict.fromkeys(name.partition(":")[0] for name in sources)
    return [name for name in names
            if HUB_ID.fullmatch(name) and not form_of(Path(name)) and not os.path.exists(name)]  # fmt: skip


def _preview(
    run: Run, repository: str, private: bool, with_answers: bool, files: dict[str, Path], base: Base,
    replaced: dict[str, str],
) -> str:  # fmt: skip
    who = "a private repository" if private else "a repository, public unless its owner's default is another"
    partition = partition_of(run.recipe, run.recipe.stages[-1])
    stays = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(run.folder.iterdir())
             if path.name not in files and path.name not in ("adapter", "figures", partition)]  # fmt: skip
    lines = [
        f"nothing was sent; {_size(files.values())} would go to {repository} ({who}):",
        *(f"  {name:<32} {_bytes(path.stat().st_size):>10}" for name, path in sorted(files.items())),
        f"left out: {', '.join(stays)}",
        f"report.html: {'with' if with_answers else 'without'} the rows' texts and answers",
    ]
    if replaced:
        lines.append(f"changed, so that no path or address of this machine goes: {', '.join(replaced)}")
    if base.note:
        lines.append(base.note)
    return "\n".join([*lines, "README.md:", "", files["README.md"].read_text(encoding="utf-8")])


def _size(files: Iterable[Path]) -> str:
    sizes = [path.stat().st_size for path in files]
    return f"{len(sizes)} files, {_bytes(sum(sizes))}"


def _bytes(count: int) -> str:
    """1 MB is 10⁶ bytes."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
