"""Every step as on a GPU: what only runs there, with torch.cuda's parts replaced by ones that do nothing.

A rehearsal takes the other side of every `record.rehearsal()`. Here the sizes are a rehearsal's and the side is the
GPU's: events, graphs, streams and memory by stand-ins, Triton's launches recorded and not made.
"""

import contextlib
import functools
import importlib
import stat
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

pytest.importorskip("triton")
pytest.importorskip("peft", reason="peft is not installed: one of the ways")

import transformers  # noqa: F401 (imported before torch.autocast is replaced)

from bench.gpu import cases, correctness, decoder, native_ops, record, sanitizer, short, timing


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, ended):
        assert isinstance(ended, Event)
        return 2.0


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Profile:
    """Two launches of one kernel, of 3 µs each, and what the host did."""

    def __init__(self, activities):
        assert activities == [ProfilerActivity.CUDA]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        kernel = {"name": "shrink_kernel", "time_range": SimpleNamespace(elapsed_us=lambda: 3.0)}
        return [SimpleNamespace(device_type=DeviceType.CUDA, **kernel)] * 2 + [
            SimpleNamespace(device_type=DeviceType.CPU, name="cudaLaunchKernel")]  # fmt: skip


@pytest.fixture
def lines(monkeypatch):
    """Sizes of a rehearsal, everything else as on a GPU; gives the lines that are told."""
    said = []
    small = {"shapes": cases.SMALL_SHAPES, "tokens": cases.SMALL_TOKENS}
    for name, value in small.items():
        monkeypatch.setattr(cases, name, lambda value=value: value)
    monkeypatch.setattr(decoder, "sizes", lambda: decoder.SMALL)
    monkeypatch.setattr(decoder, "batches", lambda: decoder.SMALL_BATCHES)
    monkeypatch.setattr(short, "TOKENS", short.SMALL_TOKENS)
    monkeypatch.setattr(short, "STEPS", short.SMALL_STEPS)
    monkeypatch.setattr(native_ops, "AWKWARD", (0, 33))
    monkeypatch.setattr(native_ops, "SECONDS", 0.01)
    monkeypatch.setattr(native_ops, "LARGEST", 100)
    monkeypatch.setattr(cases, "POISONED", 1 << 20)
    monkeypatch.setenv("LORAPAR_GPU_DEVICE", "cpu")
    monkeypatch.setattr(record, "rehearsal", lambda: False)
    monkeypatch.setattr(record, "_line", said.append)
    monkeypatch.setattr(record, "_wrong", 0)
    # What was not computed differs from everything.
    monkeypatch.setattr(cases, "difference", lambda one, other: 0.0)
    monkeypatch.setattr(cases, "differing", lambda one, other: 0)
    monkeypatch.setattr(timing, "times", functools.partial(timing.times, rounds=2))
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    stand_ins = {
        "Event": Event, "Stream": Stream, "current_stream": Stream, "synchronize": lambda: None, "_sleep": int,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "graph": lambda graph: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(), "empty_cache": lambda: None, "device_count": lambda: 1,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 3, "max_memory_allocated": lambda: 10,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return said


@pytest.mark.parametrize("step", ["correctness", "layer", "short", "decoder", "probes", "native_ops"])
def test_step(lines, step):
    with cases.recorded() if step != "native_ops" else contextlib.nullcontext():
        importlib.import_module(f"bench.gpu.{step}").main()
    results = [line for line in lines if line["kind"] == "result"]
    skipped = {line["case"]: line["why"] for line in lines if line["kind"] == "skipped"}
    assert results
    assert not {case for case in skipped if "4-bit" not in case and "csrc" not in case}, skipped
    if step == "correctness":
        assert record.wrongs() > 20
    else:
        assert not record.wrongs(), [line for line in lines if line["kind"] == "wrong"]
    # What was not computed is wrong, but nothing raised.
    assert not [line for line in lines if line["kind"] == "wrong" and "Error" in line["why"]]
    if step in ("layer", "short", "decoder", "probes"):
        assert [line for line in results if "headline" in line]
        assert {line["value"] for line in results if line.get("timed_by") == "graph" and line["unit"] == "s"} <= {
            2e-3 / 5, 2e-3 / 5 / short.LAYERS}  # fmt: skip
    if step == "layer":
        assert any(line["case"].endswith("[peak memory]") and line["value"] == 7 for line in results)
        (traced,) = {(line["value"], line["launches"]) for line in results if line.get("kernel") == "shrink_kernel"}
        assert traced == (pytest.approx(6e-6), 2)


def test_a_second_device(lines, monkeypatch):
    """Its tensors are not moved here, where there is no such device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(correctness, "_to", lambda value, device: value)
    made = correctness.Problem
    monkeypatch.setattr(correctness, "Problem", lambda case, device: made(case, "cpu"))
    monkeypatch.setattr(cases, "products", lambda: ("plain",))
    correctness.elsewhere()
    assert [line["kind"] for line in lines] == ["result"]
    assert lines[0]["case"].startswith("on cuda:1 while cuda:0 is current")


def test_sanitizer(lines, monkeypatch, tmp_path):
    """With a stand-in for Python, and one for the tool that finds a fault in what it runs."""
    python, tool = tmp_path / "python", tmp_path / "compute-sanitizer"
    python.write_text("#!/bin/sh\necho $3: ran to its end\n")
    tool.write_text("#!/bin/sh\necho '========= Invalid __global__ write of size 4 bytes'\n"
                    "echo '=========     at product_kernel+0x190'\nexit 9\n")  # fmt: skip
    for file in (python, tool):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sanitizer, "tool_path", lambda: str(tool))
    sanitizer.main()
    wrong = [line["case"] for line in lines if line["kind"] == "wrong"]
    assert wrong == ["product_kernel under memcheck", "product_kernel under racecheck"]
    assert sum(line["case"].endswith("without a tool") for line in lines) == 4
    assert sum("not ours" in line["case"] for line in lines) == 6
    lines.clear()
    python.write_text("#!/bin/sh\necho 'failed: linear 3→4: RuntimeError: PassManager'\nexit 7\n")
    sanitizer.main()
    assert [line["why"] for line in lines[:4]] == ["linear 3→4: RuntimeError: PassManager"] * 4
    assert any("under racecheck" in line["case"] for line in lines)
    for status, kind in ((3, "skipped"), (1, "wrong")):
        lines.clear()
        python.write_text(f"#!/bin/sh\necho it is not there\nexit {status}\n")
        sanitizer.main()
        assert [line["kind"] for line in lines] == [kind] * 4


def test_a_kind_that_fails_costs_itself_alone(lines, monkeypatch):
    def raises(graph):
        raise RuntimeError("operation not permitted when\nstream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", raises)
    found = timing.times({"a": lambda: None, "b": lambda: None}, rounds=3)
    assert {name: list(of) for name, of in found.items()} == {"a": ["events", "host"], "b": ["events", "host"]}
    assert len(found["a"]["events"]) == 3
    assert [line["case"] for line in lines] == ["a [graph]", "b [graph]"]
    assert timing.over(timing.say("case", found), "a", "graph") == {}


def test_readings_end_before_the_step_is_ended(lines, monkeypatch):
    monkeypatch.setattr(record, "remaining", lambda: 1.0)
    found = timing.times({"a": lambda: None}, ("events",), rounds=7)
    assert len(found["a"]["events"]) == 1
    assert not cases.enough_time("case", 2.0)
    assert lines[-1] == {"kind": "skipped", "case": "case", "why": "no time was left"}
