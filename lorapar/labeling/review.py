"""The rows that voters split on, as a CSV for a person to correct; a correction overrides every vote.

    id, question, answer, system, agreement, <one column a voter>, reasons, corrected

`corrected` is empty; a person writes 1, 2, System1 or System2 there. Writing the file again keeps the corrections.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_text, write_text
from .parsing import LABEL

FIRST = ("id", "question", "answer", "system", "agreement", "decided_by")
CORRECTED = "corrected"


def write_review(path: Path, rows: Iterable[Mapping[str, Any]], voters: list[str]) -> int:
    """Write the rows, each with FIRST's keys, `votes` and `reasons`, and return their number; corrections stay."""
    before = read_rows(path) if path.exists() else {}
    columns = [*FIRST, *voters, "reasons", CORRECTED]
    out, count = io.StringIO(newline=""), 0
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    for row in rows:
        correction = before.pop(row["id"], {}).get(CORRECTED, "")
        votes = {voter: row["votes"].get(voter) for voter in voters}
        reasons = "\n".join(f"{voter}: {reason}" for voter, reason in row["reasons"].items())
        writer.writerow({**{key: row[key] for key in FIRST}, **votes, "reasons": reasons, CORRECTED: correction})
        count += 1
    # Rows that a person corrected and that are no longer split.
    for row in before.values():
        if row[CORRECTED].strip():
            writer.writerow({key: row.get(key, "") for key in columns})
            count += 1
    # The byte-order mark tells spreadsheets that this is UTF-8.
    write_text(path, "\ufeff" + out.getvalue())
    return count


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    # A long row exceeds csv's own limit of 131,072 letters a cell.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""))
    for column in ("id", CORRECTED):
        if column not in (reader.fieldnames or []):
            raise InputError(f"{path}: has no column {column!r}; lorapar label --review writes such a file")
    rows: dict[str, dict[str, str]] = {}
    for number, row in enumerate(reader, start=1):
        row = {str(key): value or "" for key, value in row.items()}
        if row["id"] in rows:
            raise InputError(f"{path}: row {number}: the id {row['id']!r} comes twice")
        rows[row["id"]] = row
    return rows


def read_corrections(path: Path) -> dict[str, int]:
    """A person's labels by row id; InputError for one that is neither 1 nor 2 nor empty."""
    corrections = {}
    for row_id, row in read_rows(path).items():
        value = row[CORRECTED].strip()
        match = LABEL.fullmatch(value)
        if value and match is None:
            raise InputError(
                f"{path}: {CORRECTED} of row {row_id} is {value!r}; allowed: 1, 2, System1, System2 or empty"
            )
        if match:
            corrections[row_id] = int(match[1])
    return corrections
