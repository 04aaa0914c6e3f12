"""docs/rewards.md: each row of its table is so."""

from pathlib import Path

import pytest

from lorapar.data.answers import is_correct

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def rows():
    """(right answer, completion, whether the page calls it right) of each row."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            found.append((cells[0].strip("`"), cells[1].strip("`"), {"yes": True, "no": False}[cells[2]]))
    return found


@pytest.mark.parametrize(("answer", "completion", "right"), rows())
def test_a_row_of_the_page_is_so(answer, completion, right):
    assert is_correct(completion, answer) is right


def test_the_page_has_rows_of_both_kinds():
    assert min(sum(right for *_, right in rows()), sum(not right for *_, right in rows())) >= 15
