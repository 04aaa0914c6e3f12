"""What the training steps of bench/gpu stand on: the plain loop, its workers, the search for a bound, the plan."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import plain_training
from bench.gpu import training_context, training_plan
from bench.plain_training import Asked, answer
from bench.workers import Worker

ROOT = Path(__file__).parents[2]
TINY = {"model": "tiny", "batch": 1, "dtype": "float32", "length": 40, "steps": 1}


def test_every_way_computes_the_same_loss_of_the_same_tokens():
    ours, peft = [], []
    found = [
        answer(ours, Asked(way="ours", **TINY)),
        answer(peft, Asked(way="peft", **TINY)),
        answer(ours, Asked(way="ours", whole_head=True, **TINY)),
    ]
    assert len(ours) == len(peft) == 1
    for one in found:
        assert len(one["seconds"]) == 1
        assert len(one["losses"]) == 2
        assert one["reserved_bytes"] > 0
    # Each has trained for a step or more by then, so they are near, not equal.
    first = [one["losses"][0] for one in found]
    assert first[1:] == pytest.approx(first[:1] * 2, rel=1e-3)


def test_the_head_in_pieces_is_the_models_own():
    loop = plain_training.Loop(Asked(way="ours", **TINY))
    ids = torch.randint(8, 500, (1, 40))
    expected = loop.model(input_ids=ids, labels=ids).loss
    assert loop.in_pieces(ids).item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(int(p.grad is not None) for p in loop.model.parameters()) == 0


def test_out_of_memory_is_an_answer_and_the_next_case_runs(monkeypatch):
    loops = []
    step = plain_training.Loop.step

    def limited(self, length, whole_head):
        if length > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, length, whole_head)

    monkeypatch.setattr(plain_training.Loop, "step", limited)
    assert answer(loops, Asked(**TINY | {"length": 400})) == {"out_of_memory": True}
    assert "seconds" in answer(loops, Asked(**TINY))
    assert answer(loops, Asked(**TINY | {"length": 400})) == {"out_of_memory": True}
    assert "seconds" in answer(loops, Asked(**TINY))


def test_another_error_is_no_answer(monkeypatch):
    def step(self, length, whole_head):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(plain_training.Loop, "step", step)
    with pytest.raises(RuntimeError, match="illegal"):
        answer([], Asked(**TINY))


def test_a_worker_answers_and_one_that_dies_or_hangs_is_told():
    with Worker("tests.bench.echo_worker") as worker:
        assert worker.ask({"a": 1}, 60) == {"a": 1}
        assert worker.ask({"a": 2}, float("inf")) == {"a": 2}
        assert worker.ask({"die": True}, 60) == {"failed": "it ran out of luck"}
        assert worker.ask({"a": 3}, 60) == {"failed": "its process had ended before"}
    with Worker("tests.bench.echo_worker") as worker:
        began = time.monotonic()
        assert worker.ask({"sleep": 600}, 1) == {"failed": "no answer within 1 s", "late": True}
        assert time.monotonic() - began < 30
    with Worker("tests.bench.no_such_module") as worker:
        assert "no_such_module" in worker.ask({}, 60)["failed"]


@pytest.mark.parametrize("bound", [8192, 9000, 20_000, 33_333, 150_000])
@pytest.mark.parametrize("wrong", [0.5, 0.9, 1.0, 1.03, 1.6])
def test_the_search_ends_between_what_fits_and_what_does_not(bound, wrong):
    low, high, asked = training_context.SHORT[-1], 0, []

    def fits(length):
        nonlocal low, high
        asked.append(length)
        assert length % training_context.STEP == 0
        low, high = (max(low, length), high) if length <= bound else (low, length)
        return length <= bound

    training_context.bracket(fits, int(bound * wrong), lambda: (low, high))
    training_context.halve(fits, lambda: (low, high))
    assert low <= bound < high
    assert high - low <= max(low // 16, training_context.STEP)
    assert len(asked) <= (3 if wrong == 1.0 else 14)


def test_the_line_meets_the_cap(monkeypatch):
    monkeypatch.delenv("LORAPAR_GPU_DEVICE", raising=False)
    peaks = {4096: 5 * 10**9, 8192: 6 * 10**9}
    assert training_context.where_it_meets(peaks) == 8192 + 18 * 4096


def test_a_shape_is_planned_without_weights(monkeypatch):
    monkeypatch.setenv("LORAPAR_GPU_DEVICE", "cpu")
    planned = training_plan.plan("a test", training_plan.case_of("bf16", "tiny", 64))
    assert planned is not None
    assert planned["weights"] == sum(
        p.nbytes for p in plain_training.load(Asked(**TINY | {"dtype": "bfloat16"})).parameters()
    )
    assert planned["activations"] > 0


def test_a_training_case_is_planned_where_trl_is_not_installed():
    """As on a bare GPU machine: the case's recipe gives every setting that the plan asks for."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['trl', 'datasets', 'bitsandbytes']))\n"
        "from bench.gpu import training_plan\n"
        "sys.exit(training_plan.plan('a test', training_plan.case_of('bf16', 'tiny', 64)) is None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"LORAPAR_GPU_DEVICE": "cpu"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
