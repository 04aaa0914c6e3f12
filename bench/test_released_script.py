"""Scoring and selecting against the released script's way, on SmolLM2-135M and GSM8K rows, in one run.

    LORAPAR_GSM8K=<folder with train.jsonl> pytest bench/test_released_script.py

`LORAPAR_BENCH_MODEL` names another model. Both ways see the same rows, tokens and factors: the paper's start
N(0, 0.01²), rank 8, its six target modules.
"""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import lorapar_kernels as lk
from bench.interleaved import Timed, interleave

pytest.importorskip("peft", reason="peft is not installed: the released script's way runs PEFT's layers")
pytest.importorskip("pandas", reason="pandas is not installed: the released script's way walks a data frame")

from peft import LoraConfig, get_peft_model

import lorapar
from bench.baselines import released_script
from lorapar.config import ModelConfig
from lorapar.data import encode
from lorapar.models import load_model, load_tokenizer

ROWS = 16
BATCH = 8
THETA = 0.9
LORA = LoraConfig(
    r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)


def model_config(dtype: str) -> ModelConfig:
    name = os.environ.get("LORAPAR_BENCH_MODEL", "smollm2-135m")
    return ModelConfig(name=name, dtype=dtype, device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def examples() -> list[released_script.Example]:
    """(ids, labels) of GSM8K's first training rows in the model's chat template."""
    folder = os.environ.get("LORAPAR_GSM8K")
    if not folder:
        pytest.skip("LORAPAR_GSM8K is not set: it names a folder with GSM8K's train.jsonl")
    tokenizer = load_tokenizer(model_config("float32"))
    made = []
    with (Path(folder) / "train.jsonl").open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(ROWS)):
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["question"]}]
            completion = [{"role": "assistant", "content": row["answer"]}]
            ids, n_prompt = encode({"prompt": prompt, "completion": completion}, tokenizer)
            made.append((ids, [-100] * n_prompt + ids[n_prompt:]))
    return made


@pytest.fixture(scope="module")
def ours():
    return lorapar.attach(load_model(model_config("float32")), LORA, start="paper")


def rows_of(examples: list[released_script.Example]) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in examples]


def flat(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([scores[name].reshape(-1) for name in sorted(scores)])


def error(scores: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The difference's norm over the expected norm."""
    assert scores.keys() == expected.keys()
    return float((flat(scores) - flat(expected)).norm() / flat(expected).norm())


def jaccard(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of the two kept sets at θ."""
    k1, k2 = (lk.top_mass(flat(scores), THETA) for scores in (one, other))
    return float((k1 & k2).sum() / (k1 | k2).sum())


def test_scoring(benchmark, report, examples, ours):
    half = lorapar.attach(load_model(model_config("bfloat16")), LORA, start="paper")
    plain = get_peft_model(load_model(model_config("float32")), deepcopy(LORA)).eval()
    plain.load_state_dict(ours.state_dict())
    half_factors, factors = released_script.trainable(half), released_script.trainable(ours)
    assert all(torch.equal(half_factors[name], factor) for name, factor in factors.items())
    rows = rows_of(examples)
    ways = {
        "ours, bf16": lambda: lorapar.score(half, None, rows, batch_size=BATCH),
        "ours, fp32": lambda: lorapar.score(ours, None, rows, batch_size=BATCH),
        "released script's, fp32": lambda: released_script.score(plain, examples),
    }
    # Warm up on two rows; a whole pass of each would cost as much as a round.
    lorapar.score(half, None, rows[:2])
    lorapar.score(ours, None, rows[:2])
    released_script.score(plain, examples[:2])

    timed = interleave(benchmark, "scoring, bf16", ways, rounds=3)
    expected = timed.results["released script's, fp32"]
    # bf16 rounds every product to 8 bits: how near it comes is a result, not a requirement on equality.
    timed.facts = {
        "rows": len(examples),
        "tokens": sum(len(ids) for ids, _ in examples),
        "batch_size": BATCH,
        "error_fp32": error(timed.results["ours, fp32"], expected),
        "error_bf16": error(timed.results["ours, bf16"], expected),
        "jaccard_fp32": jaccard(timed.results["ours, fp32"], expected),
        "jaccard_bf16": jaccard(timed.results["ours, bf16"], expected),
    }
    assert timed.facts["error_fp32"] < 1e-4
    assert timed.facts["jaccard_fp32"] > 0.999
    assert timed.facts["error_bf16"] < 0.2
    timed.required = {"released script's, fp32": 2.2}
    same_precision = ("ours, fp32", "released script's, fp32")
    same = Timed(
        "scoring, fp32",
        "cpu",
        {way: timed.seconds[way] for way in same_precision},
        {},
        {way: timed.cpu_seconds[way] for way in same_precision},
        {"released script's, fp32": 1.15},
        timed.facts,
    )
    report(same, timed)


def test_selection(benchmark, report, examples, ours):
    scores = lorapar.score(ours, None, rows_of(examples[:2]), batch_size=2)
    names, tensors = list(scores), list(scores.values())
    ways = {
        "ours": lambda: lk.top_mass(tensors, THETA),
        "released script's": lambda: released_script.select(released_script.frame_of(scores), THETA),
    }
    lk.top_mass(tensors, THETA)
    timed = interleave(benchmark, "selection", ways, rounds=2)
    kept = {(name, i, j) for name, mask in zip(names, timed.results["ours"]) for i, j in mask.nonzero().tolist()}
    assert kept == timed.results["released script's"]
    timed.facts = {"elements": sum(tensor.numel() for tensor in tensors), "kept": len(kept)}
    timed.required = {"released script's": 50.0}
    report(timed)
