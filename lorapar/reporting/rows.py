"""The report's section on single rows: where the last stage helped and hurt, and every held-out answer to read.

The counts are of all rows. The list below them holds at most ROWS_SHOWN rows and LETTERS_SHOWN letters of a text, and
says what it leaves out. It is plain `<details>` and needs no script; the one in report.html only filters it.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..intervals import bootstrap, mcnemar
from .agreement import question
from .artefacts import Artefacts
from .charts import Figures
from .html import absent, escaped, html_table, number, signed_points
from .sections import SYSTEMS, TITLES

ROWS_SHOWN = 1000
LETTERS_SHOWN = 2000
ROWS_PRINTED = 10  # of each way in which a row can change
# Answers of a row that are all as short as this stand in its headline.
SHORT_ANSWER = 24
CUT = '<small class="cut">'

# What became of a row between two models: its key, its sign and its name, in the order of the list of rows.
CHANGES = {
    "hurt": ("▼", "hurt"),
    "helped": ("▲", "helped"),
    "wrong": ("✗", "still wrong"),
    "right": ("✓", "still right"),
    "none": ("–", "not judged"),
}
CHANGES_OF_A_METRIC = {
    "hurt": ("▼", "worse"),
    "helped": ("▲", "better"),
    "equal": ("=", "equal"),
    "none": ("–", "no value"),
}
# The order of the table and of its bars: from right before and after to wrong before and after.
TABLE = ("right", "equal", "helped", "hurt", "wrong")


@dataclass
class Answered:
    """A held-out row and what each model said to it."""

    system: int | None
    prompt: str | list[dict[str, Any]] | None
    reference: Any
    completions: dict[str, str]  # by model, in the order in which they ran
    values: dict[str, float | None]  # 1 or 0 for right or wrong, or what the metric gave


@dataclass
class Judged:
    """How the rows were judged, in words."""

    is_share: bool

    def change(self, row: Answered, before: str, after: str) -> str:
        old, new = row.values[before], row.values[after]
        if old is None or new is None:
            return "none"
        if old != new:
            return "helped" if new > old else "hurt"
        return ("right" if new else "wrong") if self.is_share else "equal"

    @property
    def changes(self) -> dict[str, tuple[str, str]]:
        return CHANGES if self.is_share else CHANGES_OF_A_METRIC

    @property
    def tabled(self) -> list[str]:
        return [change for change in TABLE if change in self.changes]

    def mark(self, value: float | None) -> str:
        """A value as HTML: said by a sign and a word, not by colour alone."""
        if value is None:
            return f'<span class="mark">{" ".join(self.changes["none"])}</span>'
        if not self.is_share:
            return f'<span class="mark">{value:.4g}</span>'
        return '<span class="mark good">✓ right</span>' if value else '<span class="mark bad">✗ wrong</span>'


def answers(run: Artefacts, figures: Figures) -> str:
    if run.answers is None:
        return absent("answers.jsonl", "evaluate")
    rows, judged = joined(run), Judged("correct" in run.answers[0])
    models = list(rows[0].values)
    if len(models) < 2:
        return '<p class="absent">answers.jsonl holds the answers of one model, so there is nothing to compare.</p>'
    *_, before, after = models
    parts = [_changed(rows, judged, before, after, f"What {after.upper()} changed")]
    if len(models) > 2:
        parts.append(_changed(rows, judged, "base", after, f"From the base to the end, {_stages(models[1:])}"))
    parts.append(_how_sure(judged))
    if run.texts:
        parts.append(_list(rows, judged, models))
    else:
        parts.append('<p class="absent">The rows themselves were left out of this page.</p>')
    return "".join(parts)


def joined(run: Artefacts) -> list[Answered]:
    """The rows of answers.jsonl by row, each with its prompt from labels.jsonl (None where the labels lack its id).

    Raises InputError, naming the file, where a line lacks what it must have or the models answered different rows.
    """
    path, said = run.folder / "answers.jsonl", run.answers or []
    value = "correct" if "correct" in said[0] else "value"
    by_model: dict[str, list[dict[str, Any]]] = {}
    for line, answer in enumerate(said, start=1):
        lacking = [key for key in ("model", "id", "completion", value) if key not in answer]
        if lacking:
            raise InputError(f"{path}: line {line} lacks {', '.join(lacking)}")
        by_model.setdefault(str(answer["model"]), []).append(answer)
    ids = {name: [answer["id"] for answer in answers] for name, answers in by_model.items()}
    first = next(iter(ids))
    for name in ids:
        if ids[name] != ids[first]:
            raise InputError(f"{path}: {name} answered other rows than {first}, or in another order")
    # Rows that share an id keep their order in both files.
    labelled: dict[Any, deque[dict[str, Any]]] = defaultdict(deque)
    for row in run.labels or []:
        if row.get("split") == "held_out":
            labelled[row.get("id")].append(row)
    rows = []
    for of_row in zip(*by_model.values()):
        label = labelled[of_row[0]["id"]].popleft() if labelled[of_row[0]["id"]] else {}
        reference = of_row[0].get("answer")
        rows.append(
            Answered(
                system=of_row[0].get("system"),
                prompt=label.get("prompt"),
                reference=label.get("completion") if reference is None else reference,
                completions={name: str(answer["completion"]) for name, answer in zip(by_model, of_row)},
                values={name: _value(answer[value]) for name, answer in zip(by_model, of_row)},
            )
        )
    return rows


def _value(value: Any) -> float | None:
    """None also for NaN, which is neither better nor worse than anything."""
    return None if value is None or math.isnan(value) else float(value)


def _stages(names: Sequence[str]) -> str:
    return " and ".join(name.upper() for name in names)


def _changed(rows: list[Answered], judged: Judged, before: str, after: str, title: str) -> str:
    """How many rows went which way between two models, by system."""
    table, counts, n = [], Counter(), 0
    for key, (name, _) in SYSTEMS.items():
        of_group = [row for row in rows if key == "all" or row.system == int(key[-1])]
        counts = Counter(judged.change(row, before, after) for row in of_group)
        n = len(of_group) - counts["none"]
        if not n:
            continue
        css = {"system1": ' class="s1"', "system2": ' class="s2"'}.get(key, "")
        cells = [f"<th{css}>{name}</th><td>{number(n)}</td>"]
        cells += [f'<td class="{change}">{number(counts[change])}</td>' for change in judged.tabled]
        if judged.is_share:
            cells.append(f"<td>{signed_points((counts['helped'] - counts['hurt']) / n)}</td>")
            cells.append(f"<td>{_p(mcnemar(counts['helped'], counts['hurt']))}</td>")
        else:
            moved = [
                new - old
                for row in of_group
                if (old := row.values[before]) is not None and (new := row.values[after]) is not None
            ]
            low, high = bootstrap(moved)
            cells.append(f"<td>{_signed(sum(moved) / n)}</td><td>{_signed(low)} to {_signed(high)}</td>")
        cells.append(f'<td class="drawn">{_bar(counts, judged, n)}</td>')
        table.append("".join(cells))
    if not table:
        return f'<h3>{title}</h3><p class="absent">No row has a value from both models.</p>'
    # The last group is of all rows.
    helped, hurt = number(counts["helped"]), number(counts["hurt"])
    if judged.is_share:
        told = (
            f"Of {number(n)} held-out rows, <b>{helped}</b> went from wrong to right (helped) and <b>{hurt}</b> from "
            "right to wrong (hurt)"
        )
        figures = ["change, points", "p"]
    else:
        told = f"Of {number(n)} held-out rows, <b>{helped}</b> got better and <b>{hurt}</b> worse"
        figures = ["mean change", "95 % interval"]
    heads = ["", "rows", *(judged.changes[change][1] for change in judged.tabled), *figures, "the counts drawn"]
    return f"<h3>{title}</h3><p>{told}, {TITLES[before]} against {TITLES[after]}.</p>" + html_table(heads, table)


def _how_sure(judged: Judged) -> str:
    if not judged.is_share:
        return (
            '<p class="muted">Each row is compared with itself. The interval is the percentile bootstrap’s of the mean '
            "difference; it speaks of more rows like these, not of what another seed would give.</p>"
        )
    return (
        '<p class="muted">p is of McNemar’s exact test: '
        "the chance of a split of the changed rows at least as uneven if either way were equally likely. It speaks of "
        "more rows like these, not of what another seed would give, and no correction is made for the several "
        "lines.</p>"
    )


def _p(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _bar(counts: Counter, judged: Judged, n: int) -> str:
    """The counts as one bar, which says nothing that the numbers beside it do not."""
    parts = "".join(
        f'<i class="{change}" style="width:{100 * counts[change] / n:.2f}%"></i>'
        for change in judged.tabled
        if counts[change]
    )
    return f'<span class="bar" aria-hidden="true">{parts}</span>'


def _list(rows: list[Answered], judged: Judged, models: list[str]) -> str:
    *_, before, after = models
    change = [judged.change(row, before, after) for row in rows]
    shown = chosen(change)
    order = list(judged.changes)
    shown.sort(key=lambda place: order.index(change[place]))
    counts = Counter(change[place] for place in shown)
    printed: Counter = Counter()
    items = []
    for place in shown:
        kind = change[place]
        printed[kind] += 1
        on_paper = kind in ("hurt", "helped") and printed[kind] <= ROWS_PRINTED
        items.append(_row(rows[place], judged, kind, on_paper))
    said = []
    if len(shown) < len(rows):
        every = counts["hurt"] + counts["helped"] == sum(kind in ("hurt", "helped") for kind in change)
        which = "all that changed and an even spread of the others" if every else "an even spread of those that changed"
        said.append(f"Shown: {number(len(shown))} of {number(len(rows))} rows ({which}).")
    if any(CUT in item for item in items):
        said.append(f"Texts of more than {number(LETTERS_SHOWN)} letters are cut in the middle.")
    if said:
        said.append("<code>answers.jsonl</code> holds everything.")
    on_paper = " and ".join(
        f"{min(ROWS_PRINTED, counts[kind])} of {number(counts[kind])} that were {judged.changes[kind][1]}"
        for kind in ("hurt", "helped")
    )
    return (
        "<h3>The rows</h3>"
        f'<p class="screen">Open a row to read its answers in full; the mark at its left is what {after.upper()} '
        f"changed. {' '.join(said)}</p>"
        f'<p class="paper">On paper: {on_paper}. The page on a screen has the others.</p>'
        + _tools(judged, counts, Counter(rows[place].system for place in shown))
        + f'<div class="rows">{"".join(items)}</div><button type="button" id="row-more" hidden>more</button>'
    )


def chosen(changes: Sequence[str]) -> list[int]:
    """The places of at most ROWS_SHOWN rows, in order: those that changed, and as many of the others as fit.

    Evenly spread where not all fit, since the rows of one source, and so of one system, lie together.
    """
    changed = [place for place, change in enumerate(changes) if change in ("hurt", "helped")]
    others = [place for place, change in enumerate(changes) if change not in ("hurt", "helped")]
    changed = _spread(changed, ROWS_SHOWN)
    return sorted(changed + _spread(others, ROWS_SHOWN - len(changed)))


def _spread(places: list[int], count: int) -> list[int]:
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def _tools(judged: Judged, counts: Counter, systems: Counter) -> str:
    """The search box and the filters, which the script brings to life and shows."""
    kinds = {change: f"{sign} {name}" for change, (sign, name) in judged.changes.items() if counts[change]}
    both = {str(system): f"System {system}" for system in (1, 2) if systems[system]}
    groups = [_buttons("change", "Show rows by what changed", {"all": "all", **kinds})]
    if len(both) == 2:
        groups.append(_buttons("system", "Show rows by system", {"all": "both systems", **both}))
    return (
        '<div id="row-tools" role="search" aria-label="Held-out rows" hidden>'
        '<label for="row-search">Search prompts and answers</label><input type="search" id="row-search" '
        f'autocomplete="off" spellcheck="false">{"".join(groups)}'
        '<p class="found"><span role="status" id="row-count"></span> '
        '<button type="button" id="row-open">open all</button></p></div>'
    )


def _buttons(key: str, label: str, values: dict[str, str]) -> str:
    buttons = "".join(
        f'<button type="button" data-key="{key}" data-value="{value}" aria-pressed="false">{text} '
        '<span class="count"></span></button>'
        for value, text in values.items()
    )
    return f'<div role="group" aria-label="{label}">{buttons}</div>'


def _row(row: Answered, judged: Judged, change: str, on_paper: bool) -> str:
    sign, name = judged.changes[change]
    reference = "" if row.reference is None else _plain(row.reference)
    short = all(len(_line(text)) <= SHORT_ANSWER for text in (reference, *row.completions.values()))
    marks, answers = "", ""
    if short and reference:
        marks = f'<span>reference <bdi class="said">{escaped(_line(reference))}</bdi></span>'
    for model, text in row.completions.items():
        title, mark = TITLES.get(model, escaped(model)), judged.mark(row.values[model])
        said = f' <bdi class="said">{escaped(_line(text))}</bdi>' if short else ""
        marks += f"<span>{title} {mark}{said}</span>"
        answers += _text(f"{title} {mark}", text)
    excerpt = "(labels.jsonl lacks this row)" if row.prompt is None else question(row.prompt)
    system = f'<span class="s{row.system}">System&nbsp;{row.system}</span>' if row.system in (1, 2) else ""
    # A prompt that the headline shows whole is not said twice.
    given = [] if row.prompt == excerpt else _given(row.prompt)
    given += [("reference", reference)] if reference else []
    css = "row" + " paper" * on_paper + " short" * short
    return (
        f'<details class="{css}" data-change="{change}" data-system="{row.system}">'
        f'<summary><span class="change {change}">{sign} {name}</span><bdi class="asked t">{escaped(excerpt)}</bdi>'
        f'<span class="marks">{system}{marks}</span></summary>'
        f"{''.join(_text(escaped(title), text) for title, text in given)}"
        f'<div class="models">{answers}</div></details>\n'
    )


def _given(prompt: str | list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    """(who speaks, what) of a prompt."""
    if isinstance(prompt, list):
        return [(f"prompt, {message.get('role', 'message')}", _plain(message.get("content"))) for message in prompt]
    return [] if prompt is None else [("prompt", prompt)]


def _plain(value: Any) -> str:
    """The text of a reference: a text itself, messages, or several of either."""
    if isinstance(value, list):
        return "\n".join(_plain(part["content"] if isinstance(part, dict) else part) for part in value)
    return "" if value is None else str(value)


def _line(text: str) -> str:
    return " ".join(text.split())


def _text(title: str, text: str) -> str:
    """A text with its title, which is HTML; each has the direction of its own script."""
    if len(text) > LETTERS_SHOWN:
        half = LETTERS_SHOWN // 2
        left = f"{CUT}{number(len(text) - 2 * half)} letters left out</small>"
        body = f"{escaped(text[:half])}{left}{escaped(text[-half:])}"
    else:
        body = escaped(text) if text.strip() else '<small class="none">empty</small>'
    return f'<div class="text"><h4>{title}</h4><div class="t" dir="auto">{body}</div></div>'
