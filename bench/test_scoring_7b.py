"""Scoring on a Llama-2-7B shape (scoring_7b.py): ours, the released script's way, our forward and dX alone.

On the CPU a small shape stands in, to try the case without a GPU.
"""

import os

import pytest

from bench.interleaved import interleave
from bench.scoring import error, with_peaks

pytest.importorskip("transformers", reason="transformers is not installed: the model is its Llama")
pytest.importorskip("peft", reason="peft is not installed: the other way runs PEFT's layers")

from bench.scoring_7b import BARE, BATCH, DTYPES, NEAR, OURS, SCRIPT, TOKENS, made

ROWS = int(os.environ.get("LORAPAR_BENCH_ROWS", 32))


def test_scoring_7b(benchmark, report, device):
    scored = made(device, ROWS)
    peaks: dict[str, int] = {}
    scored.warm_up()
    ways = with_peaks(scored.ways(), peaks, device)
    timed = interleave(benchmark, f"scoring, 7B shape [{device}]", ways, device, rounds=3)
    timed.facts = {
        "rows": ROWS,
        "tokens_a_row": TOKENS,
        "batch_size": BATCH,
        "dtype": str(DTYPES[device]),
        "peak_extra_bytes": peaks,
        "error": error(timed.results[OURS], timed.results[SCRIPT]),
        "cost over forward and dX alone": timed.median(OURS) / timed.median(BARE),
    }
    assert timed.facts["error"] < NEAR[device]
    if device == "cuda":
        timed.required = {SCRIPT: 5.0, BARE: 1 / 1.15}
    report(timed)
