"""Scoring against the released script's way and against libraries of per-example gradients, equal results first.

    LORAPAR_GSM8K=<folder with train.jsonl> pytest bench/test_scoring.py --benchmark-only

On a CPU: SmolLM2-135M and GSM8K's first rows; `LORAPAR_BENCH_ROWS` (64) and `LORAPAR_BENCH_ROUNDS` (3) make it
shorter, `LORAPAR_BENCH_FIRST` (0) begins further on, and `LORAPAR_BENCH_MODEL` names another model. All ways see the
same rows, tokens and factors: the paper's start N(0, 0.01²), rank 8, its six target modules. Each way's peak of memory
beyond what was there before it is recorded.

bench/test_scoring_7b.py is the case for a GPU.
"""

import os
from copy import deepcopy

import pytest
import torch

from bench.interleaved import interleave
from bench.scoring import as_rows, error, gsm8k_rows, jaccard, model_config, padded_batches, with_peaks

pytest.importorskip("peft", reason="peft is not installed: the other ways run PEFT's layers")
pytest.importorskip("pandas", reason="pandas is not installed: the released script's way walks a data frame")

from peft import LoraConfig, get_peft_model

import lorapar
from bench.baselines import backpack_way, opacus_way, released_script
from lorapar.model.load import load_model

ROWS = int(os.environ.get("LORAPAR_BENCH_ROWS", 64))
FIRST = int(os.environ.get("LORAPAR_BENCH_FIRST", 0))
ROUNDS = int(os.environ.get("LORAPAR_BENCH_ROUNDS", 3))
BATCH = 8
LORA = LoraConfig(
    r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)


@pytest.fixture(scope="module")
def examples():
    return gsm8k_rows(ROWS, FIRST)


@pytest.fixture(scope="module")
def ours():
    return lorapar.attach(load_model(model_config("float32")), LORA, start="paper")


def plain(ours):
    """PEFT's own model with our factors."""
    model = get_peft_model(load_model(model_config("float32")), deepcopy(LORA)).eval()
    model.load_state_dict(ours.state_dict())
    return model


def facts_of(examples, peaks):
    tokens = sum(len(ids) for ids, _ in examples)
    return {"rows": len(examples), "first_row": FIRST, "tokens": tokens, "batch_size": BATCH, "peak_extra_bytes": peaks}


def test_scoring_fp32(benchmark, report, examples, ours):
    script = plain(ours)
    peaks: dict[str, int] = {}
    ways = {
        "ours, fp32": lambda: lorapar.score(ours, None, as_rows(examples), batch_size=BATCH),
        "released script's, fp32": lambda: released_script.score(script, examples),
    }
    # Warm up on two rows; a whole pass of each would cost as much as a round.
    lorapar.score(ours, None, as_rows(examples[:2]))
    released_script.score(script, examples[:2])
    timed = interleave(benchmark, "scoring, fp32", with_peaks(ways, peaks), rounds=ROUNDS)
    expected = timed.results["released script's, fp32"]
    timed.facts = facts_of(examples, peaks) | {
        "error": error(timed.results["ours, fp32"], expected),
        "jaccard": jaccard(timed.results["ours, fp32"], expected),
        "elements": sum(tensor.numel() for tensor in expected.values()),
    }
    assert timed.facts["error"] < 1e-4
    assert timed.facts["jaccard"] > 0.999
    timed.required = {"released script's, fp32": 1.15}
    report(timed)


def test_scoring_bf16(benchmark, report, examples, ours):
    half = lorapar.attach(load_model(model_config("bfloat16")), LORA, start="paper")
    script = plain(ours)
    half_factors, factors = released_script.trainable(half), released_script.trainable(ours)
    assert all(torch.equal(half_factors[name], factor) for name, factor in factors.items())
    peaks: dict[str, int] = {}
    ways = {
        "ours, bf16": lambda: lorapar.score(half, None, as_rows(examples), batch_size=BATCH),
        "released script's, fp32": lambda: released_script.score(script, examples),
    }
    lorapar.score(half, None, as_rows(examples[:2]))
    released_script.score(script, examples[:2])
    timed = interleave(benchmark, "scoring, bf16", with_peaks(ways, peaks), rounds=ROUNDS)
    expected = timed.results["released script's, fp32"]
    has = torch.cpu.get_capabilities()
    fast = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    # bf16 rounds every product to 8 bits: how near it comes is a result, not a requirement on equality.
    timed.facts = facts_of(examples, peaks) | {
        "error": error(timed.results["ours, bf16"], expected),
        "jaccard": jaccard(timed.results["ours, bf16"], expected),
        "bf16_instructions": fast,
    }
    assert timed.facts["error"] < 0.2
    # A CPU without bf16 instructions emulates them: the figure is recorded there and requires nothing.
    timed.required = {"released script's, fp32": 2.2} if fast else {}
    report(timed)


def test_scoring_per_example_libraries(benchmark, report, examples, ours):
    pytest.importorskip("opacus", reason="opacus is not installed")
    pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")
    batches = padded_batches(examples, BATCH)
    of_opacus, of_backpack = plain(ours), backpack_way.extended(plain(ours))
    peaks: dict[str, int] = {}
    ways = {
        "ours, fp32": lambda: lorapar.score(ours, None, as_rows(examples), batch_size=BATCH),
        "Opacus's, fp32": lambda: opacus_way.score(of_opacus, batches),
        "BackPACK's, fp32": lambda: backpack_way.score(of_backpack, batches),
    }
    lorapar.score(ours, None, as_rows(examples[:2]))
    opacus_way.score(of_opacus, batches[-1:])
    backpack_way.score(of_backpack, batches[-1:])
    timed = interleave(benchmark, "scoring, libraries", with_peaks(ways, peaks), rounds=ROUNDS)
    timed.facts = facts_of(examples, peaks)
    for way in list(ways)[1:]:
        timed.facts[f"error of {way}"] = error(timed.results[way], timed.results["ours, fp32"])
        assert timed.facts[f"error of {way}"] < 1e-4
    report(timed)
