"""The small pieces of HTML that all sections of the report use: tables, and numbers as text."""

import html
from collections.abc import Sequence
from typing import Any


def absent(file: str, stage: str) -> str:
    return (
        f'<p class="absent">Not in this run: <code>{file}</code> is missing, because stage '
        f"<code>{stage}</code> has not run.</p>"
    )


def html_table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """`rows` hold finished cells; the first of each is its header."""
    head = "".join(f"<th>{cell.replace('System ', 'System&nbsp;')}</th>" for cell in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def escaped(value: Any) -> str:
    return html.escape(str(value))


def number(value: float) -> str:
    return f"{int(value):,}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def signed_points(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def byte_size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"
