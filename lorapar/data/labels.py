"""What a run's folder holds, read and held together: labels, the adapters' shapes, every artefact whole, metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset

from ..adapter.layers import ADAPTER, check_fits
from ..errors import InputError
from ..files import read_json, read_jsonl, why_not_whole, write_json
from ..partitioning.partition import Partition
from ..scoring.scores import load_scores
from .rows import to_dataset

LABELLED_COLUMNS = ("id", "prompt", "completion", "answer", "split", "source", "system")


def load_labels(folder: Path) -> Dataset:
    """The labelled rows; InputError for a line that lacks what later stages read."""
    path = folder / "labels.jsonl"
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        for column in LABELLED_COLUMNS:
            if row.get(column) is None:
                raise InputError(f"{path}: line {number} has no {column!r}; label writes {', '.join(LABELLED_COLUMNS)}")
        if row["system"] not in (1, 2) or row["split"] not in ("train", "held_out"):
            given = row["system"], row["split"]
            raise InputError(f"{path}: line {number}: system and split are {given}, allowed: 1 or 2, train or held_out")
    return to_dataset(rows)


def load_adapter_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Zeros of the saved adapter's shapes under the names the loaded model gives its parameters."""
    from safetensors.torch import load_file

    ends = ((".lora_A.weight", f".lora_A.{ADAPTER}.weight"), (".lora_B.weight", f".lora_B.{ADAPTER}.weight"))
    shapes = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        for saved, loaded in ends:
            if name.endswith(saved):
                shapes[name.removesuffix(saved) + loaded] = torch.zeros(tensor.shape)
    return shapes


def check_whole(folder: Path, names: Sequence[str]) -> None:
    """Read the artefacts that a stage is about to use or has written, and hold partition and adapters together.

    Raises InputError for one that is missing, corrupt or of another model.
    """
    for name in names:
        fault = why_not_whole(folder / name)
        if fault:
            raise InputError(f"{folder / name}: {fault}; restore it, or delete it to have it made again")
    if "labels.jsonl" in names:
        load_labels(folder)
    if "scores.safetensors" in names:
        load_scores(folder / "scores.safetensors")
    if "partition.safetensors" in names:
        made = Partition.load(folder / "partition.safetensors")
        for name in names:
            if name.endswith("/adapter_model.safetensors"):
                shapes = load_adapter_shapes((folder / name).parent)
                check_fits(cast(Any, shapes), made.active("sft"), str(folder / "partition.safetensors"))


def refresh_metrics(folder: Path, records: dict[str, Any]) -> None:
    """Put each finished stage's seconds, peak memory and optimizer state into metrics.json, where that exists."""
    path = folder / "metrics.json"
    if not path.exists():
        return
    done = {name: record for name, record in records.items() if "seconds" in record}
    write_json(
        path,
        read_json(path)
        | {
            "optimizer_state_bytes": {n: r["optimizer_state_bytes"] for n, r in done.items() if n in ("sft", "grpo")},
            "seconds": {name: record["seconds"] for name, record in done.items()},
            # Of the seconds above, those in which completions were generated.
            "rollout_seconds": {n: r["rollout_seconds"] for n, r in done.items() if "rollout_seconds" in r},
            "peak_memory_bytes": {name: record["peak_memory_bytes"] for name, record in done.items()},
        },
    )
