"""The report's rows: what the last stage did to each answer, the answers as text, and the filter in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorapar.errors import InputError
from lorapar.files import read_json, read_jsonl, write_json, write_jsonl
from lorapar.intervals import bootstrap, mcnemar
from lorapar.reporting import rows as answered
from lorapar.reporting.report import report

from .test_report import METRICS, Page, make_partition, row_of, write_training

MODELS = ("base", "sft", "grpo")
HOSTILE = (
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 1\"> & 'quoted' &amp; </div></details>",
    "W" * 900,
    "الجواب هو ٤٢ \u202e reversed \u202c و",
    "\n\n  def f(x):\n\treturn x  # 👩🏽‍🚀 $x ${x}\n",
)


def write_answers(
    folder: Path, verdicts: Sequence[Sequence[Any]], key: str = "correct", models: Sequence[str] = MODELS
) -> None:
    """A held-out row for each of `verdicts`, which holds a verdict of each model; odd rows are System 2's."""
    labels, lines = [], []
    for i in range(len(verdicts)):
        labels.append({"id": f"row{i}", "prompt": f"Question number {i}?", "completion": f"said {i}",
                       "split": "held_out", "system": 1 + i % 2, "votes": {"a": 1, "b": 1 + i % 2},
                       "agreement": 0.5})  # fmt: skip
    for place, model in enumerate(models):
        lines += [
            {"model": model, "id": f"row{i}", "system": 1 + i % 2, "answer": str(i), "completion": f"{model} says {i}",
             key: of_row[place]}
            for i, of_row in enumerate(verdicts)
        ]  # fmt: skip
    write_jsonl(folder / "labels.jsonl", labels)
    write_jsonl(folder / "answers.jsonl", lines)


def rewrite(folder: Path, file: str, change: Any) -> None:
    lines = read_jsonl(folder / file)
    for i, line in enumerate(lines):
        change(i, line)
    write_jsonl(folder / file, lines)


def page_of(folder: Path, **options: Any) -> Page:
    page = Page(report(folder, **options).read_text(encoding="utf-8"))
    assert page.open == [], "an element is left open"
    return page


def details(text: str) -> list[tuple[str, str, str]]:
    """(change, system, HTML) of every row on the page."""
    found = re.findall(r'<details class="row[^"]*" data-change="(\w+)" data-system="(\w+)">(.*?)</details>', text, re.S)
    assert len(found) == text.count("<details")
    return found


@pytest.mark.parametrize(
    ("one_way", "other_way", "p"),
    # 2 (1 + 10) / 2^10, and 2 (1 + 6 + 15) / 2^6.
    [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (2, 4, 44 / 64), (0, 6, 2 / 64)],
)
def test_mcnemar_s_exact_p(one_way: int, other_way: int, p: float):
    assert mcnemar(one_way, other_way) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_thousands_is_the_normal_s():
    # z = (|b - c| - 1) / sqrt(b + c) = 2.53, with the correction for continuity: two-sided 0.0115.
    assert mcnemar(3000, 3200) == pytest.approx(0.0115, abs=2e-4)


def test_how_many_rows_stage_2_helped_and_hurt(tmp_path: Path):
    # By system, since odd rows are System 2's: (base, after SFT, after GRPO).
    one = [(0, 1, 0)] * 9 + [(0, 0, 1)] + [(1, 1, 1)] * 6 + [(None, None, None)] * 2
    two = [(0, 0, 1)] * 3 + [(1, 1, 1)] * 5 + [(0, 0, 0)] * 10
    verdicts = [tuple(None if v is None else bool(v) for v in row) for pair in zip(one, two) for row in pair]
    write_answers(tmp_path, verdicts)
    page = page_of(tmp_path)
    tables = [row for row, place in zip(page.rows, page.places) if place == "answers"]
    assert tables[0] == ["", "rows", "still right", "helped", "hurt", "still wrong", "change, points", "p",
                         "the counts drawn"]  # fmt: skip
    # System 1: 9 hurt and 1 helped of 16; System 2: 3 helped of 18.
    assert tables[1] == ["System 1", "16", "6", "1", "9", "0", "−50.0", "0.021", ""]
    assert tables[2] == ["System 2", "18", "5", "3", "0", "10", "+16.7", "0.25", ""]
    assert tables[3] == ["All", "34", "11", "4", "9", "10", "−14.7", "0.27", ""]
    # From the base: rows that SFT had turned right and GRPO wrong again were wrong at both ends.
    assert tables[5] == ["System 1", "16", "6", "1", "0", "9", "+6.2", "1.00", ""]
    text = page.text["answers"]
    assert (
        "Of 34 held-out rows, 4 went from wrong to right (helped) and 9 from right to wrong (hurt), after SFT" in text
    )
    kinds = [change for change, _, _ in details((tmp_path / "report.html").read_text(encoding="utf-8"))]
    assert kinds == ["hurt"] * 9 + ["helped"] * 4 + ["wrong"] * 10 + ["right"] * 11 + ["none"] * 2


def test_a_metric_s_rows_are_better_equal_or_worse(tmp_path: Path):
    values = [(0.0, 0.5, 0.75), (0.0, 0.5, 0.25), (0.0, 0.5, 0.5), (0.0, 0.5, 1.0), (0.5, None, 1.0), (0.0, 0.0, 0.5)]
    write_answers(tmp_path, values, key="value")
    page = page_of(tmp_path)
    moved = [0.25, -0.25, 0.0, 0.5, 0.5]
    low, high = bootstrap(moved)
    cells = row_of(page, "All", "5", "1", "3", "1", section="answers")
    assert cells == ["+0.2", f"{low:+.3g} to {high:+.3g}".replace("-", "−"), ""]
    assert "3 got better and 1 worse, after SFT against after GRPO" in page.text["answers"]
    assert "right" not in page.text["answers"]
    shown = details((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [change for change, _, _ in shown] == ["hurt", "helped", "helped", "helped", "equal", "none"]
    assert "no value" in shown[-1][2]


def test_every_row_can_be_read_without_the_script(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False), (True, True, True)])
    long = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Again: how much is it? " * 12}]
    rewrite(tmp_path, "labels.jsonl", lambda i, row: row.update(prompt=long) if i else None)
    rewrite(tmp_path, "answers.jsonl", lambda i, row: row.update(answer=None) if row["id"] == "row1" else None)
    report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (hurt, system, first), (right, _, second) = details(text)
    assert (hurt, system, right) == ("hurt", "1", "right")
    for said in ("▼ hurt", "Question number 0?", "base says 0", "sft says 0", "grpo says 0", "✗ wrong", "✓ right"):
        assert said in first
    # The reference is the row's own completion where it has no answer to compare with.
    for said in (
        "Be brief.",
        html.escape(long[1]["content"]),
        "prompt, user",
        "said 1",
        "grpo says 1",
        "✓ still right",
    ):
        assert said in second
    assert 'id="row-tools" role="search" aria-label="Held-out rows" hidden' in text, "the script shows what it serves"


def test_no_answer_breaks_the_page(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False)] * len(HOSTILE))
    rewrite(tmp_path, "answers.jsonl", lambda i, row: row.update(completion=HOSTILE[i % 5], answer=HOSTILE[-1 - i % 5]))
    rewrite(tmp_path, "labels.jsonl", lambda i, row: row.update(prompt=HOSTILE[i % 5]))
    page = page_of(tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for said in HOSTILE:
        assert text.count(f'dir="auto">{html.escape(said)}</div>') >= 4, (
            "the text itself, three answers and a reference"
        )
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_s_policy_allows_its_one_script_alone(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False)])
    text = report(tmp_path).read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy == [f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
                      "base-uri 'none'; form-action 'none'"]  # fmt: skip


def test_a_page_without_answers_holds_no_row_s_text(tmp_path: Path):
    write_training(tmp_path, make_partition(tmp_path))
    write_answers(tmp_path, [(False, True, False), (True, False, True)] * 4)
    shown = report(tmp_path).read_text(encoding="utf-8")
    secrets = [f"Question number {i}" for i in range(8)] + [f"says {i}" for i in range(8)] + ["said 1", "row1"]
    assert sum(secret in shown for secret in secrets) >= 16, "shown otherwise, among the split votes too"
    page = page_of(tmp_path, answers=False)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    files = [text, *(path.read_bytes().decode("latin-1") for path in (tmp_path / "figures").iterdir())]
    assert not [secret for secret in secrets for content in files if secret in content]
    assert not [secret for secret in secrets if html.escape(secret) in text]
    # The counts stay, and the page says what it leaves out.
    assert row_of(page, "System 1", "4", "0", "0", "4", "0", section="answers")[:1] == ["−100.0"]
    assert "The rows themselves were left out of this page." in page.text["answers"]
    assert "The rows that they split on were left out of this page." in page.text["agreement"]


def test_a_large_run_shows_what_changed_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(answered, "ROWS_SHOWN", 40)
    write_answers(tmp_path, [(False, i % 10 == 0, i % 15 == 0) for i in range(150)])
    long = "begin " + "x" * 3000 + " end"
    rewrite(tmp_path, "answers.jsonl", lambda i, row: row.update(completion=long) if i == 310 else None)
    page = page_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    kinds = [change for change, _, _ in details(text)]
    # Multiples of 10 that are none of 30 are hurt, those of 15 that are none are helped.
    assert (kinds.count("hurt"), kinds.count("helped"), len(kinds)) == (10, 5, 40)
    said = page.text["answers"]
    assert "Shown: 40 of 150 rows (all that changed and an even spread of the others)." in said
    assert "Texts of more than 2,000 letters are cut in the middle. answers.jsonl holds everything." in said
    assert f"{len(long) - 2000:,} letters left out" in said
    assert "begin x" in said
    assert "x end" in said
    assert "Of 150 held-out rows, 5 went from wrong to right (helped) and 10 from right" in said, "of all rows"
    assert {system for _, system, _ in details(text)} == {"1", "2"}


@pytest.mark.parametrize("shown", [1, 7, 100])
def test_rows_are_chosen_in_order_and_none_twice(shown: int, monkeypatch):
    monkeypatch.setattr(answered, "ROWS_SHOWN", shown)
    changes = ["hurt", "right", "wrong", "helped", "right"] * 4
    places = answered.chosen(changes)
    assert len(places) == len(set(places)) == min(shown, 20)
    assert places == sorted(places)
    changed = [place for place in places if changes[place] in ("hurt", "helped")]
    assert len(changed) == min(shown, 8)


def test_paper_has_some_of_the_rows_that_changed(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False)] * 13 + [(False, False, True)] * 4 + [(True, True, True)] * 3)
    page = page_of(tmp_path)
    assert "On paper: 10 of 13 that were hurt and 4 of 4 that were helped." in page.text["answers"]
    classes = [str(a["class"]).split() for tag, a in page.elements if tag == "details"]
    assert ["paper" in names for names in classes] == [True] * 10 + [False] * 3 + [True] * 4 + [False] * 3
    assert all("short" in names for names in classes)


def test_rows_of_one_id_keep_their_order_and_unknown_ones_are_said(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False), (True, True, False), (True, True, False)])
    rewrite(tmp_path, "labels.jsonl", lambda i, row: row.update(id="row0" if i < 2 else "other"))
    rewrite(tmp_path, "answers.jsonl", lambda i, row: row.update(id="row0") if row["id"] == "row1" else None)
    report(tmp_path)
    rows = details((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Question number 0?" in rows[0][2]
    assert "Question number 1?" in rows[1][2]
    assert "labels.jsonl lacks this row" in rows[2][2]


def test_a_run_of_one_stage_is_compared_with_the_base(tmp_path: Path):
    write_answers(tmp_path, [(False, True), (True, True)], models=("base", "sft"))
    text = page_of(tmp_path).text["answers"]
    assert "What SFT changed" in text
    assert "base against after SFT" in text
    assert "From the base" not in text
    write_answers(tmp_path, [(False,)], models=("base",))
    assert "there is nothing to compare" in page_of(tmp_path).text["answers"]


def test_a_file_of_answers_that_does_not_fit_gets_one_line(tmp_path: Path):
    write_answers(tmp_path, [(False, True, False), (True, True, True)])
    whole = read_jsonl(tmp_path / "answers.jsonl")
    write_jsonl(tmp_path / "answers.jsonl", whole[:-1])
    with pytest.raises(InputError, match=r"answers\.jsonl: grpo answered other rows than base"):
        report(tmp_path)
    del whole[2]["completion"]
    write_jsonl(tmp_path / "answers.jsonl", whole)
    with pytest.raises(InputError, match=r"answers\.jsonl: line 3 lacks completion"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_finished_run_s_page_has_its_answers(finished: Path):
    page = page_of(finished)
    lines = read_jsonl(finished / "answers.jsonl")
    held_out = [row for row in read_jsonl(finished / "labels.jsonl") if row["split"] == "held_out"]
    shown = details((finished / "report.html").read_text(encoding="utf-8"))
    assert len(shown) == len(held_out) == len(lines) / 3
    assert "labels.jsonl lacks" not in page.text["answers"]
    accuracy = read_json(finished / "metrics.json")["accuracy"]
    moved = (accuracy["grpo"]["all"] - accuracy["sft"]["all"]) * len(held_out)
    kinds = [change for change, _, _ in shown]
    assert kinds.count("helped") - kinds.count("hurt") == pytest.approx(moved)


def test_the_page_s_colours_can_be_read(tmp_path: Path):
    """WCAG's contrast of each colour of text with each ground that it stands on: 4.5 at least, in both schemes."""
    write_answers(tmp_path, [(False, True, False)])
    text = report(tmp_path).read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    assert set(light) == set(dark)

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    for scheme in (light, dark):
        for ink in ("ink", "muted", "s1", "s2-text", "shared-text", "good", "bad"):
            for ground in ("page", "panel"):
                one, other = sorted((luminance(scheme[ink]), luminance(scheme[ground])))
                assert (other + 0.05) / (one + 0.05) >= 4.5, (ink, scheme[ink], ground)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")


def in_browser(page: Path, fragment: str, profile: Path) -> str:
    """The page's HTML once a real browser has run it."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions",
               f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom",
               f"{page.as_uri()}{fragment}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, encoding="utf-8").stdout


def visible(dom: str) -> list[str]:
    """The questions of the rows that are not hidden."""
    rows = re.findall(r'<details class="row[^>]*?( hidden="")?>(.*?)</details>', dom, re.S)
    return [html.unescape(re.findall(r'asked t">(.*?)</bdi>', text)[0]) for hidden, text in rows if not hidden]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Rows 0 to 59 in threes: hurt, helped, right both times; odd rows are System 2's."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_answers(folder, [[(False, True, False), (False, False, True), (True, True, True)][i % 3] for i in range(60)])
    rewrite(folder, "answers.jsonl", lambda i, row: row.update(completion=HOSTILE[0]) if row["id"] == "row7" else None)
    return report(folder)


@browser
def test_an_address_filters_the_rows_in_a_browser(many: Path, tmp_path: Path):
    dom = in_browser(many, "", tmp_path / "profile")
    assert "<title>LoRA-PAR" in dom, "an answer's script did not run"
    assert len(visible(dom)) == 25
    assert "60 rows fit; the first 25 are below." in dom
    assert 'hidden=""' not in re.findall(r'<div id="row-tools"[^>]*>', dom)[0]
    dom = in_browser(many, "#change=hurt&system=2", tmp_path / "profile")
    assert visible(dom) == [f"Question number {i}?" for i in range(3, 60, 6)]
    # Each button says how many rows it would leave, whatever its own group is set to.
    counts = re.findall(r'data-value="(\w+)" aria-pressed="(\w+)">[^<]*<span class="count">(\d+)', dom)
    assert counts == [("all", "false", "30"), ("hurt", "true", "10"), ("helped", "false", "10"),
                      ("right", "false", "10"), ("all", "false", "20"), ("1", "false", "10"),
                      ("2", "true", "10")]  # fmt: skip
    dom = in_browser(many, "#q=GRPO+says+1", tmp_path / "profile")
    assert sorted(visible(dom)) == sorted(f"Question number {i}?" for i in (1, *range(10, 20)))
    assert "No row fits." in in_browser(many, "#q=nobody+said+this&change=made-up", tmp_path / "profile")


@browser
def test_clicks_and_typing_filter_the_rows_in_a_browser(many: Path, tmp_path: Path):
    # What a reader does, as a script of a copy of the page without the policy that would forbid it.
    steps = """
    const log = [], note = () => log.push([document.querySelectorAll("details.row:not([hidden])").length,
      document.getElementById("row-count").textContent, location.hash,
      document.querySelectorAll("details[open]").length]);
    const press = text => [...document.querySelectorAll("button")].find(b => b.textContent.startsWith(text)).click();
    const type = text => { const box = document.getElementById("row-search"); box.value = text;
      box.dispatchEvent(new Event("input")); box.dispatchEvent(new Event("change")); };
    press("show 35 more"); note();
    press("▲ helped"); note();
    press("System 1"); note();
    press("open all"); note();
    press("close all"); note();
    type("  NUMBER 7?"); note();
    press("both systems"); note();
    press("all"); type(""); note();
    document.body.insertAdjacentHTML("beforeend", "<pre id=log></pre>");
    document.getElementById("log").textContent = JSON.stringify(log);
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", many.read_text(encoding="utf-8"))
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{steps}</script></body>"), encoding="utf-8")
    dom = in_browser(copy, "", tmp_path / "profile")
    log = json.loads(html.unescape(re.findall(r'<pre id="log">(.*?)</pre>', dom, re.S)[0]))
    assert log == [
        [60, "60 rows fit.", "", 0],
        [20, "20 rows fit.", "#change=helped", 0],
        [10, "10 rows fit.", "#change=helped&system=1", 0],
        [10, "10 rows fit.", "#change=helped&system=1", 10],
        [10, "10 rows fit.", "#change=helped&system=1", 0],
        [0, "No row fits.", "#q=++NUMBER+7%3F&change=helped&system=1", 0],
        [1, "1 row fits.", "#q=++NUMBER+7%3F&change=helped", 0],
        [25, "60 rows fit; the first 25 are below.", "#answers", 0],
    ]


@browser
def test_the_policy_stops_any_other_script(many: Path, tmp_path: Path):
    copy = tmp_path / "copy.html"
    text = many.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", "<script>document.title = 'taken'</script></body>"), encoding="utf-8")
    dom = in_browser(copy, "", tmp_path / "profile")
    assert "<title>LoRA-PAR" in dom
    assert "60 rows fit" in dom


def test_metrics_and_answers_stand_on_one_page(tmp_path: Path):
    write_training(tmp_path, make_partition(tmp_path))
    write_json(tmp_path / "metrics.json", METRICS)
    write_answers(tmp_path, [(False, True, False)])
    page = page_of(tmp_path)
    assert "System 1 accuracy" in page.text["header"]
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids)), "an id is used twice"
