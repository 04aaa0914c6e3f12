"""What the scoring cases share: rows, padded batches for the other ways, how near two results are, and peak memory."""

import ctypes
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk
from lorapar.data.tokens import encode
from lorapar.memory.process import peak_memory_bytes, reset_peak_memory
from lorapar.model.load import load_tokenizer
from lorapar.recipe.sections import ModelConfig

THETA = 0.9
Example = tuple[list[int], list[int]]  # token ids, labels (-100 on the prompt)
Rows = list[Example]
Batch = tuple[Tensor, Tensor]  # padded ids, labels


def model_config(dtype: str, device: str = "cpu") -> ModelConfig:
    name = os.environ.get("LORAPAR_BENCH_MODEL", "smollm2-135m")
    return ModelConfig(name=name, dtype=dtype, device=device)  # type: ignore[arg-type]


def gsm8k_rows(count: int, first: int = 0) -> Rows:
    """`count` of GSM8K's training rows from `first` on, in the model's chat template; skips the test without them."""
    folder = os.environ.get("LORAPAR_GSM8K")
    if not folder:
        import pytest

        pytest.skip("LORAPAR_GSM8K is not set: it names a folder with GSM8K's train.jsonl")
    tokenizer = load_tokenizer(model_config("float32"))
    made = []
    with (Path(folder) / "train.jsonl").open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, first, first + count):
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["question"]}]
            completion = [{"role": "assistant", "content": row["answer"]}]
            ids, n_prompt = encode({"prompt": prompt, "completion": completion}, tokenizer)
            made.append((ids, [-100] * n_prompt + ids[n_prompt:]))
    return made


def as_rows(examples: Rows) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in examples]


def padded_batches(examples: Rows, batch_size: int) -> list[Batch]:
    """Batches of like length, as ours are, for ways that take [N, T]."""
    from lorapar.scoring.batches import plan_batches

    made = []
    for batch in plan_batches([len(ids) for ids, _ in examples], batch_size, [], padded=True):
        width = max(len(examples[i][0]) for i in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for row, i in enumerate(batch):
            ids[row, : len(examples[i][0])] = torch.tensor(examples[i][0])
            labels[row, : len(examples[i][1])] = torch.tensor(examples[i][1])
        made.append((ids, labels))
    return made


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([scores[name].reshape(-1).float().cpu() for name in sorted(scores)])


def error(scores: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The difference's norm over the expected norm."""
    assert scores.keys() == expected.keys()
    return float((flat(scores) - flat(expected)).norm() / flat(expected).norm())


def jaccard(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of the two kept sets at θ."""
    k1, k2 = (lk.top_mass(flat(scores), THETA) for scores in (one, other))
    return float((k1 & k2).sum() / (k1 | k2).sum())


def with_peaks(ways: dict[str, Callable[[], Any]], peaks: dict[str, int], device: str = "cpu") -> dict[str, Any]:
    """The same ways, each of which leaves in `peaks` the bytes it needed at most beyond what was there before it.

    A GPU's are the allocator's, a CPU's the resident set's.
    """

    def measured(way: str) -> Callable[[], Any]:
        def run() -> Any:
            # What the way before has freed and glibc keeps would hide what this one needs.
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            reset_peak_memory()
            before = torch.cuda.memory_allocated() if device == "cuda" else peak_memory_bytes()
            result = ways[way]()
            peaks[way] = max(peaks.get(way, 0), peak_memory_bytes() - before)
            return result

        return run

    return {way: measured(way) for way in ways}
