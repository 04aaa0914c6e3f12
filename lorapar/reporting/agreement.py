"""The report's section on how far the voters agree: κ, pairs, each voter and the majority, the rows they split on."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..labeling.agreement import Agreement, measure
from . import charts
from .artefacts import Artefacts, vote_weights
from .charts import Figures
from .html import absent, duration, escaped, html_table, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLIT_SHOWN = 20
LETTERS_SHOWN = 160
# Landis and Koch's words (Biometrics 1977) for κ up to each bound.
WORDS = (
    (0.0, "poor"),
    (0.2, "slight"),
    (0.4, "fair"),
    (0.6, "moderate"),
    (0.8, "substantial"),
    (1.0, "almost perfect"),
)


def agreement(run: Artefacts, figures: Figures) -> str:
    if run.labels is None:
        return absent("labels.jsonl", "label")
    # Rows left out at a tie were voted on like the others.
    rows = [*run.labels, *run.dropped]
    votes: list[dict[str, int | None]] = [row.get("votes") or {} for row in rows]
    weights = vote_weights(run)
    measured = measure(votes, weights)
    if len(measured.voters) < 2:
        return "<p>There are fewer than two voters, so there is no agreement to measure.</p>"
    panels = [_pairs_panel(measured), _majority_panel(measured)]
    caption = (
        "Left: the share of their common rows on which two voters cast the same vote; stronger colour means more. "
        "Right: how often a voter's vote was the majority's, over rows that have a majority."
    )
    if weights:
        caption += " The majority is by the recipe's weights, as it is for the labels."
    figure, summary = figures.draw("agreement", panels, caption), _summary(measured, len(votes), bool(weights))
    return figure + summary + _confusion(measured) + _usage(run) + _split(run, rows, measured, bool(weights))


def _summary(measured: Agreement, rows: int, weighted: bool) -> str:
    split = f"{number(len(measured.split))} of {number(rows)} rows ({percent(len(measured.split) / max(1, rows))})"
    if measured.kappa is None:
        kappa = "Fleiss' κ is not defined here: no row has two votes, or every vote is for one system."
    else:
        word = next(word for bound, word in WORDS if measured.kappa <= bound)
        kappa = f"Fleiss' κ is <b>{measured.kappa:.3f}</b> ({word}): agreement beyond chance, 1 at most."
    alike = " κ counts every vote alike, whatever its weight." if weighted else ""
    return f"<p>{kappa}{alike} The voters split on {split}.</p>"


def _short(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _pairs_panel(measured: Agreement) -> charts.Panel:
    names = measured.voters
    shares = np.full((len(names), len(names)), np.nan)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            share = measured.pair(one, other) if i != j else None
            shares[i, j] = np.nan if share is None else share

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for (i, j), share in np.ndenumerate(shares):
            if j >= i:
                continue
            if np.isnan(share):
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=charts.MUTED)
                continue
            # Two voters that toss coins agree on half of the rows, which is drawn in the page's own colour.
            strength = 0.85 * max(0.0, 2 * share - 1)
            axes.add_patch(
                Rectangle((j + 0.02, i + 0.03), 0.96, 0.94, color=charts.SHARED, alpha=strength, linewidth=0)
            )
            axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5)
        axes.set_xlim(0, len(names) - 1)
        axes.set_ylim(len(names), 1)
        axes.set_xticks([j + 0.5 for j in range(len(names) - 1)], [_short(n, 9) for n in names[:-1]], color=charts.INK)
        axes.set_yticks([i + 0.5 for i in range(1, len(names))], [_short(n) for n in names[1:]], color=charts.INK)
        axes.tick_params(length=0, pad=3)
        for side in axes.spines.values():
            side.set_visible(False)

    shares_text = "; ".join(
        f"{a} and {b} {100 * share:.0f} %" for a, b in measured.pairs if (share := measured.pair(a, b)) is not None
    )
    left = 0.2 + 0.068 * max(len(_short(name)) for name in names[1:])
    width = left + 0.15 + max(1.2, 0.62 * (len(names) - 1))
    return charts.Panel("Same vote, by pairs, %", f"Share of rows with the same vote: {shares_text}.", draw,
                        width=width, height=0.5 + 0.24 * len(names), margins=(left, 0.15, 0.22, 0.36))  # fmt: skip


def _majority_panel(measured: Agreement) -> charts.Panel:
    shares = [measured.with_majority(name) for name in measured.voters]
    values = [100 * (share or 0.0) for share in shares]
    texts = ["no votes" if share is None else f"{100 * share:.1f} %" for share in shares]
    alt = "; ".join(f"{name} {text}" for name, text in zip(measured.voters, texts))
    return charts.bars_panel("Votes equal to the majority", charts.SHARED, [_short(name) for name in measured.voters],
                             values, texts, f"Votes equal to the majority: {alt}.")  # fmt: skip


def _confusion(measured: Agreement) -> str:
    rows = []
    for voter in measured.voters:
        cells = [measured.confusion[voter, system][vote] for system in (1, 2) for vote in (1, 2, None)]
        share = measured.with_majority(voter)
        rows.append(f"<th>{escaped(voter)}</th>" + "".join(f"<td>{number(cell)}</td>" for cell in cells)
                    + f"<td>{'–' if share is None else percent(share)}</td>")  # fmt: skip
    heads = ["voter", *(f"majority System {system}: voted {vote}" for system in (1, 2) for vote in ("1", "2", "none")),
             "with the majority"]  # fmt: skip
    return html_table(heads, rows)


def _usage(run: Artefacts) -> str:
    """Calls, time, tokens and cost of each teacher's votes, where teachers were asked."""
    if not run.votes:
        return ""
    teachers: dict[str, list[dict[str, Any]]] = {}
    for row in run.votes:
        for name, vote in row["votes"].items():
            teachers.setdefault(name, []).append(vote)
    rows = []
    for name, votes in teachers.items():
        outcomes = Counter(vote["outcome"] for vote in votes)
        times = sorted(vote["latency"] for vote in votes if vote.get("latency"))
        cells = [number(outcomes["answered"]), _others(outcomes), number(_sum(votes, "calls")),
                 duration(times[len(times) // 2]) if times else "–",
                 number(_sum(votes, "tokens_in")), number(_sum(votes, "tokens_out")),
                 f"{_sum(votes, 'cost'):.4g}" if _sum(votes, "cost") else "–"]  # fmt: skip
        rows.append(f"<th>{escaped(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells))
    heads = ["teacher", "votes", "no vote", "calls", "median latency", "tokens in", "tokens out", "cost"]
    return html_table(heads, rows)


def _others(outcomes: Counter) -> str:
    names = {"not_asked": "not asked", "too_long": "too long", "both": "named both"}
    lines = [f"<small>{number(n)} {names.get(outcome, outcome)}</small>" for outcome, n in outcomes.most_common()
            if outcome != "answered"]  # fmt: skip
    return number(outcomes.total() - outcomes["answered"]) + "".join(lines)


def _sum(votes: Sequence[dict[str, Any]], key: str) -> float:
    return sum(vote.get(key) or 0 for vote in votes)


def _split(run: Artefacts, rows: list[dict], measured: Agreement, weighted: bool) -> str:
    if not measured.split:
        return "<p>On no row do two votes differ.</p>"
    if not run.texts:
        return '<p class="absent">The rows that they split on were left out of this page.</p>'
    # The closest first; equally close ones in the order of the data.
    places = sorted(measured.split, key=lambda place: float(rows[place].get("agreement") or 0.0))
    shown = []
    for place in places[:SPLIT_SHOWN]:
        row = rows[place]
        one, two = (", ".join(escaped(_short(name)) for name, vote in row["votes"].items() if vote == side)
                    for side in (1, 2))  # fmt: skip
        share = f"{100 * float(row.get('agreement') or 0):.0f} % {'by weight' if weighted else 'of votes'}"
        by = {"person": "a person", "tie": "rule for ties"}.get(row.get("decided_by", ""), share)
        label = f"System&nbsp;{row['system']}" if row.get("system") else "dropped"
        shown.append(f'<td class="text">{escaped(question(row.get("prompt", "")))}</td><td class="text s1">{one}</td>'
                     f'<td class="text s2">{two}</td><td>{label}</td><td>{by}</td>')  # fmt: skip
    heads = ["row", "voted System 1", "voted System 2", "label", "decided by"]
    which = f"the {SPLIT_SHOWN} closest of {number(len(places))}" if len(places) > SPLIT_SHOWN else "all of them"
    return (f"<h3>Rows that they split on</h3><p>Shown: {which}. <code>lorapar label --review</code> writes all of "
            f"them to a file for a person to correct.</p>{html_table(heads, shown)}")  # fmt: skip


def question(prompt: str | list[dict[str, Any]]) -> str:
    """The start of a prompt's text, or of its last message, on one line."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    text = " ".join(text.split())
    return text if len(text) <= LETTERS_SHOWN else f"{text[: LETTERS_SHOWN - 1]}…"
