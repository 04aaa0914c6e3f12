"""Answers side by side in a terminal: `layout` makes their lines, `Screen` redraws them in place as they grow."""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

GAP = 3  # columns between two answers
NARROWEST = 18  # columns of an answer; with fewer they go one beneath the other
SECONDS = 0.05  # between two drawings at least: a terminal over a slow line draws no faster
# Of the headings, on light and dark backgrounds: bold, and for a stage the colour of its system in the report.
STYLES = {"base": "1", "after SFT": "1;38;5;32", "after GRPO": "1;38;5;166"}
TAB = 4  # columns of a tab at most
# Unicode's embeddings, overrides and isolates of direction (UAX 9), which would reach into the columns beside.
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Paint = Callable[[str, str], str]


def unpainted(title: str, text: str) -> str:
    return text


def painted(title: str, text: str) -> str:
    """`text`, which holds the title, in its style."""
    return f"\x1b[{STYLES[title]}m{text}\x1b[0m"


def shown(text: str) -> str:
    """Text without what a terminal would obey: of control characters, line ends and tabs alone are kept, and none that
    turns the direction of what stands beside it."""
    text = text.replace("\r\n", "\n")
    obeyed = ((unicodedata.category(c) == "Cc" and c not in "\n\t") or c in TURNING for c in text)
    return "".join("\ufffd" if is_obeyed else c for c, is_obeyed in zip(text, obeyed))


def letter_width(letter: str) -> int:
    """The columns that a character takes: 2 of East Asian wide ones and emoji, 0 of marks over the one before."""
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def width_of(text: str) -> int:
    return sum(map(letter_width, text))


def wrapped(text: str, width: int) -> list[str]:
    """The text's lines, each of at most `width` columns: broken at spaces, a word that is longer inside it.

    width: at least 2. Spaces at the end of a line are left out, those at its beginning and within are kept.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in re.findall(r"\s+|\S+", paragraph):
            if width_of(line + piece) <= width:
                line += piece
            elif piece.isspace():
                # The space at which a line is broken.
                lines.append(line)
                line = ""
            else:
                if line.strip():
                    lines.append(line)
                    line = ""
                *full, line = _cut(line + piece, width)
                lines += full
        lines.append(line)
    return [line.rstrip() for line in lines]


def _cut(word: str, width: int) -> list[str]:
    parts = [""]
    for letter in word:
        if width_of(parts[-1]) + letter_width(letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts


def layout(
    titles: Sequence[str], texts: Sequence[str], width: int, height: int | None = None, paint: Paint = unpainted
) -> list[str]:
    """The answers' lines: side by side where each has room, else one beneath the other, each under its title.

    width: the terminal's columns. height: lines at most, of which each answer has the last; None: all of them.
    paint: given a title and its text, how that is written.
    """
    texts = [shown(text).expandtabs(TAB) for text in texts]
    column = (width - GAP * (len(titles) - 1)) // len(titles)
    if column < NARROWEST:
        return _stacked(titles, texts, max(2, width), height, paint)
    bodies = [wrapped(text, column) for text in texts]
    room = max(1, (height or 0) - 2)
    bodies = [body if height is None else body[-room:] for body in bodies]
    heads = [[title, "-" * width_of(title)] for title in titles]
    rows = range(2 + max(map(len, bodies)))
    cells = [[*head, *body] for head, body in zip(heads, bodies)]
    lines = []
    for row in rows:
        line = ""
        for i, (title, cell) in enumerate(zip(titles, cells)):
            text = cell[row] if row < len(cell) else ""
            padding = " " * (i * (column + GAP) - _drawn_width(line)) if text else ""
            line += padding + (paint(title, text) if row == 0 else text)
        lines.append(line)
    return lines


def _stacked(titles: Sequence[str], texts: Sequence[str], width: int, height: int | None, paint: Paint) -> list[str]:
    room = None if height is None else max(1, (height - (len(titles) - 1)) // len(titles) - 1)
    lines: list[str] = []
    for title, text in zip(titles, texts):
        body = wrapped(text, width)
        lines += [*([""] if lines else []), paint(title, title), *(body if room is None else body[-room:])]
    return lines


def _drawn_width(line: str) -> int:
    return width_of(re.sub(r"\x1b\[[0-9;]*m", "", line))


def write(out: TextIO, text: str) -> None:
    """Write now; of what the stream's encoding lacks, question marks."""
    coding = out.encoding or "utf-8"
    out.write(text.encode(coding, "replace").decode(coding))
    out.flush()


class Screen:
    """Draws a layout where the cursor is, and again over it; the last time whole, however long it is."""

    def __init__(self, out: TextIO, titles: Sequence[str], size: Callable[[], tuple[int, int]], paint: Paint):
        """size: the terminal's (columns, lines) now."""
        self.out, self.titles, self.size, self.paint = out, titles, size, paint
        self._drawn: list[str] = []
        self._at = 0.0

    def draw(self, texts: Sequence[str], is_last: bool = False) -> None:
        """Draw the answers; while they grow, as much as the terminal has lines for, and no oftener than is seen."""
        now = time.monotonic()
        if not is_last and now - self._at < SECONDS:
            return
        self._at = now
        columns, height = self.size()
        # A line of all columns would leave the cursor in a place that terminals do not agree on.
        width = max(2, columns - 1)
        lines = layout(self.titles, texts, width, None if is_last else max(4, height - 1), self.paint)
        # Where the window has become narrower, the terminal has broken the lines that stand there.
        above = sum(max(1, -(-_drawn_width(line) // max(1, columns))) for line in self._drawn)
        written = [f"\x1b[{above}A"] if above else []
        written += [f"\r{line}\x1b[K\n" for line in lines]
        write(self.out, "".join([*written, "\x1b[J"]))
        self._drawn = lines
