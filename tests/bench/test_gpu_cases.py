"""What the GPU steps launch is what `variants` says, and the helpers that decide what is told."""

import importlib

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft", reason="peft is not installed: one of the ways")

import transformers  # noqa: F401 (imported before torch.autocast is replaced)

from bench.gpu import cases, record, sanitizer, sanitizer_case, timing
from bench.lora_layers import Layer, Made


@pytest.fixture(autouse=True)
def lines(monkeypatch):
    """A rehearsal whose lines are gathered instead of written."""
    said = []
    monkeypatch.setenv("LORAPAR_GPU_DEVICE", "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(record, "_line", said.append)
    monkeypatch.setattr(record, "_wrong", 0)
    return said


@pytest.mark.parametrize("step", cases.LAUNCHING)
def test_what_a_step_launches_is_among_the_variants(step):
    """On the CPU nothing is launched either, so results are garbage, and a way may be told as wrong; it was called."""
    module = importlib.import_module(f"bench.gpu.{step}")
    with cases.recorded() as launched:
        if step == "sanitizer_case":
            failed = {**sanitizer_case.run("plain"), **sanitizer_case.run("fused"), **sanitizer_case.run("scoring")}
            # That is forced onto Triton's kernel, which takes no CPU tensor here.
            assert list(failed) == ["dropout mask"]
        else:
            module.main()
    known = cases.variants([step])
    names = {variant.kernel.__name__ for variant in launched}
    assert {"shrink_kernel", "output_kernel", "input_kernel", "reduce_kernel", "product_kernel"} <= names
    for variant in launched:
        assert variant in known, f"{variant.kernel.__name__} {variant.name}"


def test_variants_of_the_gpu_s_sizes(monkeypatch):
    """They are found without memory or a GPU, and of rank 16 in bf16 the product goes by tile descriptors."""
    monkeypatch.setenv("LORAPAR_GPU_DEVICE", "cuda")
    found = cases.variants()
    kernels = {variant.kernel.__name__ for variant in found}
    assert {"product_kernel", "_example_products_kernel", "_dropout_mask_kernel"} <= kernels
    wide = [variant for variant in found if variant.constants.get("DESCRIBED")]
    assert {variant.constants["BN"] for variant in wide} == {128, 256}


def test_a_way_that_differs_is_told_and_not_timed(lines):
    made = Made(Layer(4, 8, 6, 2, 0.0, torch.float32, "cpu"))
    right = made.ours("plain")()
    off = (right[0] + 1.0, *right[1:])
    ways = {"ours plain": lambda: right, "PEFT's layer": lambda: off, "addmm_, no dropout": lambda: right}
    cases.compared("case", made, ways, {name: way() for name, way in ways.items()})
    assert list(ways) == ["ours plain", "addmm_, no dropout"]
    assert [line["case"] for line in lines] == ["case | PEFT's layer"]
    nan = (right[0] * float("nan"), *right[1:])
    cases.compared("case", made, dict(ways), {"ours plain": right, "addmm_, no dropout": nan})
    assert record.wrongs() == 2


def test_a_way_that_raises_costs_itself_alone(lines):
    def fails():
        raise RuntimeError("no such\nkernel")

    ways = {"ours fused": fails, "PEFT's layer": fails, "frozen nn.Linear": lambda: ()}
    assert list(cases.tried("case", ways)) == ["frozen nn.Linear"]
    assert list(ways) == ["frozen nn.Linear"]
    assert [(line["kind"], line["why"]) for line in lines] == [
        ("wrong", "RuntimeError: no such kernel"), ("skipped", "RuntimeError: no such kernel")]  # fmt: skip


def test_per_cent_over_the_frozen_layer(lines):
    medians = {"frozen": {"graph": 1.0, "events": 2.0, "host": 4.0}, "a": {"graph": 1.5, "events": 4.0, "host": 5.0},
               "b": {"events": 2.2}}  # fmt: skip
    cases.say_over("case", medians, "frozen", ("a",))
    told = {line["case"]: (round(line["value"], 6), line["timed_by"], "headline" in line) for line in lines}
    assert told == {"case | a over frozen": (50.0, "graph", True), "case | b over frozen": (10.0, "events", False),
                    "case | a over frozen [host]": (25.0, "host", False)}  # fmt: skip


def test_memory_that_holds_nan():
    with cases.poisoned():
        made = torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(4)
        assert all(tensor.isnan().all() for tensor in made)
        assert torch.empty(2, dtype=torch.int32).dtype == torch.int32
    with pytest.raises(AssertionError):
        torch.testing.assert_close(made[0], torch.zeros(3))


FOUND = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at shrink_kernel+0x190
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f0000000 is out of bounds
=========
========= Invalid __global__ read of size 2 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int, T2)+0x50
=========
plain: ran to its end
========= ERROR SUMMARY: 2 errors
"""
RACES = """\
========= Error: Race reported between Write access at void lorapar::mask_kernel(long const *)+0x20
=========     and Read access at void lorapar::mask_kernel(long const *)+0x30 [4 hazards]
=========
========= Warning: Race reported between Write access at lorapar::step_kernel<(bool)1>(Table)+0x1
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_what_the_sanitizer_says(lines):
    sanitizer.tell("memcheck", "plain", 9, FOUND)
    told = {line["case"]: line["kind"] for line in lines}
    assert told == {"shrink_kernel under memcheck": "wrong", "output_kernel under memcheck": "result",
                    "input_kernel under memcheck": "result", "reduce_kernel under memcheck": "result",
                    "plain under memcheck, in kernels not ours": "result"}  # fmt: skip
    assert "Access at 0x7f0000000 is out of bounds" in lines[0]["why"]
    lines.clear()
    sanitizer.tell("racecheck", "csrc", 9, RACES)
    assert [line["case"] for line in lines if line["kind"] == "wrong"] == ["mask_kernel under racecheck"]
    (warned,) = [line for line in lines if line.get("warnings")]
    assert warned["case"] == "step_kernel under racecheck"
    lines.clear()
    sanitizer.tell("racecheck", "fused", None, "")
    sanitizer.tell("racecheck", "fused", 1, "Device not supported\n")
    assert [line["why"] for line in lines] == ["it took too long", "exit status 1: Device not supported"]
    lines.clear()
    sanitizer.tell("memcheck", "fused", 9, "========= Something new\n")
    assert lines[-1]["kind"] == "wrong"


def test_times_of_a_rehearsal():
    calls = []
    found = timing.times({"a": lambda: calls.append(1)}, ("events", "host"))
    assert list(found["a"]) == ["events", "host"]
    assert len(calls) == 1
