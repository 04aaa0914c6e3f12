"""docs/evidence.md, its picture, README's table and the report's yardstick, from the lines of bench/study.py.

Every arm has one bit for each seed and held-out row. A figure is a mean over both; its interval comes from 10,000
resamples of the seeds' means and of the rows' means (the percentile bootstrap of Efron 1979), whose deviations are
added: what belongs to a seed and a row together is in both, so the interval is somewhat too wide. Three seeds, or five,
resampled understate what seeds differ by, so their part is widened as Student's t widens a normal interval (Hesterberg
2015 does it by the percentiles, which so few seeds do not have). Two arms are compared at the seeds that both have, row
by row, since runs of one seed share labels, rows and the adapter as it starts.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench import study
from bench.study import ARMS, MAIN, MODELS, PAPER, RECIPE, ROOT, SYSTEMS, plan, planned, recipe_digest
from lorapar.errors import InputError
from lorapar.files import write_json, write_text
from lorapar.recipe.reading import load_recipe
from lorapar.recipe.sections import changes_result

DRAWS = 10_000
GSM8K = "examples/gsm8k_smollm2.yaml"
PAGE, PICTURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence.png"
README = ROOT / "README.md"
YARDSTICK = ROOT / "lorapar" / "reporting" / "quickstart.json"
BEGIN, END = "<!-- figures of bench.study, made by its --summary -->", "<!-- end of the figures -->"
Line = dict[str, Any]
# How the arms with a faster stage 2 end.
FAST = ", twice the rate"
# Seeds without which nothing is called better or worse.
FEWEST = 3
TOO_FEW = "too few seeds to say"
# Seeds without which their spread says nothing of how many would be needed.
FEWEST_TO_PLAN = 5

WORDS = {
    "scores": "LoRA-PAR",
    "all": "plain LoRA: every element in both stages",
    "random": "as many elements, chosen at random",
    "scores, twice the rate": "LoRA-PAR, stage 2 at twice the learning rate",
    "all, twice the rate": "plain LoRA, stage 2 at twice the learning rate",
    "random, twice the rate": "as many elements at random, stage 2 at twice the learning rate",
    "all, all rows": "plain LoRA on both systems' rows in both stages",
    "all, half the rate": "plain LoRA, stage 2 at half the learning rate",
    "renewed, twice the rate": "System 2 scored again after stage 1, stage 2 at twice the learning rate",
    "cost 1, twice the rate": "`partition.system1_cost` at 1, stage 2 at twice the learning rate",
    "rows aside, twice the rate": "rows put aside, the last step kept, stage 2 at twice the learning rate",
    "watched, twice the rate": "System 1's loss watched, stage 2 at twice the learning rate",
    "renewed": "System 2 scored again after stage 1 (`score.renew`)",
    "cost 0.5": "`partition.system1_cost` at 0.5",
    "cost 1": "`partition.system1_cost` at 1",
    "rows aside": "rows put aside, the last step kept: the control of `grpo.watch_rows`",
    "watched": "System 1's loss watched in stage 2 (`grpo.watch_rows`)",
    "grpo first": "GRPO, then SFT",
    "rank": "whole rank slices",
    "tile": "whole tiles",
    "theta 0.5": "θ = 0.5",
    "theta 0.7": "θ = 0.7",
    "theta 0.95": "θ = 0.95",
    "alpha 0": "α = 0: shared elements train in stage 2 alone",
    "beta 0": "β = 0: shared elements train in stage 1 alone",
    "alpha 0, beta 0": "α = β = 0: shared elements train in neither",
    "first order": "scored by |gφ| instead of I(φ)",
    "start paper": "start: paper (N(0, 0.01²))",
    "start pissa": "start: pissa",
    "start olora": "start: olora",
    "start peft, all": "start: peft (B = 0 cannot be scored), every element",
    "labels at random": "labels by a coin",
}  # fmt: skip


OPENING = """# Evidence

What the quickstart's recipe does, and what is left of it when one thing is changed: SmolLM2-135M, System 1 one addition
or subtraction of two numbers up to ten, System 2 two additions in a row, SFT on the first and then GRPO on the second.
{count} runs, {system1} held-out rows of System 1 and {system2} of System 2 that no stage saw. Every arm has the same
steps, rows, batches and learning rates, unless it says otherwise.

Made by `python -m bench.study --summary` from the lines in `bench/results/study/`, one a run with every held-out
answer; `python -m bench.study` adds what is missing. Figures are means over seeds and rows; in brackets their 95 %
interval by a bootstrap over both, the seeds' part widened for their number as Student's t does. *Change* is what stage
2 did, in points: what System 1 lost of what stage 1 had taught it, and what System 2 gained.

Stage 2's learning rate and reward were chosen on these held-out rows, at seed 0 and for LoRA-PAR
([bench/LOG.md](../bench/LOG.md)). That seed is among those shown, and no such choice was made for the other arms; the
plan has plain LoRA at half and at twice the rate too.

![System 1 and System 2 after stage 2, by arm](evidence.png)
"""


class Arm:
    """The runs of one arm on one device in one precision: a bit for each seed and row.

    bits[when][system]: bool [seeds, rows]; when: "first" after stage 1, "last" after stage 2.
    """

    def __init__(self, lines: Sequence[Line]):
        lines = sorted(lines, key=lambda line: line["seed"])
        self.seeds = [line["seed"] for line in lines]
        self.lines = lines
        stages = lines[0]["overrides"].get("stages", ["sft", "grpo"])
        self.bits = {
            when: {s: np.array([[bit == "1" for bit in line["answers"][stage][s]] for line in lines]) for s in SYSTEMS}
            for when, stage in (("base", "base"), ("first", stages[0]), ("last", stages[-1]))
        }

    def values(self, what: str, system: str) -> np.ndarray:
        """int [seeds, rows]: a row's right answers as 1, or, for "change", what stage 2 did to them: −1, 0 or 1."""
        if what == "change":
            return self.bits["last"][system].astype(int) - self.bits["first"][system]
        return self.bits[what][system].astype(int)

    def at(self, seeds: Sequence[int]) -> "Arm":
        return Arm([line for line in self.lines if line["seed"] in seeds])


@functools.lru_cache(maxsize=8)
def resamples(seeds: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each row is drawn: float32 [DRAWS, seeds] and [DRAWS, rows], the same at every call."""
    draw = np.random.default_rng(0)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    of_rows = draw.multinomial(rows, np.full(rows, 1 / rows), DRAWS)
    return of_seeds.astype(np.float32), of_rows.astype(np.float32)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of int [seeds, rows], both resampled; a share's stays within 0 and 1.

    The draws are summed as integers far below 2²⁴, exact in fp32: the page is the same on every processor.
    """
    of_seeds, of_rows = resamples(*values.shape)
    exact, mean = values.astype(np.float32), values.mean()
    by_seeds, by_rows = (of_seeds @ exact.sum(1)).astype(float), (of_rows @ exact.sum(0)).astype(float)
    means = mean + widening(len(values)) * (by_seeds / values.size - mean) + (by_rows / values.size - mean)
    low, high = np.quantile(means, [0.025, 0.975])
    if values.min() >= 0:
        low, high = max(low, 0.0), min(high, 1.0)
    return float(mean), float(low), float(high)


def widening(seeds: int) -> float:
    """How much wider t's interval of a mean over so few seeds is than their bootstrap's; 1 for a single seed."""
    if seeds == 1:
        return 1.0
    ratio = float(stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975))
    # Rounded, so that the page hangs on no last bit.
    return round(ratio * math.sqrt(seeds / (seeds - 1)), 4)


def difference(one: Arm, other: Arm, what: str, system: str) -> np.ndarray:
    """One arm's values minus the other's at the seeds that both have: int [seeds, rows]."""
    both = [seed for seed in one.seeds if seed in other.seeds]
    return one.at(both).values(what, system) - other.at(both).values(what, system)


def needed(values: np.ndarray) -> str:
    """About how many seeds a paired t test would need to show a difference as large, at 5 % and with a power of 0.8.

    values: int [seeds, rows]. Of the seeds' spread alone, whose estimate from few is rough; "–" from fewer than five.
    """
    means = values.mean(1)
    if len(means) < FEWEST_TO_PLAN or means.mean() == 0:
        return "–"
    ratio = float(means.std(ddof=1) / means.mean()) ** 2
    for count in range(2, 1001):
        if count >= (stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)) ** 2 * ratio:
            return f"about {count}"
    return "> 1000"


def figure(values: np.ndarray, signed: bool = False) -> str:
    """ "82.5 % [79.1, 86.0]", in points with a sign where `signed`."""
    mean, low, high = (100 * value for value in interval(values))
    if signed:
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def read_lines(files: Sequence[Path], recipe: str = RECIPE) -> list[Line]:
    """The lines of what the recipe says today whose arms mean what they did.

    Raises InputError where a run has two lines, or where lines are of other held-out rows: another version of
    reasoning-gym may draw others.
    """
    digest = recipe_digest(ROOT / recipe)
    lines = [line for file in files for line in study.read_lines(file)]
    lines = [line for line in lines if line["recipe"] == digest and planned(line, ROOT / recipe) is not None]
    seen = set()
    for line in lines:
        run = tuple(line[key] for key in ("device", "precision", "arm", "seed"))
        if run in seen:
            raise InputError(f"two lines of one run: {', '.join(map(str, run))}")
        seen.add(run)
    if len({line["rows"] for line in lines}) > 1:
        raise InputError("the lines are of several sets of held-out rows, which cannot be compared")
    return lines


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str], dict[str, Arm]]:
    """{(device, precision): {arm: its runs}}: those with LoRA-PAR's own first, of them the one with the most runs."""
    groups: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in lines:
        groups.setdefault((line["device"], line["precision"]), {}).setdefault(line["arm"], []).append(line)
    for by in groups.values():
        for control in ("rows aside", "rows aside" + FAST):
            own = {line["seed"] for line in by.get(control, [])}
            watched = by.get(control.replace("rows aside", "watched"), [])
            if same := [line for line in watched if kept_last_step(line) and line["seed"] not in own]:
                by[control] = by.get(control, []) + same
    order = sorted(groups, key=lambda key: ("scores" not in groups[key], -sum(map(len, groups[key].values()))))
    return {key: {arm: Arm(groups[key][arm]) for arm in ARMS if arm in groups[key]} for key in order}


def kept_last_step(line: Line) -> bool:
    """Whether a watched run kept what it ended with.

    Watching changes nothing of a run but which checkpoint is kept (tests/lorapar/test_watching.py), so such a run is
    its own control.
    """
    return line["watched"]["kept"] == max(int(step) for step in line["watched"]["losses"])


def summarise(files: Sequence[Path]) -> int:
    """Write the page, the picture, README's figures and the yardstick; 1 where there is no line yet."""
    groups = grouped(read_lines(files))
    if not any("scores" in arms for arms in groups.values()):
        print(f"no line of today's {RECIPE} in {', '.join(map(str, files)) or 'bench/results/study'}")
        return 1
    draw(groups, PICTURE)
    write_text(PAGE, page(groups, read_lines(files, GSM8K)))
    write_text(README, with_figures(README.read_text(encoding="utf-8"), readme_table(groups)))
    write_json(YARDSTICK, yardstick(groups))
    print(*(path.relative_to(ROOT) for path in (PAGE, PICTURE, README, YARDSTICK)), sep="\n")
    return 0


# The lines hold verdicts, not texts. Found by judging one run's answers again (bench/LOG.md).
JUDGED_SINCE = (
    "The verdicts are those of the study's time. Today's also take a right number whose sentence was cut off "
    '("4, which is"), of which the base writes many: they give the base 57.5 % of System 1 and 19.0 % of System 2. On '
    "what a run answered after each stage, the two agreed everywhere."
)


def page(groups: dict[tuple[str, str], dict[str, Arm]], gsm8k: Sequence[Line] = ()) -> str:
    """docs/evidence.md; gsm8k: the lines of that recipe."""
    (device, precision), arms = next(iter(groups.items()))
    scores = arms["scores"]
    rows = {s: scores.bits["base"][s].shape[1] for s in SYSTEMS}
    # A line may stand in two arms.
    count = len({id(line) for by in groups.values() for arm in by.values() for line in arm.lines})
    parts = [
        OPENING.format(count=count, **rows),
        f"## The arms\n\n{device}, {precision}{made_with(arms)}.\n\n{arms_table(arms)}\n\n{JUDGED_SINCE}",
        f"## Differences, seed by seed\n\n{differences(arms)}",
        f"## Other processors and precisions\n\n{devices_table(groups)}",
        f"## What was expected of the three ways beyond the paper\n\n{expectations(arms)}",
        f"## GSM8K on a CPU\n\n{gsm8k_table(gsm8k)}",
        f"## Not run\n\n{not_run(groups)}",
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def made_with(arms: dict[str, Arm]) -> str:
    """The versions and commits that the lines name."""
    lines = [line for arm in arms.values() for line in arm.lines if "versions" in line]
    versions = sorted({f"{name} {version}" for line in lines for name, version in line["versions"].items()})
    commits = sorted({line["commit"][:7] for line in lines})
    return f"; {', '.join(versions)}; at {', '.join(commits)}" if lines else ""


def arms_table(arms: dict[str, Arm]) -> str:
    lines = [
        "| arm | seeds | System 1 after stage 1 | after stage 2 | change "
        "| System 2 after stage 1 | after stage 2 | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        cells = [
            figure(arm.values(what, s), signed=what == "change")
            for s in SYSTEMS
            for what in ("first", "last", "change")
        ]
        lines.append(f"| {WORDS[name]} | {len(arm.seeds)} | " + " | ".join(cells) + " |")
    base = arms["scores"]
    lines.append(
        "| the base | | " + " | ".join(f"{100 * base.bits['base'][s].mean():.1f} % | | " for s in SYSTEMS) + " |"
    )
    return "\n".join(lines)


def reference_of(arm: str) -> str:
    """What the arm is compared with: LoRA-PAR at its learning rate, or the control of what it does besides."""
    way, fast = arm.removesuffix(FAST), FAST * arm.endswith(FAST)
    return ("rows aside" if way == "watched" else "scores") + fast


def same_stages(arm: Arm) -> bool:
    """Whether its stages are stage 1 and stage 2 as LoRA-PAR has them, so that their changes can be compared."""
    return not {"stages", "sft.systems", "grpo.systems"} & set(arm.lines[0]["overrides"])


def differences(arms: dict[str, Arm]) -> str:
    lines = [
        "LoRA-PAR minus the other arm, in points: above 0 it is better. Against an arm at twice the learning rate it "
        "is LoRA-PAR at twice the rate too. *Seeds*: those that both have. *Needs*: seeds that would show a difference "
        "of this size in four studies of five, at 5 %, by the spread between these seeds alone.\n",
        "| against | seeds | System 1 kept (change) | needs | System 1 at the end | needs "
        "| System 2 gained (change) | needs | System 2 at the end | needs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        own = arms.get("scores" + FAST * name.endswith(FAST))
        if own is None or name in ("scores", "scores" + FAST) or not set(arm.seeds) & set(own.seeds):
            continue
        cells, count = [], 0
        for s in SYSTEMS:
            for what in ("change", "last"):
                values = difference(own, arm, what, s)
                count = len(values)
                shown = what == "last" or same_stages(arm)
                cells += [figure(values, signed=True), needed(values)] if shown else ["–", "–"]
        lines.append(f"| {WORDS[name]} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def devices_table(groups: dict[tuple[str, str], dict[str, Arm]]) -> str:
    lines = [
        "| device | precision | arm | seeds | System 1 after stage 1 | after stage 2, seed by seed "
        "| System 2 after stage 1 | after stage 2, seed by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (device, precision), arms in groups.items():
        for name in ("scores", "all"):
            if name in arms:
                cells = []
                for s in SYSTEMS:
                    each = ", ".join(f"{100 * value:.1f}" for value in arms[name].bits["last"][s].mean(1))
                    cells += [f"{100 * arms[name].bits['first'][s].mean():.1f} %", f"{each} %"]
                lines.append(
                    f"| {device} | {precision} | {WORDS[name]} | {len(arms[name].seeds)} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines)


# What each option's description predicted before it was run.
EXPECTED = {
    "renewed": "System 2 gains more, because what matters to it has moved while stage 1 trained.",
    "cost 0.5": "System 1 loses less in stage 2, for a little less gain in System 2.",
    "cost 1": "As above, more of both.",
    "watched": "System 1 loses less where its loss rises late, at the price of System 2's later gain.",
}


def expectations(arms: dict[str, Arm]) -> str:
    lines = [
        "The way minus LoRA-PAR at the same learning rate, at the end, in points; watching is compared with the arm "
        "that puts the same rows aside, since they are missing in stage 1. An option is on by default where, at the "
        "recipe's own learning rate, one system is better by its interval and neither is worse.\n",
        "| way | expected | System 1 | System 2 | seeds | default |",
        "|---|---|---|---|---|---|",
    ]
    for way, words in EXPECTED.items():
        for name in (way, way + FAST):
            own = arms.get(reference_of(name))
            if name not in ARMS:
                continue
            default = "" if name.endswith(FAST) else "on" if way in chosen(arms) else "off"
            if name not in arms or own is None or not set(arms[name].seeds) & set(own.seeds):
                lines.append(f"| {WORDS[name]} | {words} | not run | not run | 0 | {default} |")
                continue
            both = [difference(arms[name], own, "last", s) for s in SYSTEMS]
            cells = [f"{figure(values, signed=True)} ({verdict(values)})" for values in both]
            lines.append(f"| {WORDS[name]} | {words} | {' | '.join(cells)} | {len(both[0])} | {default} |")
    return "\n".join(lines)


def chosen(arms: dict[str, Arm]) -> list[str]:
    """The ways beyond the paper that the study makes a default: better in one system, and worse in neither."""
    ways = []
    for way in EXPECTED:
        own = arms.get(reference_of(way))
        if way in arms and own is not None and set(arms[way].seeds) & set(own.seeds):
            said = [verdict(difference(arms[way], own, "last", s)) for s in SYSTEMS]
            if "better" in said and "worse" not in said:
                ways.append(way)
    return ways


def gsm8k_table(lines: Sequence[Line]) -> str:
    """Right answers of all, for each run: too few runs and too few right answers for an interval over seeds."""
    command = (
        f"By `python -m bench.study --recipe {GSM8K} --arms scores --seeds 1 --precision bfloat16 --output "
        f"bench/results/study/gsm8k.jsonl`, in the repository's root with GSM8K's two files in `gsm8k/`."
    )
    if not lines:
        return f"{command} Not run."
    said = [
        f"A model of this size answers hardly any of GSM8K, before and after: this shows that the method runs on real "
        f"rows, not that it helps. {command} `examples/gsm8k_llama2_7b.yaml` is for a model that learns it; "
        f"[memory.md](memory.md) has an estimate of its hours and memory.\n"
    ]
    said += [
        "| device | precision | arm | seed | System 1: base | after SFT | after GRPO "
        "| System 2: base | after SFT | after GRPO | minutes (threads) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [
            f"{bits.count('1')} of {len(bits)}"
            for s in SYSTEMS
            for bits in (line["answers"][stage][s] for stage in MODELS)
        ]
        facts = (line["device"], line["precision"], WORDS[line["arm"]], line["seed"])
        minutes = f"{line['seconds'] / 60:.0f} ({line['threads']})"
        said.append("| " + " | ".join([*map(str, facts), *cells, minutes]) + " |")
    return "\n".join(said)


def not_run(groups: dict[tuple[str, str], dict[str, Arm]]) -> str:
    """What the plan has and the first group's device has not run, in its precision and in fp32."""
    device, own = next(iter(groups))
    wanted: dict[str, int] = {}
    for run in plan(list(ARMS), None, list(dict.fromkeys([own, "float32"]))):
        arms = groups.get((device, run.precision), {})
        if run.arm not in arms or run.seed not in arms[run.arm].seeds:
            words = WORDS[run.arm] + f", {run.precision}" * (run.precision != own)
            wanted[words] = wanted.get(words, 0) + 1
    if not wanted:
        return "Nothing of the plan."
    return "\n".join(f"- {words}: {count} of the planned seeds" for words, count in wanted.items())


def readme_table(groups: dict[tuple[str, str], dict[str, Arm]]) -> str:
    """README's headline: means over seeds with intervals, the controls beside them, and what one run may differ by."""
    (device, precision), arms = next(iter(groups.items()))
    scores = arms["scores"]
    rows = {s: scores.bits["base"][s].shape[1] for s in SYSTEMS}
    shown = [arm for arm in MAIN if arm in arms]
    counts = sorted({len(arms[arm].seeds) for arm in shown})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    lines = [
        f"Held-out accuracy, means over {seeds} ({device}, {precision}), with 95 % intervals over seeds and rows "
        f"({rows['system1']} of System 1, {rows['system2']} of System 2):\n",
        "| | System 1 after SFT | after GRPO | System 2 after SFT | after GRPO |",
        "|---|---|---|---|---|",
    ]
    for arm in shown:
        cells = [figure(arms[arm].values(when, s)) for s in SYSTEMS for when in ("first", "last")]
        if arm == "scores":
            cells = [f"**{cell.replace(' [', '** [', 1)}" for cell in cells]
        lines.append(f"| {WORDS[arm]} | " + " | ".join(cells) + " |")
    base = {s: f"{100 * scores.bits['base'][s].mean():.1f} %" for s in SYSTEMS}
    ends = {s: 100 * scores.bits["last"][s].mean(1) for s in SYSTEMS}
    spread = {s: f"{values.min():.1f} and {values.max():.1f} %" for s, values in ends.items()}
    runs = (
        f"The base answers {base['system1']} of System 1 and {base['system2']} of System 2. A single run of LoRA-PAR "
        f"ended between {spread['system1']} in System 1, and between {spread['system2']} in System 2. {JUDGED_SINCE}"
    )
    lines += ["", " ".join(filter(None, (runs, plainly(arms)))), "", claims(arms)]
    return "\n".join(lines)


def claims(arms: dict[str, Arm]) -> str:
    """What the differences say, in words that follow from the intervals."""
    said = []
    for after, rate in (("", "At the end"), (FAST, "With stage 2 at twice the learning rate")):
        for other, words in (
            ("all", "plain LoRA"),
            ("random", "a random choice"),
            ("all, all rows", "plain LoRA on all rows"),
        ):
            if other + after not in arms or "scores" + after not in arms:
                continue
            parts = []
            for s, title in zip(SYSTEMS, ("System 1", "System 2")):
                values = difference(arms["scores" + after], arms[other + after], "last", s)
                parts.append(f"{title} {figure(values, signed=True)} points ({verdict(values)})")
            said.append(f"- {rate}, LoRA-PAR minus {words}: {', '.join(parts)}.")
    if "scores" in arms and "all" in arms:
        values = difference(arms["scores"], arms["all"], "change", "system2")
        said.append(
            f"- What stage 2 adds to System 2, LoRA-PAR minus plain LoRA: {figure(values, signed=True)} points "
            f"({verdict(values)})."
        )
    return "\n".join(said)


def plainly(arms: dict[str, Arm]) -> str:
    """Whether importance beats chance, in one sentence; "" with too few seeds to say."""
    said, rooms = set(), []
    for after, rate in (("", ""), (FAST, " at twice the rate")):
        if "scores" + after in arms and "random" + after in arms:
            both = [difference(arms["scores" + after], arms["random" + after], "last", s) for s in SYSTEMS]
            said |= {verdict(values) for values in both}
            rooms.append(f"{max(abs(100 * end) for values in both for end in interval(values)[1:]):.0f} points{rate}")
    if not said or TOO_FEW in said:
        return ""
    if said == {"better"}:
        return "Choosing elements by importance has done better than choosing as many at random in every comparison."
    if said == {"no clear difference"}:
        return (
            "**Choosing elements by importance has done no better here than choosing as many at random:** no "
            f"difference was found, and the intervals leave room for {', and '.join(rooms)}."
        )
    words = " and ".join(word for word in ("better", "worse") if word in said)
    return (
        f"Choosing elements by importance has done {words} than choosing as many at random in some of the comparisons "
        "below."
    )


def verdict(values: np.ndarray) -> str:
    """Whether the first of two arms is better, by the interval of their difference."""
    if len(values) < FEWEST:
        return TOO_FEW
    _, low, high = interval(values)
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def with_figures(text: str, table: str) -> str:
    """The text with what stands between the two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: the marks {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def yardstick(groups: dict[tuple[str, str], dict[str, Arm]]) -> dict[str, Any]:
    """What the report shows beside a run of this recipe: the resolved recipe, and the arms' figures."""
    (device, precision), arms = next(iter(groups.items()))
    paper = [(key, json.dumps(value)) for key, value in PAPER.items()]
    recipe = result_keys(load_recipe(ROOT / RECIPE, paper).as_dict())
    figures = {}
    for name in ("scores", "all", "random"):
        if name in arms:
            arm = arms[name]
            figures[name] = {
                "seeds": len(arm.seeds),
                **{s: {when: [round(v, 6) for v in (*interval(arm.values(when, s)), *extremes(arm.values(when, s)))]
                       for when in ("first", "last")} for s in SYSTEMS},
            }  # fmt: skip
    return {"device": device, "precision": precision, "recipe": recipe, "arms": figures}


def result_keys(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """The keys of a recipe that change what a run comes to, without those that the arms and seeds differ in."""
    kept = {}
    for key, value in values.items():
        dotted = f"{at}.{key}" if at else key
        if not changes_result(dotted) or dotted in ("seed", "model.dtype", "model.device"):
            continue
        kept[key] = result_keys(value, dotted) if isinstance(value, dict) and value else value
    return kept


def extremes(values: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest seed."""
    means = values.mean(1)
    return float(means.min()), float(means.max())


def draw(groups: dict[tuple[str, str], dict[str, Arm]], path: Path) -> None:
    """Both systems' accuracy after stage 2: each arm's mean with its intervals, and its seeds as points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, arms = next(iter(groups.items()))
    shown, axes = pyplot.subplots(figsize=(9, 6.5), dpi=110)
    colours = pyplot.get_cmap("tab20")
    kinds = list(dict.fromkeys(name.removesuffix(FAST) for name in ARMS))
    for place, (name, arm) in enumerate(arms.items()):
        kind = kinds.index(name.removesuffix(FAST))
        x, y = (arm.values("last", s) for s in SYSTEMS)
        (mx, lx, hx), (my, ly, hy) = ([100 * value for value in interval(values)] for values in (x, y))
        # The main arms' colours are apart; an arm at twice the rate has its own arm's, and a hollow mark.
        colour, main = colours(kind * 2 % 20 if kind < 10 else kind * 2 % 20 + 1), name in MAIN
        axes.scatter(100 * x.mean(1), 100 * y.mean(1), s=9, color=colour, alpha=0.45, linewidths=0)
        axes.errorbar(
            mx, my, xerr=[[mx - lx], [hx - mx]], yerr=[[my - ly], [hy - my]], fmt="o" if main else "s", color=colour,
            markersize=9 if main else 5, linewidth=1.2 if main else 0.6, label=WORDS[name].replace("`", ""),
            markerfacecolor="white" if name.endswith(FAST) else colour, zorder=3 + len(arms) - place,
        )  # fmt: skip
    axes.set_xlabel("System 1 after stage 2, % of held-out rows")
    axes.set_ylabel("System 2 after stage 2, % of held-out rows")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    shown.savefig(path, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(shown)
