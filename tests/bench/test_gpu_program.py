"""bench/gpu.sh rehearsed on a CPU: a step that crashes, hangs, raises or lacks a package costs itself alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import collect, driver, record, table
from bench.gpu.programs import PROGRAMS, Step, steps

ROOT = Path(__file__).parents[2]
# What none of this may take from whoever runs the tests.
QUIET = ("WHEELS", "PYTHON", "TRITON_INTERPRET", "LORAPAR_BACKEND", "LORAPAR_PRODUCT", "LORAPAR_GPU_INJECT")


def command(out: Path, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if name not in QUIET}
    variables = kept | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], variables


def gpu(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line, variables = command(out, *arguments, **environment)
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=600)


def lines_of(out: Path, kind: str) -> list[dict]:
    return [line for line in collect.read(out / "results.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("program", PROGRAMS)
def test_list_prints_the_steps_in_their_order_and_starts_nothing(tmp_path, program):
    done = gpu(tmp_path / "out", "--program", program, "--list")
    assert done.returncode == 0
    assert done.stdout.split() == [step.name for step in steps(program)]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_step_is_a_file_with_a_main(program):
    for step in steps(program):
        text = (ROOT / "bench" / "gpu" / f"{step.name}.py").read_text()
        assert "\ndef main() -> None:" in text, step.name
        assert step.least <= step.limit


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--cpu", "--only", "layers"], {}, "--only takes steps of kernels"),
        (["--cpu", "--budget", "5"], {}, "--budget must be more than"),
        (["--cpu"], {"LORAPAR_GPU_INJECT": "crash:layers"}, "LORAPAR_GPU_INJECT takes crash|hang|raise:STEP"),
        (["--cpu"], {"LORAPAR_GPU_INJECT": "explode:layer"}, "LORAPAR_GPU_INJECT takes crash|hang|raise:STEP"),
        (["--program", "all"], {}, "--program"),
    ],
)
def test_what_cannot_be_run_is_said_and_exits_2(tmp_path, arguments, environment, said):
    done = gpu(tmp_path, *arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_without_a_gpu_it_exits_2_and_names_the_rehearsal(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = gpu(tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "--cpu rehearses the program without one" in done.stderr


# The steps of a run, and which of them are struck how. Of each program some step that is not struck stands after them.
STRUCK = {
    "kernels": ("ceilings,build,probes,adamw,selection", {"ceilings": "crash", "probes": "hang", "adamw": "raise"}),
    "training": (
        "training_step,training_context,training_plan",
        {"training_step": "crash", "training_context": "raise"},
    ),
    "method": ("method_quickstart,method_study", {"method_quickstart": "hang"}),
}
ENDED = {"crash": "crashed", "hang": "timeout", "raise": "failed"}


@pytest.mark.slow
@pytest.mark.parametrize("program", STRUCK)
def test_a_fault_costs_its_own_step_alone(tmp_path, program):
    only, faults = STRUCK[program]
    out, asked = tmp_path / "out", ",".join(f"{fault}:{step}" for step, fault in faults.items())
    done = gpu(out, "--cpu", "--program", program, "--only", only, "--limit", "60", LORAPAR_GPU_INJECT=asked)
    ended = {line["step"]: line for line in lines_of(out, "step")}
    expected = dict.fromkeys(only.split(","), "ok") | {step: ENDED[fault] for step, fault in faults.items()}
    assert {step: line["status"] for step, line in ended.items()} == expected, done.stdout + done.stderr
    for step, fault in faults.items():
        assert fault != "crash" or ended[step]["why"] == "SIGSEGV"
        assert fault != "raise" or ended[step]["why"] == f"RuntimeError: LORAPAR_GPU_INJECT asked {step} to raise"
    # Each one's line up to the fault is there, and all of the others'.
    told = [line for kind in ("result", "skipped") for line in lines_of(out, kind)]
    assert {line["step"] for line in told} == set(only.split(","))
    # The exit status names the first that failed by its place in the list.
    names = [step.name for step in steps(program)]
    first = min(faults, key=names.index)
    assert done.returncode == driver.FIRST + 1 + names.index(first)
    assert all(step in done.stdout.splitlines()[-1] for step in faults)
    assert len(list(out.iterdir())) <= 8
    assert (out / f"{first}.log").exists()
    assert len((out / "table.txt").read_text().splitlines()) <= 60
    for line in lines_of(out, "result"):
        assert line["program"] == program
        assert line["versions"]["torch"]
        assert {"gpu", "driver", "commit", "time", "unit", "value", "p20", "p50", "p80"} <= line.keys()


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_whole_program_is_rehearsed(tmp_path, program):
    done = gpu(tmp_path, "--cpu", "--program", program, "--budget", "240")
    ended = {line["step"]: (line["status"], line["why"]) for line in lines_of(tmp_path, "step")}
    assert list(ended) != []
    assert {step for step, (status, _) in ended.items() if status != "ok"} == set(), done.stdout + str(ended)
    assert set(ended) == {step.name for step in steps(program)}
    assert done.returncode == 0
    assert not lines_of(tmp_path, "wrong")


def test_a_missing_package_costs_its_step_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(PROGRAMS, "kernels", ((Step("ceilings", 60, needs=("no_such_package",)), Step("adamw", 60)),))
    request = driver.Request("kernels", tmp_path, time.time() + 100, "cpu", 60)
    assert driver.run(request, {"program": "kernels"}) == {"ceilings": "missing", "adamw": "ok"}
    (line,) = [line for line in lines_of(tmp_path, "step") if line["step"] == "ceilings"]
    assert line["why"] == "not installed: no_such_package"


def test_a_step_for_which_too_little_time_is_left_is_left_out_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setitem(PROGRAMS, "kernels", ((Step("ceilings", 60, least=50),),))
    request = driver.Request("kernels", tmp_path, time.time() + 20, "cpu", 60)
    assert driver.run(request, {}) == {"ceilings": "skipped"}
    (line,) = lines_of(tmp_path, "step")
    assert "of the budget were left, it needs 50" in line["why"]


def test_an_interrupted_program_ends_its_steps_and_prints_what_there_is(tmp_path):
    line, variables = command(tmp_path, "--cpu", "--only", "ceilings", LORAPAR_GPU_INJECT="hang:ceilings")
    process = subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, text=True)
    until = time.time() + 60
    while time.time() < until and not (tmp_path / "results.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "copy, bytes read and written" in said
    (ended,) = lines_of(tmp_path, "step")
    assert ended["status"] == "interrupted"


def test_a_step_takes_what_it_started_down_with_it(tmp_path):
    """A grandchild that ignores TERM holds the GPU as much as the step did."""
    program = "trap '' TERM; (trap '' TERM; echo $$ >grandchild; exec sleep 300) & wait"
    process = subprocess.Popen(["bash", "-c", program], cwd=tmp_path, process_group=0)
    while not (tmp_path / "grandchild").exists():
        time.sleep(0.02)
    driver._end(process)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_commit_comes_from_a_file_where_git_has_not_travelled(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert driver.commit(tmp_path) == "unknown"
    (tmp_path / ".commit").write_text("0123abc+\n")
    assert driver.commit(tmp_path) == "0123abc+"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0 and not (ROOT / ".commit").exists():
        assert driver.commit(ROOT).rstrip("+") == head.stdout.strip()


def line_of(case: str, value: float, **more) -> dict:
    return {
        "step": "layer", "kind": "result", "case": case, "unit": "s", "value": value, "program": "kernels",
        "gpu": "NVIDIA H200", "commit": "a" * 40, "time": "2026-11-26T00:00:00Z", **more,
    }  # fmt: skip


def test_the_table_has_headlines_first_and_at_most_60_lines():
    lines = [line_of(f"case {i}", 1e-3 * i) for i in range(200)]
    lines += [line_of("the one", 0.00123, headline="what is wanted most")]
    lines += [{"step": "layer", "kind": "step", "status": "crashed", "seconds": 3.0, "why": "SIGSEGV"}]
    lines += [{"step": "layer", "kind": "wrong", "case": "dA", "why": "0.5 off"}]
    text = table.table(lines).splitlines()
    assert text[0] == "== headline"
    assert text[1].split(maxsplit=2) == ["1.23", "ms", "what is wanted most"]
    assert "crashed" in text[3]
    assert "1 WRONG" in text[3]
    assert any("dA: WRONG, 0.5 off" in line for line in text)
    assert text[-1].endswith("more in results.jsonl")
    assert len(text) < 60


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [(1.5, "s", "1.5 s"), (2e-5, "s", "20 µs"), (4.3e12, "B/s", "4.3 TB/s"), (5.0, "%", "5.0 %"),
     (1.234567, "x", "1.235 x"), (0.0, "s", "0 µs"), (None, "s", "not finite"), (-2e-3, "s", "-2 ms")],
)  # fmt: skip
def test_values_are_readable(value, unit, said):
    assert table.readable(value, unit) == said


def test_lines_of_several_processes_never_mix(tmp_path):
    program = (
        "import sys; from bench.gpu.record import append\n"
        "for i in range(100): append(sys.argv[1], {'who': sys.argv[2], 'i': i, 'text': 'x' * 3000})"
    )
    file = tmp_path / "lines"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(file), str(who)], cwd=ROOT) for who in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = [json.loads(text) for text in file.read_text().splitlines()]
    assert {(line["who"], line["i"]) for line in found} == {(str(who), i) for who in range(3) for i in range(100)}


def test_a_value_that_is_not_finite_is_json_all_the_same(tmp_path):
    record.append(str(tmp_path / "lines"), {"value": float("nan"), "p20": float("inf")})
    assert json.loads((tmp_path / "lines").read_text()) == {"value": None, "p20": None}


def test_a_line_does_not_say_where_the_checkout_lies(tmp_path):
    record.append(str(tmp_path / "lines"), {"why": f"g++ {ROOT}/csrc/cuda/bitmask.cu failed"})
    assert json.loads((tmp_path / "lines").read_text()) == {"why": "g++ csrc/cuda/bitmask.cu failed"}


def test_collect_keeps_results_by_gpu_and_fills_the_readme(tmp_path):
    out, results, readme = tmp_path / "out", tmp_path / "results", tmp_path / "README.md"
    out.mkdir()
    readme.write_text(f"before\n{collect.BEGIN}\nold\n{collect.END}\nafter\n")
    lines = [
        line_of("4096 | ours [graph]", 1e-3, p20=0.9e-3, p80=1.1e-3, timed_by="graph"),
        line_of("4096 | ours [host]", 2e-4, timed_by="host"),
        line_of("over", 5.0, unit="%", headline="layer over the frozen one"),
        {**line_of("", 0), "kind": "step", "status": "crashed", "seconds": 1.0, "why": "SIGSEGV"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "results.jsonl").write_text(text + '{"torn')
    options = [str(out), "--results", str(results), "--readme", str(readme)]
    assert collect.main(options) == 0
    kept = json.loads((results / "nvidia-h200.json").read_text())
    assert kept["programs"]["kernels"]["layer"]["over [%]"]["value"] == 5.0
    page = readme.read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "| layer over the frozen one | 5.0 % | aaaaaaaaa | 2026-11-26 |" in page
    assert "| 4096 · ours | 1 ms [900 µs, 1.1 ms] | 200 µs |" in page
    assert "crashed, SIGSEGV" in page
    # A later run of one case replaces that case and keeps the others.
    (out / "results.jsonl").write_text(json.dumps(line_of("over", 4.0, unit="%", headline="layer over it")) + "\n")
    assert collect.main(options) == 0
    kept = json.loads((results / "nvidia-h200.json").read_text())["programs"]["kernels"]["layer"]
    assert kept["over [%]"]["value"] == 4.0
    assert kept["4096 | ours [graph] [s]"]["value"] == 1e-3
    assert "crashed" not in readme.read_text()


def test_collect_refuses_a_rehearsal(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps(line_of("x", 1.0, gpu="rehearsal on a CPU")) + "\n")
    assert collect.main([str(tmp_path), "--results", str(tmp_path / "r"), "--readme", str(tmp_path / "none")]) == 2
    assert "whose figures are not kept" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_readme_s_figures_are_those_of_the_results_files():
    page = (ROOT / "bench" / "README.md").read_text()
    shown = page.partition(collect.BEGIN)[2].partition(collect.END)[0].strip()
    assert shown == collect.tables(ROOT / "bench" / "results")
