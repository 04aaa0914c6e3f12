"""One run's results as a page to read and pictures to keep: `report.html` and `figures/*.png`.

Every number comes from the run's artefacts; nothing is measured here. The page is one file: styles, SVG and pictures
are inside it, it loads nothing from a network, and it follows the reader's light or dark scheme.
Its one script filters the answers. A section whose artefact is missing says which stage has not run.
"""

import base64
import hashlib
import itertools
from pathlib import Path
from string import Template
from typing import Any

from ..errors import InputError
from ..files import atomic_folder, read_text, sha256_file, write_text
from . import rows, sections
from .agreement import agreement
from .artefacts import Artefacts, active_counts, evaluated, measured, model_name, read_artefacts
from .charts import Figures
from .html import duration, escaped, percent
from .sections import SYSTEMS, TITLES, second_stage_cost


def report(output_dir: Path | str, labels: list[dict[str, Any]] | None = None, answers: bool = True) -> Path:
    """Write `report.html` and `figures/` into a run's output folder from the artefacts that are there.

    Args:
        labels: the rows of labels.jsonl, where they have been read already.
        answers: False leaves the text of every row (prompt, reference, answers) out of the page, so that it can be
            published without the data; counts stay. The recipe is shown whole either way.

    Returns the page's path. Raises InputError where the folder is missing or holds none of a run's artefacts, and,
    naming the file, where an artefact is corrupt.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run's output folder")
    with atomic_folder(folder / "figures") as drawn:
        run, figures = read_artefacts(folder, labels, answers), Figures(drawn)
        judged = "Accuracy" if run.metrics is None or measured(run).is_share else "Metric"
        parts = [
            ("accuracy", judged, sections.accuracy),
            ("answers", "Answers", rows.answers),
            ("importance", "Importance", sections.importance),
            ("map", "Where the regions lie", sections.layer_map),
            ("theta", "θ and granularity", sections.theta),
            ("training", "Training", sections.training),
            ("labels", "Labels", sections.labels),
            ("agreement", "Agreement", agreement),
            ("cost", "Time and memory", sections.cost),
            ("optimizer", "Optimizer state", sections.optimizer),
            ("recipe", "Recipe", sections.recipe),
        ]
        contents = " ".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
        body = [f"{_header(run)}<nav>{contents}</nav>"]
        for key, title, write in parts:
            body.append(f'<section id="{key}"><h2>{title}</h2>\n{write(run, figures)}</section>')
        body.append("<footer>Written by <code>lorapar report</code>. 1 MB is 10⁶ bytes; intervals are 95 %.</footer>")
    template = read_text(Path(__file__).with_name("report.html"))
    # The page's policy lets this one script run, and none that a model's answer might smuggle in.
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {"title": escaped(f"LoRA-PAR: {model_name(run)}"), "body": "\n".join(body), "script_sha256": digest}
    page = folder / "report.html"
    write_text(page, Template(template).substitute(filled))
    return page


def _header(run: Artefacts) -> str:
    sources = run.recipe.get("data", {}).get("sources", [])
    names = [source["name"] if isinstance(source, dict) else str(source) for source in sources]
    facts = {"Model": model_name(run), "Data": ", ".join(dict.fromkeys(names)) or "not recorded"}
    if run.partition is not None:
        m = run.partition.metadata
        facts["Partition"] = (
            f"θ {m['theta']:g}, α {m['alpha']:g}, β {m['beta']:g}, {m['granularity']} granularity, "
            f"selection by {m['selection']}, seed {m['seed']}"
        )
        if "renewed" in m:
            facts["Partition"] += (
                f", System {m['renewed']['system']} scored again before {m['renewed']['stage'].upper()}"
            )
        if "system1_cost" in m:
            facts["Partition"] += f", GRPO's elements by their worth at a System-1 cost of {m['system1_cost']:g}"
    facts["Date"] = f"{run.newest.day} {run.newest:%B %Y, %H:%M} UTC"
    if run.recipe_text is not None:
        facts["Recipe"] = f"sha256 {sha256_file(run.folder / 'recipe.yaml')[:16]}"
    listed = "".join(f"<dt>{key}</dt><dd>{escaped(value)}</dd>" for key, value in facts.items())
    tiles = "".join(f"<li><b{css}>{value}</b>{label}</li>" for value, label, css in _tiles(run))
    return (
        f'<header><p class="eyebrow">LoRA-PAR run report</p><h1>{escaped(model_name(run))}</h1>'
        f'<p class="lead">{_result(run)}</p>{f"<ul class=tiles>{tiles}</ul>" if tiles else ""}'
        f'<dl class="facts">{listed}</dl></header>'
    )


def _result(run: Artefacts) -> str:
    """One sentence: what each stage did to its system, and what the second stage cost the first's."""
    if run.metrics is None:
        return "This run has not been evaluated, so there is no accuracy to report."
    by, steps = measured(run), evaluated(run)
    parts = []
    for before, after in itertools.pairwise(steps):
        key = "system1" if after == "sft" else "system2"
        old, new = by.means[before].get(key), by.means[after].get(key)
        if old is not None and new is not None:
            verb = "raised" if new > old else "lowered" if new < old else "left"
            change = f"from {by.text(old)} to {by.text(new)}" if new != old else f"at {by.text(new)}"
            parts.append(f"{after.upper()} {verb} {SYSTEMS[key][0]} {by.name} {change}")
    result = "; ".join(parts) or "No system was evaluated before and after a stage"
    cost = second_stage_cost(run)
    if cost is not None:
        key, change = cost
        name = SYSTEMS[key][0]
        verb = "cost" if change < 0 else "gave"
        result += f" and {verb} {name} {by.change(change)}" if change else f" and left {name} as it was"
    return escaped(result + ".")


def _tiles(run: Artefacts) -> list[tuple[str, str, str]]:
    tiles = []
    if run.metrics is not None:
        by, last = measured(run), evaluated(run)[-1]
        for key in ("system1", "system2"):
            value = by.means[last].get(key)
            if value is not None:
                css = ' class="s1"' if key == "system1" else ' class="s2"'
                tiles.append((by.text(value), f"{SYSTEMS[key][0]} {escaped(by.name)}, {TITLES[last]}", css))
    if run.partition is not None:
        active = active_counts(run)
        total = run.partition.trainable()
        tiles += [(percent(active[s] / total), f"of LoRA elements active in {s.upper()}", "") for s in ("sft", "grpo")]
    if run.metrics is not None and run.metrics.get("seconds"):
        tiles.append((duration(sum(run.metrics["seconds"].values())), "all stages together", ""))
    return tiles
