"""The report's section of benchmarks: what lm-evaluation-harness has measured of the base and of each stage."""

from typing import Any

from .artefacts import Artefacts, evaluated
from .charts import Figures
from .html import escaped, html_table, number
from .sections import TITLES


def benchmarks(run: Artefacts, figures: Figures) -> str:
    """A row for each task and metric; of a group that has figures of its own, those alone."""
    del figures  # a table says it all
    assert run.metrics is not None
    tasks, steps = run.metrics["tasks"], evaluated(run)
    parts = _parts(tasks)
    rows = []
    for name, facts in tasks.items():
        if name in parts:
            continue
        for key in facts["base"]:
            metric, _, filtered = key.partition(",")
            better = {True: " ↑", False: " ↓"}.get(facts["higher_is_better"].get(metric), "")
            cells = [f"<th>{escaped(name)}</th><td>{_documents(facts)}</td>",
                     f"<td>{escaped(metric)}{better}<small>{escaped(filtered.removeprefix('none'))}</small></td>",
                     *(f"<td>{_figure(facts.get(step, {}).get(key, {}))}</td>" for step in steps)]  # fmt: skip
            rows.append("".join(cells))
    hidden = f" The {number(len(parts))} parts of the groups are in <code>metrics.json</code>." if parts else ""
    version = escaped(next(iter(tasks.values()))["lm_eval"])
    summary = (
        f"<p>Measured by lm-evaluation-harness {version} on the base and after each stage; ± is one standard error, "
        f"↑ and ↓ say which way is better.{hidden}</p>"
    )
    return html_table(["task", "documents", "metric", *(TITLES[step] for step in steps)], rows) + summary


def _parts(tasks: dict[str, Any]) -> set[str]:
    """The tasks that are part of a group with figures of its own."""
    inside, groups = set(), [facts["subtasks"] for facts in tasks.values() if facts["base"] and "subtasks" in facts]
    while groups:
        for part in groups.pop():
            inside.add(part)
            groups += [tasks[part]["subtasks"]] if "subtasks" in tasks.get(part, {}) else []
    return inside


def _documents(facts: dict[str, Any]) -> str:
    """How many documents were asked, and how; a group does not say how many there are."""
    n, of, shots = (None if facts[key] is None else int(facts[key]) for key in ("n", "of", "shots"))
    how = [f"of {number(of)}"] if n is not None and of is not None and of > n else []
    how += [] if shots is None else [f"{shots}-shot"]
    how += ["chat"] if facts["chat"] else []
    return ("–" if n is None else number(n)) + f"<small>{', '.join(how)}</small>"


def _figure(figure: dict[str, Any]) -> str:
    if figure.get("value") is None:
        return "–"
    error = figure.get("stderr")
    return f"{figure['value']:.4g}" + (f"<small>± {error:.2g}</small>" if error is not None else "")
