"""Python's time for a decoder layer of Llama-2-7B's shape, measured without a GPU (host_time.py), launches charged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.host_time import OURS, PEFT, charged
from bench.interleaved import Timed

ROOT = Path(__file__).parents[1]


def test_host_time(benchmark, report):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "bench.host_time"]
    run = benchmark.pedantic(subprocess.run, ([*command],), {"cwd": ROOT, "stdout": subprocess.PIPE}, rounds=1)
    assert run.returncode == 0
    cases = []
    for case, ways in json.loads(run.stdout).items():
        seconds = {
            way: [charged(one, told["launches"], told["torch"]) for one in told["seconds"]]
            for way, told in ways.items()
        }
        timed = Timed(f"host time, {case}", "cpu", seconds, {}, seconds)
        timed.facts = {
            way: {"host_alone_s": min(told["seconds"]), "launches": told["launches"], "torch_launches": told["torch"],
                  "without_torch_launches_s": charged(min(told["seconds"]), told["launches"])}
            for way, told in ways.items()
        }  # fmt: skip
        # The frozen layer alone takes 0.46 of PEFT's decoder layer, so half is asked of what LoRA layers can change.
        timed.required = {PEFT: 2.0} if case == "projections" else {}
        assert timed.ours == OURS
        cases.append(timed)
    report(*cases)
