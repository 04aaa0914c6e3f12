"""A run's artefacts as the report reads them."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import InputError
from ..files import read_json, read_jsonl, read_text
from ..partitioning.partition import Partition
from ..scoring.scores import load_scores
from . import elements
from .elements import GRANULARITIES, KeepCurve
from .html import percent, signed_points


@dataclass
class Artefacts:
    """What a run's folder holds; None or empty where a file is missing."""

    folder: Path
    newest: datetime  # of the artefacts read
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    labels: list[dict] | None = None
    dropped: list[dict] = field(default_factory=list)  # rows that label.ties: drop left out
    votes: list[dict] | None = None  # of teachers
    metrics: dict[str, Any] | None = None
    answers: list[dict] | None = None  # to the held-out rows, of every model
    texts: bool = True  # whether the page may show rows: prompts, references, answers
    histories: dict[str, list[dict]] = field(default_factory=dict)
    watched: dict[str, Any] | None = None  # the losses that grpo watched, once a step was kept
    partition: Partition | None = None
    codes: dict[str, np.ndarray] | None = None  # region of every trainable element
    scores: dict[int, dict[str, np.ndarray]] | None = None
    curves: dict[tuple[int, str], KeepCurve] = field(default_factory=dict)


def read_artefacts(folder: Path, labels: list[dict[str, Any]] | None = None, texts: bool = True) -> Artefacts:
    """Read what is there; `labels` are the rows of labels.jsonl, where they have been read already.

    texts: whether the page may show the rows' prompts, references and answers.

    Raises InputError where nothing is there, and, naming the file, where an artefact is corrupt.
    """
    files = {
        name: folder / path
        for name, path in {
            "recipe": "recipe.yaml", "labels": "labels.jsonl", "dropped": "dropped.jsonl", "votes": "votes.jsonl",
            "scores": "scores.safetensors",
            "partition": "partition.safetensors", "sft": "sft/log_history.json",
            "grpo": "grpo/log_history.json", "watched": "grpo/watched.json",
            "metrics": "metrics.json", "answers": "answers.jsonl",
        }.items()
        if (folder / path).is_file()
    }  # fmt: skip
    if not files:
        raise InputError(f"{folder}: holds no artefact of a run (recipe.yaml, labels.jsonl, scores.safetensors, …)")
    recipe_text = read_text(files["recipe"]) if "recipe" in files else None
    recipe = yaml.safe_load(recipe_text or "") or {}
    renewed = {"scores": folder / "scores_renewed.safetensors", "partition": folder / "partition_renewed.safetensors"}
    # Left from a recipe that had the key, they are not of this run.
    if (recipe.get("score") or {}).get("renew") and all(path.is_file() for path in renewed.values()):
        files |= renewed
    newest = max(path.stat().st_mtime for path in files.values())
    run = Artefacts(folder, datetime.fromtimestamp(newest, UTC), recipe_text, recipe, texts=texts)
    run.labels = labels or (read_jsonl(files["labels"]) if "labels" in files else None)
    run.dropped = read_jsonl(files["dropped"]) if "dropped" in files else []
    run.votes = read_jsonl(files["votes"]) if "votes" in files else None
    run.metrics = read_json(files["metrics"]) if "metrics" in files else None
    run.answers = read_jsonl(files["answers"]) if "answers" in files else None
    run.histories = {stage: read_json(files[stage]) for stage in ("sft", "grpo") if stage in files}
    watched = read_json(files["watched"]) if "watched" in files else {}
    run.watched = watched if "kept" in watched else None
    if "partition" in files:
        run.partition = Partition.load(files["partition"])
        run.codes = elements.region_codes(run.partition)
    if "scores" in files:
        run.scores = {
            system: {name: elements.trainable(name, t, scores.metadata.get("rank")) for name, t in scores.items()}
            for system, scores in enumerate(load_scores(files["scores"]), start=1)
        }
        shapes = {name: array.shape for name, array in run.scores[1].items()}
        if run.codes is not None and shapes != {name: array.shape for name, array in run.codes.items()}:
            raise InputError(
                f"{files['partition']}: does not fit {files['scores'].name}: its parameters or shapes differ"
            )
        run.curves = {(s, g): elements.keep_curve(run.scores[s], g) for s in (1, 2) for g in GRANULARITIES}
    return run


@dataclass
class Measured:
    """What the held-out rows were measured by: accuracy, or the mean of a metric of the user's."""

    name: str
    is_share: bool
    means: dict[str, dict[str, float]]  # by model and group
    counts: dict[str, dict[str, int]]  # rows that have a value, likewise

    def text(self, value: float) -> str:
        return percent(value) if self.is_share else f"{value:.4g}"

    def change(self, value: float) -> str:
        """A difference between two means, without its sign."""
        return f"{abs(100 * value):.1f} points" if self.is_share else f"{abs(value):.3g}"

    def signed(self, value: float) -> str:
        return signed_points(value) if self.is_share else f"{value:+.3g}".replace("-", "−")


def measured(run: Artefacts) -> Measured:
    assert run.metrics is not None
    name = run.metrics.get("metric")
    means = run.metrics["accuracy" if name is None else "mean"]
    counts = run.metrics.get("n", {})
    # Accuracy's are the same for every model.
    by_model = {step: counts for step in means} if name is None else counts
    return Measured(name or "accuracy", name is None, means, by_model)


def evaluated(run: Artefacts) -> list[str]:
    """ "base" and the stages that were evaluated, in the order in which they ran."""
    order = run.recipe.get("stages") or ["sft", "grpo"]
    return [step for step in ("base", *order) if step in measured(run).means]


def active_counts(run: Artefacts) -> dict[str, int]:
    assert run.partition is not None
    return {s: sum(int(mask.sum()) for mask in run.partition.active(s).values()) for s in ("sft", "grpo")}


def model_name(run: Artefacts) -> str:
    model = run.recipe.get("model", "model not recorded")
    return str(model["name"] if isinstance(model, dict) else model)


def vote_weights(run: Artefacts) -> dict[str, float]:
    """The recipe's weights of voters, by which the labels were decided; a voter without one counts 1."""
    return (run.recipe.get("label") or {}).get("weights") or {}
