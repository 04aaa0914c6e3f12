"""The report's pictures: figures, what each panel draws, and how a panel becomes inline SVG and PNG.

A figure is a row of panels with fixed margins. The page shows each panel as an SVG of its own, so that a narrow screen
stacks them at the same text size; the PNG has them side by side. Colours in the SVG become CSS variables, so that one
drawing serves the light and the dark scheme. matplotlib is imported only where something is drawn.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours for System 1, System 2 and shared, which stay apart for colour-blind readers; System 2's is a
# shade darker than theirs, so that white text on it can be read.
PAGE, INK, MUTED, RULE = "#ffffff", "#1b1f24", "#68707a", "#d8dce1"
S1, S2, SHARED, INACTIVE = "#0072b2", "#c25500", "#009e73", "#949ba3"
REGION_COLOURS = (INACTIVE, S1, S2, SHARED)
CSS_NAMES = {
    PAGE: "page", INK: "ink", MUTED: "muted", RULE: "rule",
    S1: "s1", S2: "s2", SHARED: "shared", INACTIVE: "inactive",
}  # fmt: skip

FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
# The opacity of a map's highest cell: more, and the number in it would have too little contrast in one scheme.
STRONGEST = 0.55
# One inch of a drawing on the page: 8 pt text is then about 11 px, on a desktop and on a phone alike.
PIXELS_PER_INCH = 102
PNG_DPI = 200


@dataclass
class Panel:
    """One pair of axes: its title, what it says in words, its size in inches, and what draws it."""

    title: str
    alt: str
    draw: Callable[["Axes"], None]
    width: float = 3.3
    height: float = 2.5
    margins: tuple[float, float, float, float] = (0.5, 0.18, 0.42, 0.36)  # left, right, bottom, top


class Figures:
    """Draws the page's figures, numbered from 1, and keeps each as a PNG in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.drawn = folder, 0

    def draw(self, name: str, panels: Sequence[Panel], caption: str, columns: int = 3) -> str:
        """Write `<name>.png` and return the same panels as an HTML figure; `caption` is HTML."""
        png(panels, self.folder / f"{name}.png", columns)
        self.drawn += 1
        pictures = "\n".join(svg(panel, f"{name}{i}") for i, panel in enumerate(panels))
        return (
            f'<figure id="fig-{name}"><div class="panels">{pictures}</div>'
            f"<figcaption><b>Figure {self.drawn}.</b> {caption}</figcaption></figure>"
        )


def svg(panel: Panel, prefix: str) -> str:
    """The panel as an `<svg>` element for HTML, its ids under `prefix` and its colours as CSS variables."""
    buffer = io.StringIO()
    _save([panel], 1, buffer, format="svg", dpi=240)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    for colour, name in CSS_NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    # A width in pixels that the page's style may lower; the viewBox, which follows, keeps the proportions.
    width = panel.width * PIXELS_PER_INCH
    head = f'<svg role="img" aria-label="{_attribute(panel.alt)}" style="width:{width:.0f}px"'
    return re.sub(r'^<svg width="[\d.]+pt" height="[\d.]+pt"', lambda _: head, text)


def png(panels: Sequence[Panel], path: Path, columns: int) -> None:
    """The panels in one picture, `columns` to a row."""
    with open(path, "wb") as file:
        _save(panels, columns, file, format="png", dpi=PNG_DPI)


def _save(panels: Sequence[Panel], columns: int, target: Any, **options: Any) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    style: dict[Any, Any] = {
        "font.family": [font for font in FONTS if font in installed],
        "font.size": 8, "text.color": INK, "svg.fonttype": "none", "svg.hashsalt": "lorapar",
        "text.parse_math": False,
        "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.labelsize": 8, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "xtick.major.size": 2.5, "ytick.major.size": 0,
        "grid.color": RULE, "grid.linewidth": 0.6, "lines.solid_capstyle": "round",
    }  # fmt: skip
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(sum(panel.width for panel in row) for row in rows)
    height = sum(max(panel.height for panel in row) for row in rows)
    with matplotlib.rc_context(style):
        # The page shows through an SVG; a PNG may be shown on any background, so it has its own.
        figure = Figure(figsize=(width, height), facecolor="none" if options["format"] == "svg" else PAGE)
        top = height
        for row in rows:
            left = 0.0
            for panel in row:
                start, end, bottom, upper = panel.margins
                inner = panel.width - start - end, panel.height - bottom - upper
                at = (left + start, top - panel.height + bottom, *inner)
                axes = figure.add_axes((at[0] / width, at[1] / height, at[2] / width, at[3] / height))
                axes.patch.set_alpha(0)
                title: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "va": "top", "ha": "left"}
                figure.text((left + 0.04) / width, (top - 0.08) / height, panel.title, **title)
                panel.draw(axes)
                left += panel.width
            top -= max(panel.height for panel in row)
        figure.savefig(target, **options)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def accuracy_panel(
    title: str,
    colour: str,
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    span: tuple[float, float],
    n: int | None,
    metric: str | None = None,
) -> Panel:
    """Bars with their intervals, one for the base and for each stage: accuracy in %, or the means of `metric`.

    span: the panels' common lower and upper end, in the unit drawn.
    """
    scale = 100 if metric is None else 1
    places = ".1f" if metric is None else ".4g"
    over = 0.02 * (span[1] - span[0])

    def draw(axes: "Axes") -> None:
        for i, (value, interval) in enumerate(zip(values, intervals)):
            strength = 0.35 + 0.65 * i / max(1, len(values) - 1)
            # The grid must not show through the weaker bars.
            axes.bar(i, scale * value, width=0.62, color=PAGE, linewidth=0)
            axes.bar(i, scale * value, width=0.62, color=colour, alpha=strength, linewidth=0)
            end = value
            if interval is not None:
                axes.vlines(i, scale * interval[0], scale * interval[1], color=INK, linewidth=1.1)
                end = interval[1]
            place = max(0.0, scale * end) + over
            axes.text(i, place, f"{scale * value:{places}}", ha="center", va="bottom", fontweight="bold")
        axes.set_xticks(range(len(values)), labels, color=INK)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_ylim(*span)
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
        axes.spines["left"].set_visible(False)

    unit, what, axis = (" %", "Accuracy", "% right") if metric is None else ("", f"Mean {metric}", metric)
    bars = "; ".join(f"{label} {scale * value:{places}}{unit}" for label, value in zip(labels, values))
    rows = "" if n is None else f" (n = {n})"
    return Panel(f"{title}{rows}, {axis}", f"{what} on {title}{rows}: {bars}.", draw, height=2.3,
                 margins=(0.42, 0.18, 0.26, 0.36))  # fmt: skip


def scatter_panel(
    scores_1: np.ndarray,
    scores_2: np.ndarray,
    regions: np.ndarray | None,
    limits: tuple[float, float],
    labels: Sequence[str],
    thresholds: tuple[float, float] | None,
    alt: str,
) -> Panel:
    """I under System 1 (x) against System 2 (y), log-log; `labels` name the four regions in their corners."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        colours = INACTIVE if regions is None else np.array(REGION_COLOURS)[regions]
        # As vectors, 20,000 points would weigh megabytes.
        axes.scatter(scores_1, scores_2, s=2.2, c=colours, alpha=0.55, linewidths=0, rasterized=True)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=7))
            axis.set_major_formatter(lambda value, _: "10" + _superscript(round(np.log10(value))))
            axis.set_minor_locator(NullLocator())
        axes.grid(visible=True)
        axes.set_aspect("equal")
        axes.set_xlabel("importance I under System 1")
        axes.set_ylabel("importance I under System 2")
        if thresholds is not None:
            axes.axvline(thresholds[0], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.axhline(thresholds[1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        corners = ((0.02, 0.02), (0.98, 0.02), (0.02, 0.98), (0.98, 0.98))
        for label, colour, (x, y) in zip(labels, REGION_COLOURS, corners):
            colour = MUTED if colour == INACTIVE else colour
            place: dict[str, Any] = {
                "ha": "left" if x < 0.5 else "right",
                "va": "bottom" if y < 0.5 else "top",
                # A threshold may run behind the name.
                "bbox": {"facecolor": PAGE, "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            }
            axes.text(x, y, label, transform=axes.transAxes, color=colour, fontweight="bold", **place)

    return Panel("", alt, draw, width=4.2, height=4.0, margins=(0.52, 0.1, 0.42, 0.1))


def heat_panel(
    title: str, colour: str, layers: Sequence[str], modules: Sequence[str], shares: np.ndarray, alt: str
) -> Panel:
    """Shares (layers x modules, NaN where a layer lacks a module) as cells from 0 to the panel's own highest."""
    cell = 0.165 if len(layers) <= 48 else 0.09

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        highest = np.nanmax(shares) or 1.0
        for (i, j), share in np.ndenumerate(shares):
            if np.isnan(share):
                continue
            # Opacity, not a colour map: the lowest share is then the page itself, in either scheme.
            axes.add_patch(Rectangle((j, i), 0.96, 0.94, color=colour, alpha=STRONGEST * share / highest, linewidth=0))
            if len(layers) <= 48:
                axes.text(j + 0.48, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.3)
        axes.set_xlim(0, len(modules))
        axes.set_ylim(len(layers), 0)
        axes.set_xticks([j + 0.48 for j in range(len(modules))], modules, fontsize=7, color=INK)
        axes.xaxis.tick_top()
        step = 1 if len(layers) <= 12 else 5
        shown = range(0, len(layers), step)
        axes.set_yticks([i + 0.5 for i in shown], [layers[i] for i in shown])
        axes.tick_params(length=0, pad=2)
        for side in axes.spines.values():
            side.set_visible(False)

    width = 0.34 + max(2.1, 0.34 * len(modules))
    return Panel(title, alt, draw, width=width, height=cell * len(layers) + 0.52, margins=(0.28, 0.06, 0.04, 0.48))


def theta_panel(
    thetas: np.ndarray, shares: dict[int, np.ndarray], theta: float | None, chosen: dict[int, float], alt: str
) -> Panel:
    """The share of elements that holds θ of the score, for both systems, with the chosen θ marked."""

    def draw(axes: "Axes") -> None:
        # The two often all but coincide: the wider one shows on both sides of the other.
        for system, colour, width in ((1, S1, 3.4), (2, S2, 1.4)):
            axes.plot(thetas, 100 * shares[system], color=colour, linewidth=width)
        if theta is not None:
            axes.axvline(theta, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.text(theta - 0.02, 97, f"θ = {theta:g}", ha="right", va="top")
        for line, (system, colour) in enumerate(((1, S1), (2, S2))):
            label = f"System {system}"
            if theta is not None and system in chosen:
                label += f"\u2002{100 * chosen[system]:.1f} %"
                axes.plot(theta, 100 * chosen[system], "o", color=colour, markersize=4)
            x = 0.5 if theta is None else theta - 0.02
            axes.text(x, 86 - 10 * line, label, color=colour, fontweight="bold", ha="right", va="top")
        _percent_axes(axes)
        axes.set_xlim(0, 1)
        axes.set_xlabel("θ, share of the score to be kept")

    return Panel("Elements needed to keep θ of the score, %", alt, draw)


def granularity_panel(system: int, curves: dict[str, tuple[np.ndarray, np.ndarray]], share: float | None,
                      kept: dict[str, float], alt: str) -> Panel:  # fmt: skip
    """Score kept against share of elements active, for each granularity, with the run's own share marked."""
    colour = S1 if system == 1 else S2
    lines = {"element": "-", "tile": (0, (5, 2)), "rank": (0, (1.2, 1.6))}

    def draw(axes: "Axes") -> None:
        if share is not None:
            axes.axvline(100 * share, color=RULE, linewidth=1.2)
        for row, (name, (active, score)) in enumerate(curves.items()):
            axes.plot(100 * active, 100 * score, color=colour, linewidth=1.6, linestyle=lines[name])
            y = 32 - 10 * row
            axes.plot([47, 58], [y, y], color=colour, linewidth=1.6, linestyle=lines[name])
            label = name if share is None else f"{name}\u2002{100 * kept[name]:.1f} %"
            axes.text(61, y, label, va="center", ha="left")
            if share is not None:
                axes.plot([100 * share], [100 * kept[name]], "o", color=colour, markersize=3.5)
        _percent_axes(axes)
        axes.set_xlim(0, 100)
        axes.set_xlabel("elements active, %")

    return Panel(f"System {system}: score kept, %", alt, draw)


def _percent_axes(axes: "Axes") -> None:
    axes.set_ylim(0, 100)
    axes.grid(visible=True)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=4)


def curve_panel(title: str, colour: str, steps: np.ndarray, values: np.ndarray, spread: np.ndarray | None) -> Panel:
    """One logged quantity by step, its running mean where the log is long, `spread` as a band of ± one deviation."""
    window = running_window(len(values))
    finite = np.isfinite(values)
    last = values[finite][-1] if finite.any() else np.nan
    first = values[finite][0] if finite.any() else np.nan

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        if spread is not None:
            axes.fill_between(steps, values - spread, values + spread, color=colour, alpha=0.14, linewidth=0)
        axes.plot(steps, values, color=colour, linewidth=0.9 if window > 1 else 1.6, alpha=0.4 if window > 1 else 1)
        if window > 1:
            axes.plot(*running_mean(steps, values, window), color=colour, linewidth=1.8)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("step")
        axes.spines["left"].set_visible(False)

    alt = f"{title} over {len(steps)} logged steps: first {first:.3g}, last {last:.3g}."
    return Panel(title, alt, draw, height=2.15)


def watched_panel(title: str, colour: str, losses: Mapping[int, float], limit: float, kept: int) -> Panel:
    """The loss at each checkpoint by step, the limit as a dashed line, and the step that was kept as a dot."""
    steps, values = list(losses), list(losses.values())

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(steps, values, color=colour, linewidth=1.6)
        axes.plot([kept], [losses[kept]], "o", color=colour, markersize=5)
        axes.grid(axis="y")
        axes.margins(x=0.04, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("step")
        axes.spines["left"].set_visible(False)

    points = ", ".join(f"{value:.4g} at step {step}" for step, value in losses.items())
    return Panel(title, f"{title}: {points}; step {kept} is kept.", draw, height=2.15)


def running_window(count: int) -> int:
    return 1 if count < 60 else max(5, count // 20)


def running_mean(steps: np.ndarray, values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `window` consecutive values, at the middle step; a value that is not finite leaves a gap."""
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    return steps[(window - 1) // 2 :][: len(means)], means


def bars_panel(title: str, colour: str | Sequence[str], labels: Sequence[str], values: Sequence[float],
               texts: Sequence[str], alt: str) -> Panel:  # fmt: skip
    """Horizontal bars from zero, each with its number written at its end."""
    left = 0.2 + 0.068 * max(len(label) for label in labels)

    def draw(axes: "Axes") -> None:
        places = range(len(values))
        axes.barh(places, values, height=0.6, color=colour, linewidth=0)
        for place, value, text in zip(places, values, texts):
            axes.annotate(text, (value, place), (3, 0), textcoords="offset points", va="center", ha="left")
        axes.set_yticks(places, labels, color=INK)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(0, (max(values) or 1.0) * 1.45)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    return Panel(title, alt, draw, height=0.5 + 0.24 * len(values), margins=(left, 0.1, 0.08, 0.4))


def stacked_panel(title: str, labels: Sequence[str], counts: Sequence[tuple[int, int, int]], alt: str) -> Panel:
    """Shares of System 1, System 2 and neither in each row, as one bar of 100 %."""
    labels = [label if len(label) <= 20 else f"{label[:19]}…" for label in labels]
    left = 0.2 + 0.068 * max(len(label) for label in labels)

    def draw(axes: "Axes") -> None:
        for place, row in enumerate(counts):
            start, total = 0.0, max(1, sum(row))
            for count, colour in zip(row, (S1, S2, RULE)):
                share = 100 * count / total
                axes.barh(place, share, left=start, height=0.62, color=colour, linewidth=0)
                if share >= 12:
                    ink = INK if colour == RULE else PAGE
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": ink}
                    axes.text(start + share / 2, place, f"{share:.0f} %", **style)
                start += share
        axes.set_yticks(range(len(labels)), labels, color=INK)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    return Panel(title, alt, draw, height=0.5 + 0.26 * len(labels), margins=(left, 0.1, 0.08, 0.4))


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
