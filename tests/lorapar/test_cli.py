"""The command line: verbs, help, overrides, exit status, and a terminal that only says what matters."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import lorapar
from lorapar.cli import STAGES, main, split_overrides
from lorapar.doctor import doctor, operations
from lorapar.errors import InputError

from .driver import lorapar as command
from .driver import refused, succeeds, tree

OPERATIONS = ["lora_linear", "lora_add", "lora_linear_scored", "lora_add_scored", "top_mass", "top_count",
              "tile_sums", "masked_adamw", "dropout_mask", "pack_mask", "unpack_mask"]  # fmt: skip


def in_process_of_its_own(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorapar", *map(str, words)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("verb", ["run", *STAGES])
def test_help_of_every_verb(verb: str):
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lorapar {verb} RECIPE.yaml")
    for said in ("--output_dir", "--update", "--section.key"):
        assert said in out


def test_help_names_every_verb_and_loads_no_heavy_library():
    code, out, _ = command("--help")
    assert code == 0
    for verb in ("run", *STAGES, "plan", "chat", "push", "doctor"):
        assert re.search(rf"^    {verb}\b", out, re.M), verb
    assert command("doctor", "--help")[0] == 0
    loaded = "import sys; from lorapar.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code = subprocess.run(
        [sys.executable, "-c", f"{loaded}sys.exit('torch' in sys.modules)"], stdout=subprocess.DEVNULL
    )
    assert code.returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "arguments are required: VERB"),
        (("rnu",), "invalid choice: 'rnu'"),
        (("run",), "arguments are required: RECIPE.yaml"),
        (("run", "gone.yaml"), "gone.yaml: no such recipe"),
        (("run", "."), "no such recipe; it is a folder"),
        (("run", "r.yaml", "s.yaml"), "unrecognized arguments: s.yaml"),
        (("run", "r.yaml", "--partition.theta"), "--partition.theta: needs a value"),
        (("run", "r.yaml", "--output_dir"), "--output_dir: expected one argument"),
        (("doctor", "now"), "unrecognized arguments: now"),
        (("doctor", "--theta", "1"), "--theta: doctor takes no arguments"),
        (("run", "-x"), "arguments are required"),
        (("chat",), "arguments are required: RECIPE.yaml"),
        (("chat", "gone.yaml"), "gone.yaml: no such recipe"),
        (("chat", "r.yaml", "--once"), "--once: expected one argument"),
        (("push", "r.yaml"), "arguments are required: OWNER/NAME"),
        (("push", "gone.yaml", "me/it"), "gone.yaml: no such recipe"),
        (("push", "r.yaml", "me/it", "--dry"), "--dry: needs a value"),
        (("evaluate", "r.yaml", "--tasks"), "--tasks: needs a value"),
        (("export", "r.yaml", "--gguf"), "--gguf: needs a value"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_status_2(words, says):
    refused(*words, says=(says,), alone=True)


def test_the_same_in_a_process_of_its_own(recipe_file: Path, tmp_path: Path):
    done = in_process_of_its_own("run", recipe_file, "--output_dir", tmp_path / "run", "--partition.theta=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lorapar: error: partition.theta: got 2.0, expected a share in (0, 1]\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_says_only_what_matters(recipe_file: Path, tmp_path: Path):
    done = in_process_of_its_own("run", recipe_file, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'report.html'}\n"
    lines = done.stderr.splitlines()
    assert all(line.startswith("lorapar: ") for line in lines), done.stderr
    for stage in set(STAGES) - {"renew"}:
        assert f"lorapar: {stage}: started" in lines
        assert any(line.startswith(f"lorapar: {stage}: done in ") for line in lines)
    for stage in ("sft", "grpo"):
        progress = [line for line in lines if re.match(rf"lorapar: {stage}: 4/4, .* step/s, 0 s left, .*loss ", line)]
        assert len(progress) == 1
    for step, total, unit in (("score", 8, "example"), ("evaluate base", 12, "row"), ("evaluate grpo", 12, "row")):
        said = re.compile(rf"lorapar: {step}: {total}/{total}, [\d.e+]+ {unit}/s, 0 s left$")
        assert sum(bool(said.match(line)) for line in lines) == (2 if step == "score" else 1), step
    log = (tmp_path / "run" / "run.log").read_text()
    assert all(line.removeprefix("lorapar: ") in log for line in lines)
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO sft: started$", log, re.M)


def test_what_libraries_warn_of_is_in_the_log_and_their_errors_are_on_the_terminal(tmp_path: Path, capsys):
    import logging
    import warnings

    from lorapar.logs import calm_libraries, logging_to

    transformers_log = logging.getLogger("transformers")
    before = list(transformers_log.handlers), transformers_log.propagate
    with calm_libraries(), logging_to(tmp_path / "run.log"):
        logging.getLogger("transformers.trainer").warning("a library's warning")
        logging.getLogger("transformers.trainer").error("a library's error")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
    assert (list(transformers_log.handlers), transformers_log.propagate) == before
    text = (tmp_path / "run.log").read_text()
    assert "WARNING a library's warning" in text
    assert "ERROR a library's error" in text
    err = capsys.readouterr().err
    assert "a library's error" in err
    assert "a library's warning" not in err


def test_a_failure_of_ours_is_not_hidden(recipe_file: Path, tmp_path: Path, monkeypatch):
    from lorapar.labeling import stage

    def fails(*_: object, **__: object):
        raise RuntimeError("a defect")

    monkeypatch.setattr(stage, "labelled_and_dropped", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["run", str(recipe_file), "--output_dir", str(tmp_path / "run")])
    assert "ERROR stopped: RuntimeError('a defect')" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("RECIPE", "--partition.theta", "0.5", "--seed", "7"),
        ("RECIPE", "--partition.theta=0.5", "--seed=7"),
        ("--partition.theta", "0.5", "--seed=7", "RECIPE"),
        ("--update", "--seed", "7", "RECIPE", "--partition.theta", "5e-1"),
    ],
)
def test_overrides_in_every_spelling_and_order(words, recipe_file: Path, tmp_path: Path):
    from lorapar import load_recipe

    words = [str(recipe_file) if word == "RECIPE" else word for word in words]
    succeeds("label", *words, f"--output_dir={tmp_path / 'run'}")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (recipe.partition.theta, recipe.seed) == (0.5, 7)
    assert recipe.output_dir == str(tmp_path / "run")


def test_an_overridden_value_may_look_like_an_option_or_hold_anything():
    words = ["run", "r.yaml", "--seed", "-1", "--data.prompt", "--x=y", "--lora.target_modules=[a, b]", "--update"]
    ours, overrides = split_overrides(words)
    assert ours == ["run", "r.yaml", "--update"]
    assert overrides == [("seed", "-1"), ("data.prompt", "--x=y"), ("lora.target_modules", "[a, b]")]


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["score", "r.yaml", "--until-stable"], "0.95"),
        (["score", "--until-stable", "r.yaml"], "0.95"),
        (["score", "r.yaml", "--until-stable", "0.9"], "0.9"),
        (["score", "--until-stable=0.9", "r.yaml"], "0.9"),
    ],
)
def test_until_stable_takes_a_level_or_none(words, level):
    assert split_overrides(words) == (["score", "r.yaml"], [("score.until_stable", level)])


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["evaluate", "r.yaml", "--tasks", "gsm8k,mmlu"], [("evaluate.tasks", '["gsm8k", "mmlu"]')]),
        (["evaluate", "--tasks=gsm8k, a b/t.yaml,", "r.yaml"], [("evaluate.tasks", '["gsm8k", "a b/t.yaml"]')]),
        (["export", "r.yaml", "--gguf", "adapter,q8_0"], [("export.gguf", '["adapter", "q8_0"]')]),
    ],
)
def test_lists_are_words_with_commas(words, overrides):
    assert split_overrides(words) == ([words[0], "r.yaml"], overrides)


@pytest.mark.parametrize(("verb", "word"), [("sft", "--tasks"), ("chat", "--tasks"), ("evaluate", "--gguf")])
def test_a_list_is_of_the_verbs_that_make_something_of_it(verb: str, word: str, recipe_file: Path, tmp_path: Path):
    """It was written into the run's recipe by any verb, unchecked."""
    says = f"{word}: {verb} takes no such option; "
    refused(verb, recipe_file, word, "a", "--output_dir", tmp_path / "run", says=(says, "run and"), alone=True)
    assert not (tmp_path / "run").exists()


def test_a_pipe_that_nobody_reads_any_more_is_no_traceback():
    words = [sys.executable, "-m", "lorapar", "doctor"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 1


def test_code_of_a_model_runs_only_where_the_word_says_so(recipe_file: Path):
    ours, overrides = split_overrides(["evaluate", "r.yaml", "--run-code"])
    assert (ours, overrides) == (["evaluate", "r.yaml", "--run-code"], [("evaluate.run_code", "true")])
    assert not lorapar.load_recipe(recipe_file).evaluate.run_code


def test_words_of_chat_and_push_are_no_keys_of_the_recipe():
    words = [
        "chat",
        "r.yaml",
        "--once",
        "--what is 2 + 3?",
        "--max_new_tokens=8",
        "--temperature",
        "0.5",
        "--seed",
        "7",
    ]
    ours, overrides = split_overrides(words)
    assert (ours, overrides) == (words[:7], [("seed", "7")])
    words = ["push", "r.yaml", "me/it", "--dry-run", "--private", "--with-answers"]
    assert split_overrides(words) == (words, [])


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("chat", ("--once", "--max_new_tokens", "--temperature", "--output_dir", "--section.key")),
        ("push", ("OWNER/NAME", "--dry-run", "--private", "--with-answers", "--output_dir")),
        ("evaluate", ("--tasks", "--run-code")),
        ("export", ("--gguf", "adapter, f16, q8_0")),
        ("run", ("--tasks", "--run-code", "--gguf")),
    ],
)
def test_help_says_the_words_of_its_own(verb: str, words: tuple[str, ...]):
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lorapar {verb} RECIPE.yaml")
    for said in words:
        assert said in out


@pytest.mark.parametrize("verb", [("chat", "RECIPE", "--once", "x"), ("push", "RECIPE", "me/it", "--dry-run")])
def test_a_run_that_is_read_must_be_there_and_of_this_recipe(verb, recipe_file: Path, finished: Path, tmp_path: Path):
    words = [recipe_file if word == "RECIPE" else word for word in verb]
    refused(*words, "--output_dir", tmp_path / "gone", says=("gone: not a run's output folder",), alone=True)
    assert not (tmp_path / "gone").exists()
    before = tree(finished)
    at = ("--output_dir", finished)
    says = ("made by another recipe (partition.theta", f"the run's own recipe is {finished / 'recipe.yaml'}")
    refused(*words, *at, "--partition.theta", "0.5", says=says, alone=True)
    refused(*words, *at, "--partition.tehta", "0.5", says=("partition.tehta: unknown key",), alone=True)
    assert tree(finished) == before


def test_a_runs_own_recipe_means_the_run_that_it_lies_in(finished: Path, tmp_path: Path):
    """It names the folder that it was made in; a moved run was looked for there, or another one found."""
    moved = finished.rename(tmp_path / "moved")
    log = succeeds("partition", moved / "recipe.yaml")
    assert "partition: done before, skipped" in log
    assert lorapar.load_recipe(moved / "recipe.yaml").output_dir == str(moved)
    elsewhere = tmp_path / "elsewhere"
    succeeds("label", moved / "recipe.yaml", "--output_dir", elsewhere)
    assert (elsewhere / "labels.jsonl").is_file()


def test_until_stable_with_an_empty_level_is_refused():
    """As `--until-stable=$LEVEL` is where LEVEL is not set; YAML would read it as no level, and score every row."""
    with pytest.raises(InputError, match="--until-stable=: needs a value, a Jaccard index"):
        split_overrides(["score", "r.yaml", "--until-stable="])


def test_until_stable_stops_scoring_and_says_after_how_many_examples(recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "run"
    options = (recipe_file, "--output_dir", folder, "--until-stable", "0.01", "--score.examples", "40")
    succeeds("label", *options)
    log = succeeds("score", *options)
    assert re.search(r"score: 32 examples, Jaccard 0\.\d{4} with half of them", log)
    record = json.loads((folder / "stages.json").read_text())["score"]
    for system in (1, 2):
        assert (record[f"examples_system{system}"], record[f"stable_system{system}"]) == (32, True)
        assert [n for n, _ in record[f"looks_system{system}"]] == [32]
    refused("score", recipe_file, "--until-stable", "2", says=("score.until_stable: got 2.0, expected a Jaccard",))
    code, out, _ = command("score", "--help")
    assert code == 0
    assert "--until-stable" in out


def test_a_folders_name_is_taken_as_it_is(recipe_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("label", recipe_file, "--output_dir", "123")
    succeeds("label", recipe_file, "--output_dir=a: b")
    assert (tmp_path / "123" / "labels.jsonl").is_file()
    assert (tmp_path / "a: b" / "labels.jsonl").is_file()


# Doctor


def test_doctor_says_versions_devices_and_what_runs():
    code, out, err = command("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^python +3\.", out, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.M)
    assert re.search(r"^(native cpu|native cuda) +\S", out, re.M)
    cpu, cuda = out.split("what runs on ")[1:]
    for operation in OPERATIONS:
        assert re.search(rf"^  {operation} +(reference|native|triton)", cpu, re.M), operation
        if torch.cuda.is_available():
            assert re.search(rf"^  {operation} +(reference|native|triton)", cuda, re.M), operation
    if not torch.cuda.is_available():
        assert "no device" in cuda
    assert "lora_linear, product plain  (fused: Triton's passes do not run here)" in cpu


def test_doctor_says_what_is_forced(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    said = operations(torch.device("cpu"))
    assert list(said) == OPERATIONS
    assert all(runs.startswith("reference") for runs in said.values())
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    assert operations(torch.device("cpu"))["pack_mask"].startswith("fails: LORAPAR_BACKEND=triton cannot serve")
    monkeypatch.setenv("LORAPAR_BACKEND", "tritno")
    assert "fails: LORAPAR_BACKEND must be one of" in doctor()
    monkeypatch.delenv("LORAPAR_BACKEND")
    monkeypatch.setenv("LORAPAR_PRODUCT", "fused")
    said = doctor().split("what runs on cuda")[0]
    assert re.search(r"^  lora_linear +fails: LORAPAR_PRODUCT=fused cannot serve lora_linear", said, re.M)
    assert re.search(r"^  lora_linear, product +fails: LORAPAR_PRODUCT=fused", said, re.M)


def test_the_version_is_the_projects():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert lorapar.__version__ == project["version"]
