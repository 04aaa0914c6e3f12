"""Selecting against the released script's way: top-mass selection against its walk of a data frame.

    LORAPAR_GSM8K=<folder with train.jsonl> pytest bench/test_released_script.py

`LORAPAR_BENCH_MODEL` names another model than SmolLM2-135M, whose scores on two rows are selected from.
"""

import pytest

import lorapar_kernels as lk
from bench.interleaved import interleave
from bench.scoring import THETA, as_rows, gsm8k_rows, model_config

pytest.importorskip("peft", reason="peft is not installed: scoring needs it")
pytest.importorskip("pandas", reason="pandas is not installed: the released script's way walks a data frame")

from peft import LoraConfig

import lorapar
from bench.baselines import released_script
from lorapar.model.load import load_model

LORA = LoraConfig(
    r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)


def test_selection(benchmark, report):
    ours = lorapar.attach(load_model(model_config("float32")), LORA, start="paper")
    scores = lorapar.score(ours, None, as_rows(gsm8k_rows(2)), batch_size=2)
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
