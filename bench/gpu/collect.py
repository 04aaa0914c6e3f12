"""Keep a program's results: `python -m bench.gpu.collect FOLDER` after `bench/gpu.sh` wrote FOLDER/results.jsonl.

They go into bench/results/<gpu>.json under "programs", beside what pytest keeps there; what was not measured again
keeps its last line, with its own commit, versions and time. The tables of bench/README.md are made anew from all such
files.

Exit status: 0 done, 2 there is nothing to keep (no results, or a rehearsal's, which mean nothing).
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.programs import PROGRAMS
from bench.gpu.table import readable

HERE = Path(__file__).parents[1]
BEGIN, END = "<!-- figures of bench/gpu.sh: made by bench.gpu.collect -->", "<!-- end of the figures -->"
NONE = "No GPU figure is recorded yet."
# Lines of one step in the README; all of them are in the results file.
ROWS = 40
KINDS = ("graph", "events", "host", "clock")


def read(file: Path) -> list[dict[str, Any]]:
    """The file's lines; a last line that a kill tore is left out."""
    found = []
    for text in file.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"left out, not JSON: {text[:80]}", file=sys.stderr)
    return found


def keep(lines: Sequence[dict[str, Any]], results: Path) -> list[Path]:
    """Put the lines into their GPUs' files; returns the files."""
    written = []
    for gpu in dict.fromkeys(line["gpu"] for line in lines):
        path = results / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")
        known = json.loads(path.read_text()) if path.exists() else {"device": gpu, "kind": "cuda", "cases": {}}
        programs = known.setdefault("programs", {})
        mine = [line for line in lines if line["gpu"] == gpu]
        # What a step could not do before is no longer news once it has run again; figures stay until measured again.
        for program, step in {(line["program"], line["step"]) for line in mine}:
            before = programs.setdefault(program, {}).get(step, {})
            programs[program][step] = {key: line for key, line in before.items() if line["kind"] == "result"}
        for line in mine:
            of_step = programs[line["program"]][line["step"]]
            key = f"{line['case']} [{line['unit']}]" if line["kind"] == "result" else line.get("case", line["kind"])
            of_step[key] = {name: value for name, value in line.items() if name not in ("program", "step", "gpu")}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        written.append(path)
    return written


def tables(results: Path) -> str:
    """What bench/README.md shows of every GPU that has results."""
    text = []
    for path in sorted(results.glob("*.json")):
        known = json.loads(path.read_text())
        programs = known.get("programs") if isinstance(known, dict) else None
        if programs:
            text += [f"### {known['device']}", "", *_headline(programs)]
            for program in PROGRAMS:
                for step, entries in programs.get(program, {}).items():
                    text += _of_step(program, step, list(entries.values()))
    return "\n".join(text).strip() or NONE


def _headline(programs: dict[str, Any]) -> list[str]:
    rows = [
        f"| {line['headline']} | {_figure(line)} | {line['commit'][:9]} | {line['time'][:10]} |"
        for of_program in programs.values()
        for entries in of_program.values()
        for line in entries.values()
        if "headline" in line
    ]
    return ["| figure | value | commit | measured |", "|---|---|---|---|", *rows, ""] if rows else []


def _of_step(program: str, step: str, lines: list[dict[str, Any]]) -> list[str]:
    rows = [line for line in lines if line["kind"] == "result"]
    text = [f"**{step}** (`--program {program}`)", ""]
    text += [
        f"- {line.get('case', step)}: {line['kind'] if line['kind'] != 'step' else line['status']}, {line['why']}"
        for line in lines
        if line["kind"] in ("wrong", "skipped") or (line["kind"] == "step" and line["status"] != "ok")
    ]
    text += [""] if len(text) > 2 else []
    # Times of one way by several kinds of clock are one row.
    timed: dict[str, dict[str, str]] = {}
    for line in rows:
        if "timed_by" in line:
            case = line["case"].removesuffix(f" [{line['timed_by']}]")
            timed.setdefault(case, {})[line["timed_by"]] = _figure(line)
    if timed:
        kinds = [kind for kind in KINDS if any(kind in of for of in timed.values())]
        text += [f"| case | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
        text += [f"| {_cell(case)} | {' | '.join(of.get(kind, '') for kind in kinds)} |" for case, of in timed.items()]
        text.append("")
    rest = [line for line in rows if "timed_by" not in line and not line.get("detail")]
    if rest:
        text += ["| case | value |", "|---|---|"]
        text += [f"| {_cell(line['case'])} | {_figure(line)} |" for line in rest[:ROWS]]
        text += [f"| {len(rest) - ROWS} more in the results file | |"] if len(rest) > ROWS else []
        text.append("")
    return text


def _figure(line: dict[str, Any]) -> str:
    value = readable(line["value"], line["unit"])
    if line.get("p20") is None or line.get("p80") is None:
        return value
    return f"{value} [{readable(line['p20'], line['unit'])}, {readable(line['p80'], line['unit'])}]"


def _cell(text: str) -> str:
    return text.replace("|", "·")


def rewrite(readme: Path, results: Path) -> None:
    """The README's part between BEGIN and END made anew; ValueError where it has no such part."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no part between {BEGIN!r} and {END!r}")
    readme.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")


def main(given: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.collect", description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path, help="where results.jsonl is")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: bench/results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="default: bench/README.md")
    options = parser.parse_args(given)
    file = options.folder / "results.jsonl"
    if not file.exists():
        print(f"{file} is not there: bench/gpu.sh writes it", file=sys.stderr)
        return 2
    lines = read(file)
    rehearsed = [line for line in lines if line["gpu"].startswith("rehearsal")]
    if rehearsed or not lines:
        print(f"{file} holds {'a rehearsal' if rehearsed else 'nothing'}, whose figures are not kept", file=sys.stderr)
        return 2
    for path in keep(lines, options.results):
        print(f"written: {path}")
    rewrite(options.readme, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
