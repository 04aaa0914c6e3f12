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
from ..logs import RUN_LOCK, calm_libraries
from ..model.locate import ALIAS, ALIAS_ORIGIN
from ..partitioning.partition import Partition
from ..pipeline.order import stages_of
from ..pipeline.records import check_whole, fingerprint, records, why_another
from ..pipeline.running import as_input_error, finished_run
from ..recipe.reading import dump_yaml
from ..recipe.sections import Recipe
from ..reporting.report import report
from ..stage import LABELS, Run, adapter_files, partition_of
from .base import HUB_ID, Base, OnHub, licence_of, published_base
from .push import check_repository, check_token, is_on_hub, push
from .redact import Redacted, check_nothing_private, is_relative, last_part, shorten_paths

MESSAGE = "Adapter, partition, report and card, by lorapar push"
# What the report reads beside recipe, metrics and labels (reporting/artefacts.py).
REPORTED = ("answers.jsonl", "votes.jsonl", "dropped.jsonl", "scores.safetensors", "partition.safetensors",
            "scores_renewed.safetensors", "partition_renewed.safetensors", "sft/log_history.json",
            "grpo/log_history.json", "grpo/watched.json")  # fmt: skip
# What export writes into adapter/, and no other file that lies there: the adapter, and what a tokenizer saves.
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "lorapar.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
             "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "source.spm", "target.spm",
             "target_vocab.json", "normalizer.json", "bpe.codes", "dict.txt", "emoji.json",
             "vocab-src.json", "vocab-tgt.json")  # fmt: skip
PARTITION = "lorapar_partition.safetensors"
# All that push writes, in one push or another.
NAMES = (*ADAPTER, *TOKENIZER, PARTITION, "recipe.yaml", "metrics.json", "report.html", "README.md")
ALIAS_LICENCE = "apache-2.0"


def push_verb(recipe: Recipe, repository: str, dry_run: bool, private: bool, with_answers: bool) -> str:
    """Publish a finished run, or say what would go where; returns the text to print.

    Raises InputError, before anything is sent, for a name that is no owner/name, a run that has not been exported since
    it was trained, and where there is no token; what `push` raises where the hub refuses.
    """
    check_repository(repository)
    token = "" if dry_run else check_token()
    run = finished_run(recipe, ())
    _check_exported(run)
    asked: dict[tuple[str, str], bool | None] = {}

    def on_hub(kind: str, name: str) -> bool | None:
        if (kind, name) not in asked:
            asked[kind, name] = None if dry_run else is_on_hub(kind, name, token)
        return asked[kind, name]

    # Not in the run's folder, which is only read.
    with tempfile.TemporaryDirectory(prefix="lorapar-push-") as temporary, as_input_error(Path(temporary)):
        with calm_libraries():
            files, base, replaced = _collect(run, repository, Path(temporary), with_answers, on_hub)
        if dry_run:
            unasked = [name for kind, name in asked if kind == "dataset"]
            return _preview(run, repository, private, with_answers, files, base, replaced, unasked)
        url, said = push(files, NAMES, repository, private, MESSAGE, token)
        return "\n".join([f"{url}: {_size(files.values())}", *said, *([base.note] if base.note else [])])


def _check_exported(run: Run) -> None:
    """InputError unless adapter/, and the metrics where there are any, are of this recipe and of one another."""
    folder, recipe, there = run.folder, run.recipe, records(run.folder)
    if "finished" not in there.get("export", {}) or not (folder / "adapter").is_dir():
        raise InputError(f"{folder}: the run has not been exported; run `lorapar export` first")
    for stage in stages_of(recipe):
        # The report is drawn anew; metrics.json keeps a benchmark's figures only with the adapters that it measured.
        if stage.name in ("benchmark", "report"):
            continue
        if stage.name == "evaluate" and not (folder / "metrics.json").is_file():
            continue
        if "finished" not in there.get(stage.name, {}):
            raise InputError(f"{folder}: {stage.name} has not been finished; run `lorapar run` again")
        if other := why_another(stage, run):
            raise InputError(f"{folder}: {stage.name} is of {other}; run `lorapar run` again")
    check_whole(run, (LABELS, partition_of(recipe, recipe.stages[-1]), *adapter_files("adapter")))


def _collect(
    run: Run, repository: str, temporary: Path, with_answers: bool, on_hub: OnHub
) -> tuple[dict[str, Path], Base, list[str]]:
    """({name in the repository: file}, the base, the keys in recipe and metrics of which something was replaced)"""
    folder, recipe = run.folder, run.recipe
    out, behind = temporary / "out", temporary / "report"
    settings = read_json(folder / "adapter" / "adapter_config.json")
    last = next(stage for stage in stages_of(recipe) if stage.name == recipe.stages[-1])
    same_files = records(folder)[last.name]["fingerprint"] == fingerprint(last, run)
    base = published_base(settings, recipe.model.name, on_hub, same_files)
    named = Redacted(recipe.as_dict())
    values, called = named.values, ALIAS if base.weights else base.called
    if called != recipe.model.name:
        values["model"] = values["model"] | {"name": named.replace("model.name", recipe.model.name, called)}
    for i, source in enumerate(values["data"]["sources"]):
        if hub_id(source["name"]) and on_hub("dataset", hub_id(source["name"])) is False:
            source["name"] = named.replace(f"data.sources[{i}].name", source["name"], last_part(source["name"]))
    write_text(out / "recipe.yaml", dump_yaml(values))
    write_json(
        out / "adapter_config.json", settings | {"base_model_name_or_path": base.called, "revision": base.revision}
    )
    metrics: dict[str, Any] = {}
    replaced, private = named.replaced, named.private
    if (folder / "metrics.json").is_file():
        shown = Redacted(read_json(folder / "metrics.json"))
        metrics = shown.values
        replaced, private = replaced + shown.replaced, private | shown.private
        write_json(out / "metrics.json", metrics)
    for name in ("recipe.yaml", "metrics.json"):
        if (out / name).is_file():
            # The report's date is its newest artefact's.
            shutil.copystat(folder / name, out / name)
            _place(out / name, behind / name)
    for name in REPORTED:
        if (folder / name).is_file():
            _place(folder / name, behind / name)
    try:
        report(behind, list(cast(Iterable[dict[str, Any]], run.labels())), answers=with_answers)
    except InputError as error:
        # It has read the run's files elsewhere.
        raise InputError(str(error).replace(str(behind), str(folder))) from None
    private |= {str(folder), str(folder.absolute())} | ({str(settings["base_model_name_or_path"])} - {base.name})
    # What the hub knows under the same name, or is published as it is, is nobody's secret.
    private -= {base.name, called, repository}
    write_text(out / "report.html", shorten_paths(read_text(behind / "report.html"), private))
    write_text(out / "README.md", hub_card(_published(run, repository, base, values, metrics, on_hub),
                                           folder / "adapter"))  # fmt: skip
    as_it_is = {name: folder / "adapter" / name for name in (*ADAPTER, *TOKENIZER)
                if (folder / "adapter" / name).is_file()}  # fmt: skip
    partition = {PARTITION: folder / partition_of(recipe, recipe.stages[-1])}
    written = {path.name: path for path in sorted(out.iterdir())}
    files = as_it_is | partition | written
    relative = {text for text in private if is_relative(text)}
    check_nothing_private(files.items(), private - relative)
    check_nothing_private(written.items(), relative)
    return files, base, replaced


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)  # scores of a large model are gigabytes
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _published(
    run: Run, repository: str, base: Base, recipe: dict[str, Any], metrics: dict[str, Any], on_hub: OnHub
) -> Published:
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
        datasets=hub_datasets(sources, on_hub),
        settings=settings,
        metrics=metrics,
        licence=ALIAS_LICENCE if base.name == ALIAS_ORIGIN else licence_of(Path(config.model.name).expanduser()),
        vllm=records(run.folder)["export"].get("vllm", {}),
    )


def hub_id(source: str) -> str:
    """The name that the hub may have a source under, owner/name or owner/name:config; "" for any other name."""
    name = source.partition(":")[0]
    return name if HUB_ID.fullmatch(name) and not form_of(Path(name)) and not os.path.exists(name) else ""


def hub_datasets(sources: Iterable[str], on_hub: OnHub) -> list[str]:
    """The hub ids among sources' names; also those of which the hub was not asked."""
    names = dict.fromkeys(filter(None, map(hub_id, sources)))
    return [name for name in names if on_hub("dataset", name) is not False]


def _preview(
    run: Run, repository: str, private: bool, with_answers: bool, files: dict[str, Path], base: Base,
    replaced: list[str], unasked: list[str],
) -> str:  # fmt: skip
    who = "a private repository" if private else "a repository, public unless its owner's default is another"
    partition = partition_of(run.recipe, run.recipe.stages[-1])
    stays = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(run.folder.iterdir())
             if path.name not in files and path.name not in ("adapter", "figures", RUN_LOCK, partition)]  # fmt: skip
    stays += [f"adapter/{path.name}{'/' * path.is_dir()}" for path in sorted((run.folder / "adapter").iterdir())
              if path.name not in files]  # fmt: skip
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
    if unasked:
        lines.append(f"not checked: whether the hub has the data set {', '.join(unasked)}; a name that it has not is "
                     "shortened to its last part")  # fmt: skip
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
