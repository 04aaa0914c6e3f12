"""The report's sections in the order of the page: each takes what the run left, draws its figures, returns its HTML.

The agreement of the voters, between `labels` and `cost` on the page, is in agreement.py.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import charts, elements
from .artefacts import Artefacts, active_counts, evaluated, measured, vote_weights
from .charts import Figures
from .elements import GRANULARITIES, REGIONS
from .html import absent, byte_size, duration, escaped, html_table, number, percent
from .yardstick import yardstick

# How the page names and colours a group of rows.
SYSTEMS = {
    "system1": ("System 1", charts.S1),
    "system2": ("System 2", charts.S2),
    "all": ("All", charts.MUTED),
}
TITLES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
STAGES = ("label", "score", "partition", "sft", "renew", "grpo", "evaluate", "benchmark", "export")
SCATTER_POINTS = 20_000
STATE_BYTES = 8  # two fp32 moments an element
# What each stage's panels show: (key in the log, title, key of its spread).
LOGGED = {
    "sft": (
        ("loss", "loss", None),
        ("eval_loss", "loss on rows put aside", None),
        ("grad_norm", "gradient norm", None),
        ("mean_token_accuracy", "token accuracy", None),
    ),
    "grpo": (
        ("reward", "reward ± its standard deviation", "reward_std"),
        ("loss", "loss", None),
        ("grad_norm", "gradient norm", None),
    ),
}


def accuracy(run: Artefacts, figures: Figures) -> str:
    if run.metrics is None:
        return absent("metrics.json", "evaluate")
    steps, by, intervals = evaluated(run), measured(run), run.metrics.get("interval", {})
    present = [key for key in SYSTEMS if all(by.means[step].get(key) is not None for step in steps)]
    if not present:
        return (
            '<p class="absent">The metric gave no value for the held-out rows (accuracy gives none without an answer); '
            "the recipe's evaluate.metric takes another function.</p>"
        )

    def interval(step: str, key: str) -> Sequence[float] | None:
        return intervals.get(step, {}).get(key)

    scale = 100 if by.is_share else 1
    ends = [value for s in steps for k in present for value in (by.means[s][k], *(interval(s, k) or ()))]
    top = scale * max(0, *ends) * 1.12
    bottom = scale * min(0, *ends) * 1.12
    panels = [
        charts.accuracy_panel(
            *SYSTEMS[key],
            labels=[TITLES[step] for step in steps],
            values=[by.means[step][key] for step in steps],
            intervals=[interval(step, key) for step in steps],
            span=(bottom, min(109.0, top + 1)) if by.is_share else (bottom, top or 1.0),
            n=by.counts.get("base", {}).get(key),
            metric=None if by.is_share else by.name,
        )
        for key in present
    ]
    rows = []
    for key in present:
        n = by.counts.get("base", {}).get(key)
        cells = [f"<th>{SYSTEMS[key][0]}</th><td>{number(n) if n is not None else '–'}</td>"]
        for step in steps:
            value, bounds, n = by.means[step][key], interval(step, key), by.counts.get(step, {}).get(key)
            of = f"{round(value * n)}/{n}" if n and by.is_share else f"{n} rows" if n else ""
            places, to = (".1f", "–") if by.is_share else (".4g", " to ")
            within = f"{scale * bounds[0]:{places}}{to}{scale * bounds[1]:{places}}" if bounds else ""
            cells.append(f"<td>{by.text(value)}<small>{within}</small><small>{of}</small></td>")
        cells += [f"<td>{by.signed(by.means[b][key] - by.means[a][key])}</td>" for a, b in itertools.pairwise(steps)]
        rows.append("".join(cells))
    points = ", points" if by.is_share else ""
    changes = [f"change by {step.upper()}{points}" for step in steps[1:]]
    table = html_table(["", "held-out rows", *(TITLES[step] for step in steps), *changes], rows)
    cost = second_stage_cost(run)
    summary = ""
    if cost is not None:
        key, change = cost
        first, second = steps[1].upper(), steps[2].upper()
        verb = "cost" if change < 0 else "gave" if change > 0 else "left"
        how = by.change(change) if change else "unchanged"
        a, b = interval(steps[1], key), interval(steps[2], key)
        apart = a and b and (a[1] < b[0] or b[1] < a[0])
        note = "the two intervals do not overlap" if apart else "the two intervals overlap"
        summary = (
            f"<p>What stage 2 did to stage 1: {second} {verb} {SYSTEMS[key][0]}, which {first} had trained, "
            f"<b>{how}</b>{f' ({note})' if a and b else ''}.</p>"
        )
    left = sum(groups.get("all", 0) for groups in run.metrics.get("none", {}).values())
    if left:
        summary += f"<p>{number(left)} answers have no value, since {escaped(by.name)} gave None, and are left out.</p>"
    if by.is_share:
        caption = (
            "Accuracy on held-out rows. The colour gets stronger from the base to the last stage; the line on a bar "
            "is its 95 % Wilson interval, and the number above it the share of right answers."
        )
    else:
        caption = (
            f"The mean of {escaped(by.name)} over held-out rows. The colour gets stronger from the base to the last "
            "stage; the line on a bar is its 95 % interval (Wilson's where all are 0 or 1, else the bootstrap's)."
        )
    return figures.draw("accuracy", panels, caption) + summary + table + (yardstick(run) if by.is_share else "")


def second_stage_cost(run: Artefacts) -> tuple[str, float] | None:
    """(the first stage's system, a key of SYSTEMS; how stage 2 changed its mean); None without two stages."""
    if run.metrics is None or len(evaluated(run)) < 3:
        return None
    _, first, second = evaluated(run)
    key = "system1" if first == "sft" else "system2"
    old, new = (measured(run).means[step].get(key) for step in (first, second))
    return None if old is None or new is None else (key, new - old)


def importance(run: Artefacts, figures: Figures) -> str:
    if run.scores is None:
        return absent("scores.safetensors", "score")
    names = list(run.scores[1])
    total = sum(array.size for array in run.scores[1].values())
    # Every element is equally likely, and the same ones are drawn each time.
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:SCATTER_POINTS])
    one, two = (_pick(run.scores[system], names, chosen) for system in (1, 2))
    visible = (one > 0) & (two > 0)
    codes = None if run.codes is None else _pick(run.codes, names, chosen)
    both = np.concatenate([one[visible], two[visible]])
    if not len(both):
        return '<p class="absent">No element scores above zero for both systems: there is nothing to draw.</p>'
    limits = float(np.quantile(both, 0.0005)) / 1.5, float(both.max()) * 1.8
    inside = visible & (np.minimum(one, two) >= limits[0])
    thresholds, labels, counted = None, [""] * 4, ""
    alt = f"Log-log scatter of {inside.sum():,} elements: importance under System 1 against System 2."
    if run.partition is not None and run.codes is not None:
        regions = elements.region_map(run.codes)
        shares = regions.totals / regions.totals.sum()
        labels = [f"{name} {100 * share:.1f} %" for name, share in zip(REGIONS, shares)]
        alt += " Shares: " + ", ".join(labels) + f"; Jaccard {regions.jaccard:.3f}."
        counted = _region_table(regions) + _renewed(run.partition.metadata.get("renewed"))
        if run.partition.metadata["granularity"] == "element" and run.partition.metadata["selection"] == "scores":
            thresholds = _threshold(run, 1), _threshold(run, 2)
    regions_drawn = None if codes is None else codes[inside]
    panel = charts.scatter_panel(one[inside], two[inside], regions_drawn, limits, labels, thresholds, alt)
    caption = (
        f"Importance under System 1 against System 2, log-log: {inside.sum():,} of {total:,} trainable "
        f"elements, drawn at random with equal chance ({len(chosen) - inside.sum():,} drawn ones are zero or "
        "lie below the axes)."
    )
    if thresholds is not None:
        caption += " Dashed: the lowest importance that each system keeps; the two lines make the four regions."
    elif counted:
        caption += " Colours are the regions; here single elements do not decide them, so they mix."
    if not counted:
        counted = absent("partition.safetensors", "partition")
    return f'<div class="beside">{figures.draw("importance", [panel], caption)}<div>{counted}</div></div>'


def _region_table(regions: elements.RegionMap) -> str:
    totals, shares = regions.totals, regions.totals / regions.totals.sum()
    order = ((1, "s1"), (2, "s2"), (3, "shared"), (0, "muted"))
    rows = [
        f'<th class="{css}">{REGIONS[code]}</th><td>{number(totals[code])}</td><td>{percent(shares[code])}</td>'
        for code, css in order
    ]
    kept = [int(totals[system] + totals[3]) for system in (1, 2)]
    rows += [
        f"<th>kept by System {s}</th><td>{number(k)}</td><td>{percent(k / totals.sum())}</td>"
        for s, k in zip((1, 2), kept)
    ]
    rows.append(f"<th>all trainable</th><td>{number(totals.sum())}</td><td>100 %</td>")
    return (
        html_table(["region", "elements", "share"], rows)
        + f"<p>The two kept sets share <b>{number(totals[3])}</b> elements: Jaccard index "
        f"<b>{regions.jaccard:.3f}</b> (1 if both systems kept the same elements, 0 if none in common).</p>"
    )


def _renewed(facts: dict[str, Any] | None) -> str:
    """That a system was scored again between the two training stages, and how far its kept set moved by that."""
    if facts is None:
        return ""
    return (
        f"<p>System {facts['system']} was scored again before {facts['stage'].upper()}, on what the stage before had "
        f"left: its kept sets before and after have a Jaccard index of <b>{facts['jaccard']:.3f}</b>. What is shown of "
        "it here is the second.</p>"
    )


def layer_map(run: Artefacts, figures: Figures) -> str:
    if run.codes is None:
        return absent("partition.safetensors", "partition")
    regions = elements.region_map(run.codes)
    short = [module.removesuffix("_proj") for module in regions.modules]
    order = ((1, charts.S1), (2, charts.S2), (3, charts.SHARED), (0, charts.INACTIVE))
    panels = []
    for code, colour in order:
        shares = regions.share(code)
        low, high = np.nanmin(shares), np.nanmax(shares)
        alt = (
            f"{REGIONS[code]}: share of each layer and module, from {percent(low)} to {percent(high)}; by "
            "module "
            + ", ".join(
                f"{name} {percent(regions.counts[:, j, code].sum() / regions.counts[:, j].sum())}"
                for j, name in enumerate(short)
            )
        )
        title = f"{REGIONS[code][0].upper()}{REGIONS[code][1:]}, %"
        panels.append(charts.heat_panel(title, colour, regions.layers, short, shares, alt))
    caption = (
        "Each region's share of the elements of every layer (rows) and module (columns), A and B together. "
        "Each map runs from the page's colour at 0 % to the strongest at its own highest cell; a "
        "place's four numbers add to 100 % but for rounding."
    )
    rows = []
    for j, module in enumerate(regions.modules):
        counts = regions.counts[:, j].sum(0)
        cells = "".join(f"<td>{percent(counts[code] / counts.sum())}</td>" for code, _ in order)
        rows.append(f"<th>{escaped(module)}</th><td>{number(counts.sum())}</td>{cells}")
    table = html_table(["module, all layers", "elements", *(REGIONS[code] for code, _ in order)], rows)
    return figures.draw("map", panels, caption, columns=4) + table


def theta(run: Artefacts, figures: Figures) -> str:
    if run.scores is None:
        return absent("scores.safetensors", "score")
    metadata = {} if run.partition is None else run.partition.metadata
    theta, granularity = metadata.get("theta"), metadata.get("granularity", "element")
    if metadata.get("selection") == "all":
        theta = None
    # The run's own share where there is a partition, else what θ = 0.9 would need.
    mark = 0.9 if theta is None else theta
    chosen = {s: run.curves[s, granularity].needed(mark) for s in (1, 2)}
    thetas = np.r_[np.linspace(0, 0.98, 99), np.linspace(0.981, 1, 20)]
    shares = {s: np.array([run.curves[s, granularity].needed(t) for t in thetas]) for s in (1, 2)}
    alt = "; ".join(f"System {s} needs {percent(chosen[s])} at θ = {mark:g}" for s in (1, 2))
    panels = [charts.theta_panel(thetas, shares, theta, chosen if theta is not None else {}, alt)]
    kept = {(s, g): run.curves[s, g].kept(chosen[s]) for s in (1, 2) for g in GRANULARITIES}
    for s in (1, 2):
        curves = {g: run.curves[s, g].thinned() for g in GRANULARITIES}
        at = {g: kept[s, g] for g in GRANULARITIES}
        alt = f"System {s} at {percent(chosen[s])} active: " + ", ".join(f"{g} keeps {percent(at[g])}" for g in at)
        panels.append(charts.granularity_panel(s, curves, chosen[s], at, alt))
    rows = []
    for g in GRANULARITIES:
        cells = [f"<th>{g}{' (this run)' if metadata and g == granularity else ''}</th>"]
        cells += [f"<td>{percent(kept[s, g])}</td>" for s in (1, 2)]
        cells += [f"<td>{percent(run.curves[s, g].needed(mark))}</td>" for s in (1, 2)]
        rows.append("".join(cells))
    heads = ["kept, System 1", "kept, System 2", "needed, System 1", "needed, System 2"]
    summary = (
        f"<p>Kept: the share of score held when as many elements are active as {granularity} granularity "
        f"needs for θ = {mark:g} ({percent(chosen[1])} for System 1, {percent(chosen[2])} for System 2). "
        f"Needed: the share of elements that holds θ = {mark:g}.</p>"
    )
    caption = (
        f"Left: the share of elements needed to hold θ of each system's score at {granularity} granularity"
        + (f"; the dashed line is this run's θ = {theta:g}. " if theta is not None else ". ")
        + "Right: the score held by the best elements, tiles or rank slices. The vertical line is the share "
        f"that {granularity} granularity needs for θ = {mark:g}; lower curves there are what coarser choices "
        "give up."
    )
    return figures.draw("theta", panels, caption) + summary + html_table(["granularity", *heads], rows)


def training(run: Artefacts, figures: Figures) -> str:
    parts = []
    for stage, plan in LOGGED.items():
        name = stage.upper()
        if stage not in run.histories:
            parts.append(absent(f"{stage}/log_history.json", stage))
            continue
        panels, notes, longest = [], [], 0
        for key, title, spread in plan:
            rows = [row for row in run.histories[stage] if row.get(key) is not None]
            if not rows:
                continue
            steps = np.array([int(row["step"]) for row in rows])
            values = np.array([float(row[key]) for row in rows])
            band = np.array([float(row.get(spread) or 0) for row in rows]) if spread else None
            colour = charts.S1 if stage == "sft" else charts.S2
            panels.append(charts.curve_panel(f"{name}: {title}", colour, steps, values, band))
            longest = max(longest, len(rows))
            lost = int((~np.isfinite(values)).sum())
            if lost:
                notes.append(f" The {title} was not finite in {lost} of {len(values)} logged steps.")
        if not panels:
            parts.append(f'<p class="absent">{stage}/log_history.json holds no logged steps.</p>')
            continue
        last = int(max(row.get("step", 0) for row in run.histories[stage]))
        systems = run.recipe.get(stage, {}).get("systems") or ([1] if stage == "sft" else [2])
        caption = f"{name}, {last:,} steps on the rows of System {' and '.join(map(str, systems))}."
        window = charts.running_window(longest)
        if window > 1:
            caption += f" Thin lines are as logged, thick ones a running mean over {window} logged values."
        if stage == "grpo":
            caption += " The band is one standard deviation of the reward within a logged batch."
        parts.append(figures.draw(f"training_{stage}", panels, escaped(caption + "".join(notes))))
    return "".join(parts) + (_watched(run.watched, figures) if run.watched else "")


def _watched(watched: dict[str, Any], figures: Figures) -> str:
    """The loss that grpo watched at its checkpoints, the limit, and the checkpoint that was kept."""
    losses = {int(step): float(loss) for step, loss in watched["losses"].items()}
    name, colour = SYSTEMS[f"system{watched['system']}"]
    kept, last, limit = watched["kept"], max(losses), losses[0] + watched["rise"]
    panel = charts.watched_panel(f"{name}: loss on rows put aside", colour, losses, limit, kept)
    rule = (
        f"the last checkpoint whose loss is at most {limit:.4g}, {watched['rise']:g} above the start"
        if losses[kept] <= limit
        else f"the lowest loss, as no checkpoint's was at most {limit:.4g}, {watched['rise']:g} above the start"
    )
    caption = (
        f"{name}'s mean loss, in nats an answer token, on {number(watched['rows'])} rows that no stage trains on, "
        f"before GRPO and at its checkpoints. The run keeps step {kept:,} of {last:,} (the dot): {rule} (dashed)."
    )
    return figures.draw("watched", [panel], escaped(caption))


def labels(run: Artefacts, figures: Figures) -> str:
    if run.labels is None:
        return absent("labels.jsonl", "label")
    rows = run.labels
    counts = Counter((row.get("system"), row.get("split")) for row in rows)
    splits = list(dict.fromkeys(["train", "held_out", *(row.get("split") for row in rows)]))
    names = {"train": "training", "held_out": "held out"}
    table = []
    for system, css in ((1, "s1"), (2, "s2")):
        cells = [counts[system, split] for split in splits]
        table.append(
            f'<th class="{css}">System {system}</th>' + "".join(f"<td>{number(c)}</td>" for c in [*cells, sum(cells)])
        )
    cells = [sum(counts[system, split] for system in (1, 2)) for split in splits]
    table.append("<th>both</th>" + "".join(f"<td>{number(c)}</td>" for c in [*cells, sum(cells)]))
    heads = ["rows", *(escaped(names.get(str(split), str(split))) for split in splits), "all"]
    if run.dropped:
        table.append(f"<th>left out at a tie</th>{'<td></td>' * len(splits)}<td>{number(len(run.dropped))}</td>")
    votes: dict[str, Counter] = {}
    agrees: Counter = Counter()
    for row in rows:
        for voter, vote in (row.get("votes") or {}).items():
            votes.setdefault(voter, Counter())[vote] += 1
            agrees[voter] += vote is not None and vote == row.get("system")
    counted = html_table(heads, table)
    if not votes:
        return counted + "<p>No votes are recorded: the labels came with the data.</p>"
    weighted = ", by weight" if vote_weights(run) else ""
    agreement = [float(row["agreement"]) for row in rows if row.get("agreement") is not None]
    unanimous = sum(value == 1 for value in agreement)
    summary = (
        f"<p>On average the majority has <b>{percent(sum(agreement) / len(agreement))}</b> of a row's votes{weighted}; "
        f"{number(unanimous)} of {number(len(agreement))} rows ({percent(unanimous / len(agreement))}) were "
        "unanimous.</p>"
        if agreement
        else ""
    )
    of_label = Counter(row.get("system") for row in rows)
    bars = [("label", (of_label[1], of_label[2], 0))]
    bars += [(voter, (c[1], c[2], sum(c.values()) - c[1] - c[2])) for voter, c in votes.items()]
    alt = "; ".join(f"{name}: System 1 {a}, System 2 {b}, no vote {none}" for name, (a, b, none) in bars)
    panel = charts.stacked_panel(
        "Votes, System 1 blue, System 2 orange", [b[0] for b in bars], [b[1] for b in bars], alt
    )
    caption = 'Votes for <b class="s1">System 1</b>, <b class="s2">System 2</b> or none (grey), and the label.'
    by_voter = []
    for voter, c in votes.items():
        cast = c[1] + c[2]
        right = percent(agrees[voter] / cast) if cast else "–"
        by_voter.append(
            f"<th>{escaped(voter)}</th><td>{number(c[1])}</td><td>{number(c[2])}</td>"
            f"<td>{number(sum(c.values()) - cast)}</td><td>{right}</td>"
        )
    voters = html_table(["voter", "System 1", "System 2", "no vote", "votes equal to the label"], by_voter)
    figure = figures.draw("labels", [panel], caption)
    return f'<div class="beside">{figure}<div>{counted}{summary}</div></div>{voters}'


def cost(run: Artefacts, figures: Figures) -> str:
    if run.metrics is None:
        return absent("metrics.json", "evaluate")
    seconds, memory = run.metrics.get("seconds", {}), run.metrics.get("peak_memory_bytes", {})
    known = [*STAGES, *sorted({*seconds, *memory} - set(STAGES))]
    stages = [stage for stage in known if stage in seconds or stage in memory]
    if not stages:
        return '<p class="absent">metrics.json records neither seconds nor peak memory.</p>'
    total = sum(seconds.values())
    rows = []
    for stage in stages:
        took = seconds.get(stage)
        peak = memory.get(stage)
        share = percent(took / total) if took is not None and total else "–"
        rows.append(
            f"<th>{escaped(stage)}</th><td>{'–' if took is None else duration(took)}</td><td>{share}</td>"
            f"<td>{'–' if peak is None else byte_size(peak)}</td>"
        )
    rows.append(
        f"<th>together</th><td>{duration(total)}</td><td>100 "
        f"%</td><td>{byte_size(max(memory.values(), default=0))}</td>"
    )
    panels = []
    for title, values, write in (("Time", seconds, duration), ("Peak memory", memory, byte_size)):
        shown = [stage for stage in stages if values.get(stage) is not None]
        if shown:
            texts = [write(values[stage]) for stage in shown]
            alt = f"{title} of each stage: " + ", ".join(f"{s} {t}" for s, t in zip(shown, texts))
            numbers = [values[stage] for stage in shown]
            panels.append(charts.bars_panel(title, charts.MUTED, shown, numbers, texts, alt))
    figure = figures.draw("cost", panels, "Wall time and peak memory of each stage.", columns=2)
    table = html_table(["stage", "time", "share", "peak memory"], rows)
    summary = ""
    rollout = run.metrics.get("rollout_seconds", {}).get("grpo")
    if rollout is not None and seconds.get("grpo"):
        share = percent(rollout / seconds["grpo"])
        summary = (
            f"<p>Rollouts, the completions that GRPO learns from, took {duration(rollout)}, {share} of its time.</p>"
        )
    return f'<div class="beside">{figure}<div>{table}{summary}</div></div>'


def optimizer(run: Artefacts, figures: Figures) -> str:
    held = {} if run.metrics is None else run.metrics.get("optimizer_state_bytes", {})
    held = {stage: held[stage] for stage in ("sft", "grpo") if held.get(stage) is not None}
    if not held:
        return absent("metrics.json", "sft")
    bars, rows = [], []
    full = None
    if run.partition is not None:
        full = STATE_BYTES * run.partition.trainable()
        bars.append(("every element", full, charts.INACTIVE))
        rows.append(
            f"<th>every element</th><td>{number(full // STATE_BYTES)}</td><td>{number(full)}</td><td>100 %</td>"
        )
    for stage, size in held.items():
        bars.append((stage.upper(), size, charts.S1 if stage == "sft" else charts.S2))
        active = number(active_counts(run)[stage]) if run.partition is not None else "–"
        share = percent(size / full) if full else "–"
        rows.append(f"<th>{stage.upper()}</th><td>{active}</td><td>{number(size)}</td><td>{share}</td>")
    names, sizes, colours = zip(*bars)
    texts = [byte_size(size) for size in sizes]
    alt = "Optimizer state: " + ", ".join(f"{name} {text}" for name, text in zip(names, texts))
    panel = charts.bars_panel("Optimizer state", list(colours), list(names), list(sizes), texts, alt)
    caption = "AdamW's two fp32 moments, 8 bytes an element: for all that could train, and as each stage held it."
    table = html_table(["state for", "elements", "bytes", "of full"], rows)
    return f'<div class="beside">{figures.draw("optimizer", [panel], caption)}<div>{table}</div></div>'


def recipe(run: Artefacts, figures: Figures) -> str:
    if run.recipe_text is None:
        return '<p class="absent">recipe.yaml was not found in this folder.</p>'
    return f"<p>As resolved, every default written out.</p><pre><code>{escaped(run.recipe_text)}</code></pre>"


def _pick(arrays: dict[str, np.ndarray], names: list[str], places: np.ndarray) -> np.ndarray:
    """The elements at `places` of all the arrays laid end to end in the order of `names`."""
    return np.concatenate([arrays[name].reshape(-1) for name in names])[places]


def _threshold(run: Artefacts, system: int) -> float:
    """The lowest score that the system's kept set holds."""
    assert run.scores is not None
    assert run.codes is not None
    kept = (array[(run.codes[name] & system) > 0] for name, array in run.scores[system].items())
    return min((float(array.min()) for array in kept if array.size), default=math.nan)
