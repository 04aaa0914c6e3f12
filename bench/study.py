"""The quickstart's recipe under many arms and seeds, one JSON line a run.

    python -m bench.study                             every run that has no line yet, the most telling first
    python -m bench.study --budget 60 --processes 2   begin no run that would not end within 60 minutes; two at once
    python -m bench.study --arms 'scores; all' --seeds 8 --precision float32
    python -m bench.study --list                      what has a line, and what has not
    python -m bench.study --summary                   docs/evidence.md, its picture and README's table, from the lines

A run is `lorapar run examples/quickstart.yaml` with its arm's overrides, in a process of its own. What an arm has in
common with another (labels, scores, stage 1) is copied from that run's folder, and the pipeline finds what still holds.
A line goes to bench/results/study/<device>.jsonl once its run has ended: accuracy, every held-out answer as one bit,
commit, versions, device. The same command resumes a study that was killed: a run with a line is not run again, and one
that was stopped resumes from its last checkpoint. Paths in a recipe are read from the repository's root.
"""

import argparse
import datetime
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bench.conftest import commit, device_name, installed
from bench.workers import die_with_the_parent
from lorapar.errors import InputError
from lorapar.files import read_json, read_jsonl, sha256_json
from lorapar.model.load import best_dtype
from lorapar.pipeline.records import records
from lorapar.recipe.reading import load_recipe, read_recipe
from lorapar.recipe.values import plain

ROOT = Path(__file__).parents[1]
RECIPE = "examples/quickstart.yaml"
RESULTS = Path(__file__).with_name("results") / "study"
VERSIONS = "torch", "transformers", "peft", "trl", "reasoning-gym"
PRECISIONS = "bfloat16", "float32", "float16"
MODELS = "base", "sft", "grpo"
SYSTEMS = "system1", "system2"


@dataclass(frozen=True)
class Times:
    """So many times the recipe's own value."""

    factor: float


TWICE, HALF = {"grpo.learning_rate": Times(2)}, {"grpo.learning_rate": Times(0.5)}
# The paper's rule in every arm that does not say otherwise, whatever the recipe's defaults become.
PAPER = {"score.renew": False, "partition.system1_cost": 0.0, "grpo.watch_rows": 0}
ASIDE = {"grpo.watch_rows": 24}
# What each arm changes in the recipe; steps, rows, batches and learning rates are the recipe's unless it says so.
ARMS: dict[str, dict[str, Any]] = {
    "scores": {},
    "all": {"partition.selection": "all"},
    "random": {"partition.selection": "random"},
    # Stage 2 at twice the learning rate, where it costs System 1 something.
    "scores, twice the rate": TWICE,
    "all, twice the rate": {"partition.selection": "all", **TWICE},
    "random, twice the rate": {"partition.selection": "random", **TWICE},
    # What people do today: every element, every row, in both stages.
    "all, all rows": {"partition.selection": "all", "sft.systems": [1, 2], "grpo.systems": [1, 2]},
    # Whether a gentler stage 2 does for plain LoRA what training fewer elements does.
    "all, half the rate": {"partition.selection": "all", **HALF},
    "renewed, twice the rate": {"score.renew": True, **TWICE},
    "cost 1, twice the rate": {"partition.system1_cost": 1.0, **TWICE},
    # The control of "watched": the same rows put aside, and the last step kept whatever their loss.
    "rows aside, twice the rate": {**ASIDE, "grpo.watch_rise": 100.0, **TWICE},
    "watched, twice the rate": {**ASIDE, **TWICE},
    "renewed": {"score.renew": True},
    "cost 0.5": {"partition.system1_cost": 0.5},
    "cost 1": {"partition.system1_cost": 1.0},
    "rows aside": {**ASIDE, "grpo.watch_rise": 100.0},
    "watched": ASIDE,
    "grpo first": {"stages": ["grpo", "sft"]},
    "rank": {"partition.granularity": "rank"},
    "tile": {"partition.granularity": "tile"},
    "theta 0.5": {"partition.theta": 0.5},
    "theta 0.7": {"partition.theta": 0.7},
    "theta 0.95": {"partition.theta": 0.95},
    "alpha 0": {"partition.alpha": 0.0},
    "beta 0": {"partition.beta": 0.0},
    "alpha 0, beta 0": {"partition.alpha": 0.0, "partition.beta": 0.0},
    "first order": {"score.method": "first_order"},
    "start paper": {"start": "paper"},
    "start pissa": {"start": "pissa"},
    "start olora": {"start": "olora"},
    # B = 0 cannot be scored.
    "start peft, all": {"start": "peft", "partition.selection": "all"},
    "labels at random": {"label.voters": [{"name": "random", "system1": 0.5}]},
}
MAIN = ("scores", "all", "random", "scores, twice the rate", "all, twice the rate", "random, twice the rate",
        "all, all rows")  # fmt: skip
# Arms whose folders are kept, since others begin with what those before GRPO have written there.
PARENTS = ("scores", "all", "random", "rows aside")
# How the folders begin in which copies are made.
COPYING = "copying-"
# Copied from one run's folder to another's: what the stages before GRPO have written, and their records.
SHARED = ("recipe.yaml", "stages.json", "labels.jsonl", "start", "scores.safetensors", "partition.safetensors", "sft")


@dataclass(frozen=True)
class Planned:
    """One run: an arm, a seed, and the precision of the base's weights."""

    arm: str
    seed: int
    precision: str

    @property
    def name(self) -> str:
        words = re.sub(r"[^a-z0-9.]+", "-", self.arm.lower()).strip("-")
        return f"{words}-{self.seed}-{self.precision}"

    def command(self, recipe: Path, folder: Path) -> list[str]:
        values = {"seed": self.seed, "model.dtype": self.precision, **PAPER, **overrides(self.arm, recipe)}
        words = [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]
        return ["run", str(recipe), "--output_dir", str(folder), "--update", *words]


def overrides(arm: str, recipe: Path) -> dict[str, Any]:
    """What the arm changes in this recipe."""
    values = dict(ARMS[arm])
    for key, value in values.items():
        if isinstance(value, Times):
            section, name = key.split(".")
            values[key] = value.factor * getattr(load_recipe(recipe), section).setting(name)
    return values


def runs_of(lines: Sequence[dict[str, Any]], recipe: Path) -> set[Planned]:
    """The runs of this recipe that have a line."""
    digest = recipe_digest(recipe)
    runs = (planned(line, recipe) for line in lines if line["recipe"] == digest)
    return {run for run in runs if run is not None}


def planned(line: dict[str, Any], recipe: Path = ROOT / RECIPE) -> Planned | None:
    """The run of the recipe that a line is of; None where its arm means another thing today."""
    same = line["arm"] in ARMS and overrides(line["arm"], recipe) == line["overrides"]
    return Planned(line["arm"], line["seed"], line["precision"]) if same else None


def plan(arms: Sequence[str], seeds: int | None, precisions: Sequence[str]) -> list[Planned]:
    """The runs in the order in which they tell most: the main arms at five seeds, then each other arm at three.

    seeds: as many of every arm, instead. precisions: the device's own first; the other is for the main arms alone.
    """
    own, *others = precisions
    main, rest = [arm for arm in arms if arm in MAIN], [arm for arm in arms if arm not in MAIN]
    runs = [Planned(arm, seed, own) for seed in range(seeds or 5) for arm in main]
    runs += [Planned(arm, seed, own) for arm in rest for seed in range(seeds or 3)]
    return runs + [Planned(arm, seed, other) for other in others for seed in range(seeds or 5) for arm in main]


def main(words: Sequence[str] | None = None) -> int:
    options = parsed(words)
    if options.summary:
        from bench.evidence import summarise

        try:
            return summarise(sorted(RESULTS.glob("*.jsonl")))
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    output = options.output or RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")
    runs = plan(options.arms, options.seeds, options.precision)
    try:
        digest = recipe_digest(options.recipe)
        # Two recipes' runs have the same names.
        options.folder = options.folder or ROOT / "runs" / "study" / digest[:12]
        if options.list:
            done = runs_of(read_lines(output) if output.is_file() else [], options.recipe)
            for run in runs:
                print("done    " if run in done else "not yet ", run.name)
            return 0
        for folder in (options.folder, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with open(options.folder / "lock", "a") as lock, open(output, "a+b") as file:
            try:
                for held in (lock, file):
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{held.name}: another study is using it; give another --output and --folder", file=sys.stderr)
                return 2
            try:
                cut_to_whole_lines(file)
                lines = [line for line in read_lines(output) if line["recipe"] == digest]
                done = runs_of(lines, options.recipe)
                todo = [run for run in runs if run not in done]
                print(f"{output}: {len(runs) - len(todo)} of {len(runs)} runs have a line", flush=True)
                return work(todo, options, device, file, [line["seconds"] for line in lines])
            except KeyboardInterrupt:
                print("stopped; the same command resumes it", file=sys.stderr)
                return 130
            finally:
                if not file.tell():
                    output.unlink()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    own = str(best_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")
    precisions = list(dict.fromkeys((own, "float32")))
    parser = argparse.ArgumentParser(
        "python -m bench.study", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no run that would not end within them")
    parser.add_argument(
        "--processes", type=at_least_one, default=1, help="runs at once; on a CPU each with its share of cores"
    )
    parser.add_argument("--arms", type=listed_arms, default=list(ARMS), metavar="ARM;ARM", help="by default every one")
    parser.add_argument(
        "--seeds",
        type=at_least_one,
        metavar="N",
        help="of every arm; by default 5 of the main ones and 3 of the others",
    )
    parser.add_argument("--precision", type=listed_precisions, default=precisions, metavar="DTYPE,DTYPE",
                        help="of the base; by default the device's own, then float32")  # fmt: skip
    parser.add_argument("--recipe", type=existing_file, help=f"by default {RECIPE}")
    parser.add_argument("--output", type=Path, help="the file of lines; by default bench/results/study/<device>.jsonl")
    parser.add_argument("--folder", type=lambda text: Path(text).absolute(),
                        help="where the runs lie; by default runs/study/ and the first digits of the recipe's digest"
                        )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what is done and what is not")
    parser.add_argument("--summary", action="store_true", help="write docs/evidence.md from bench/results/study/")
    options = parser.parse_args(words)
    if options.summary and (options.recipe or options.output):
        parser.error(f"--summary is of the lines in bench/results/study/ of {RECIPE}: leave out --recipe and --output")
    options.recipe = options.recipe or ROOT / RECIPE
    return options


def at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return number


def listed_arms(text: str) -> list[str]:
    """Arms by name, with semicolons between them, since a name may hold a comma."""
    arms = list(dict.fromkeys(arm.strip() for arm in text.split(";")))
    for arm in arms:
        if arm not in ARMS:
            raise argparse.ArgumentTypeError(f"no arm {arm!r}; allowed: {'; '.join(ARMS)}")
    return arms


def listed_precisions(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PRECISIONS:
            raise argparse.ArgumentTypeError(f"no precision {name!r}; allowed: {', '.join(PRECISIONS)}")
    return names


def existing_file(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of the file; half a line at its end, which a kill has left or a study is writing, is none."""
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def cut_to_whole_lines(file: BinaryIO) -> None:
    """Cut off half a line at the file's end, and stand there."""
    file.seek(0)
    text = file.read()
    file.seek(text.rfind(b"\n") + 1)
    file.truncate()


def work(todo: list[Planned], options: argparse.Namespace, device: str, file: BinaryIO, seconds: list[float]) -> int:
    """Run them, `processes` at once, and append each one's line.

    seconds: of the runs that have a line, the longest of which is what a run is taken to need; while there is none, any
    budget has time for one. Returns 1 if any failed, 2 if the recipe cannot be labelled, else 0.
    """
    began, failed = time.monotonic(), 0
    for left in options.folder.glob(f"{COPYING}*"):
        shutil.rmtree(left)
    threads = max(torch.get_num_threads() // options.processes, 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    facts = {"commit": commit(), "device": device, "threads": threads,
             "versions": {name: installed(name) for name in VERSIONS},
             "recipe": recipe_digest(options.recipe)}  # fmt: skip
    if why := labels(options.recipe, options.folder, environment):
        print(f"{options.recipe} cannot be labelled: {why}", file=sys.stderr)
        return 2
    going: dict[Planned, tuple[subprocess.Popen, float]] = {}
    waiting = list(todo)
    while True:
        while len(going) < options.processes:
            left = float("inf") if options.budget is None else 60 * options.budget - (time.monotonic() - began)
            if not waiting or left <= max(seconds, default=0):
                break
            run = waiting.pop(0)
            going[run] = started(run, options.recipe, options.folder, environment), time.monotonic()
            print(f"{run.name}: started", flush=True)
        if not going:
            if waiting:
                longest = max(seconds, default=0) / 60
                print(f"{len(waiting)} runs are left; none would end in time: the longest took {longest:.1f} minutes")
            return int(failed > 0)
        time.sleep(0.5)
        for run, (process, since) in list(going.items()):
            if process.poll() is None:
                continue
            del going[run]
            folder = options.folder / run.name
            if process.returncode:
                last = [line for line in log_of(folder).read_text().splitlines() if line.strip()][-1:]
                print(f"{run.name}: exit status {process.returncode}: {' '.join(last)}", flush=True)
                failed += 1
                continue
            seconds.append(time.monotonic() - since)
            line = told(run, options.recipe, folder, options.folder / "labels", facts)
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            accuracy = {name: {s: round(100 * a[s], 1) for s in SYSTEMS} for name, a in line["accuracy"].items()}
            print(f"{run.name}: {seconds[-1]:.0f} s, {accuracy}", flush=True)
            if run.arm not in PARENTS:
                shutil.rmtree(folder)


def labels(recipe: Path, folder: Path, environment: dict[str, str]) -> str | None:
    """The rows and their true labels, which every run shares: they depend on neither arm nor seed.

    Returns why there are none, else None.
    """
    words = ["label", str(recipe), "--output_dir", str(folder / "labels"), "--update"]
    done = subprocess.run(
        [sys.executable, "-m", "lorapar", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return (done.stderr.strip().splitlines() or ["no output"])[-1] if done.returncode else None


def started(run: Planned, recipe: Path, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    place = (folder / run.name).absolute()
    if not place.exists():
        shared = folder / Planned(parent_of(run.arm), run.seed, run.precision).name
        copy_shared(shared if "seconds" in records(shared).get("sft", {}) else folder / "labels", place)
    with log_of(place).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lorapar", *run.command(recipe, place)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            preexec_fn=die_with_the_parent,
        )  # fmt: skip


def log_of(folder: Path) -> Path:
    """What the run said, beside its folder."""
    return folder.parent / f"{folder.name}.log"


def parent_of(arm: str) -> str:
    """The arm that is the same until GRPO begins; else "scores", with which every arm has labels in common."""

    def before(name: str) -> dict[str, Any]:
        # Rows to be watched are put aside before anything is scored.
        return {k: v for k, v in ARMS[name].items() if not k.startswith("grpo.") or k == "grpo.watch_rows"}

    return next((parent for parent in PARENTS if before(parent) == before(arm)), "scores")


def copy_shared(origin: Path, place: Path) -> None:
    """What the stages before GRPO have written; a folder is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=COPYING) as temporary:
        copy = Path(temporary) / "copy"
        copy.mkdir()
        for name in SHARED:
            if (origin / name).is_dir():
                shutil.copytree(origin / name, copy / name, ignore=shutil.ignore_patterns("checkpoint-*"))
            elif (origin / name).exists():
                shutil.copy2(origin / name, copy / name)
        os.replace(copy, place)


def told(run: Planned, recipe: Path, folder: Path, labelled: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The run's line: what it was, what it came to, and every held-out answer as one bit, in the rows' order.

    Systems are those of the rule's labels, whatever the arm was trained with.
    """
    metrics, answers, made = read_json(folder / "metrics.json"), read_jsonl(folder / "answers.jsonl"), records(folder)
    right = {(answer["model"], str(answer["id"])): answer["correct"] for answer in answers}
    models = [model for model in MODELS if any(answer["model"] == model for answer in answers)]
    # `evaluate.limit` may have left rows out.
    truth = {str(row["id"]): f"system{row['system']}" for row in held_out(labelled)}
    truth = {row: of for row, of in truth.items() if (models[0], row) in right}
    bits = {
        model: {s: "".join(str(int(right[model, row])) for row, of in truth.items() if of == s) for s in SYSTEMS}
        for model in models
    }
    return {
        "arm": run.arm, "seed": run.seed, "precision": run.precision, "overrides": overrides(run.arm, recipe),
        "accuracy": {model: {s: b.count("1") / len(b) for s, b in by.items()} for model, by in bits.items()},
        "answers": bits, "rows": sha256_json(list(truth)),
        "partition": metrics["partition"],
        "jaccard_renewed": made.get("renew", {}).get("jaccard_renewed"), "watched": made.get("grpo", {}).get("watched"),
        "seconds": round(sum(metrics["seconds"].values()), 1), "stage_seconds": metrics["seconds"],
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **facts,
    }  # fmt: skip


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(folder / "labels.jsonl") if row["split"] == "held_out"]


def recipe_digest(recipe: Path = ROOT / RECIPE) -> str:
    """Of what the recipe and those that it extends say, so that another recipe's lines are not taken for its own."""
    said = plain(read_recipe(recipe))
    return sha256_json({key: value for key, value in said.items() if key != "output_dir"})


if __name__ == "__main__":
    sys.exit(main())
