"""The report from small synthetic artefacts: self-contained, complete, and true to the artefacts."""

import copy
import html
import re
import struct
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from datasets import Dataset

import lorapar.reporting.elements as elements
from lorapar.errors import InputError
from lorapar.files import read_json, write_json, write_jsonl, write_text
from lorapar.labeling import label
from lorapar.partitioning.choose import partition
from lorapar.partitioning.partition import Partition
from lorapar.reporting import yardstick as yardsticks
from lorapar.reporting.artefacts import Artefacts
from lorapar.reporting.report import report
from lorapar.reporting.sections import _watched
from lorapar.scoring.scores import Scores, save_scores

SECTIONS = ("accuracy", "answers", "importance", "map", "theta", "training", "labels", "agreement", "cost", "optimizer",
            "recipe")  # fmt: skip
FIGURES = (
    "accuracy",
    "importance",
    "map",
    "theta",
    "training_sft",
    "training_grpo",
    "watched",
    "labels",
    "agreement",
    "cost",
    "optimizer",
)
RANK = 4
METRICS = {
    "accuracy": {
        "base": {"all": 0.11, "system1": 0.1301, "system2": 0.1016},
        "sft": {"all": 0.345, "system1": 0.92, "system2": 0.1211},
        "grpo": {"all": 0.382, "system1": 0.87, "system2": 0.1914},
    },
    "interval": {
        "base": {"all": [0.081, 0.146], "system1": [0.0776, 0.2098], "system2": [0.0701, 0.1446]},
        "sft": {"all": [0.298, 0.396], "system1": [0.8499, 0.9589], "system2": [0.0866, 0.1665]},
        "grpo": {"all": [0.333, 0.433], "system1": [0.7903, 0.9224], "system2": [0.1478, 0.2442]},
    },
    "n": {"all": 356, "system1": 100, "system2": 256},
    "seconds": {
        "label": 0.21,
        "score": 38.44,
        "partition": 0.62,
        "sft": 61.83,
        "grpo": 246.9,
        "evaluate": 71.3,
    },
    "rollout_seconds": {"grpo": 172.83},
    "peak_memory_bytes": {
        "label": 4.12e8,
        "score": 1.62e9,
        "partition": 1.1e9,
        "sft": 1.94e9,
        "grpo": 2.41e9,
    },
}


def make_scores(seed: int, twin: bool = True) -> Scores:
    """Two layers of q_proj and down_proj at uneven sizes, rank 4, with the zero rows of a twin beside it."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for layer in range(2):
        for module, width, out in (("self_attn.q_proj", 70, 66), ("mlp.down_proj", 130, 70)):
            for factor, shape in (("lora_A", (RANK, width)), ("lora_B", (out, RANK))):
                values = torch.randn(shape, generator=generator).exp() ** 2
                if twin:
                    values = torch.cat([values, torch.zeros(shape)], dim=0 if factor == "lora_A" else 1)
                scores[f"base_model.model.model.layers.{layer}.{module}.{factor}.default.weight"] = values
    return Scores(scores, {"rank": RANK if twin else None, "method": "taylor"})


def make_partition(folder: Path, granularity: str = "element", selection: str = "scores") -> Partition:
    scores = make_scores(1), make_scores(2)
    made = partition(*scores, theta=0.8, granularity=granularity, selection=selection)  # type: ignore[arg-type]
    save_scores(folder / "scores.safetensors", *scores)
    made.save(folder / "partition.safetensors")
    return made


def write_training(folder: Path, made: Partition) -> None:
    """What the stages after the partition leave, the labels and the recipe."""
    state = {stage: 8 * sum(int(m.sum()) for m in made.active(stage).values()) for stage in ("sft", "grpo")}  # type: ignore[arg-type]
    write_json(folder / "metrics.json", METRICS | {"partition": made.summary(), "optimizer_state_bytes": state})
    write_json(
        folder / "sft/log_history.json",
        [{"step": i, "loss": 2 / i, "grad_norm": 1.0, "mean_token_accuracy": 0.5} for i in range(1, 80)]
        + [{"step": 79, "train_runtime": 61.0}],
    )
    write_json(
        folder / "grpo/log_history.json",
        [{"step": i, "loss": 0.01, "grad_norm": 0.3, "reward": 0.4, "reward_std": 0.1} for i in range(1, 9)]
        + [{"step": 9, "loss": 0.01, "grad_norm": float("nan"), "reward": 0.5, "reward_std": 0.1}],
    )
    losses = {"0": 0.5, "20": 0.55, "40": 0.59, "60": 0.7}
    watched = {"system": 1, "rows": 48, "rise": 0.1, "losses": losses, "kept": 40, "digest": "x"}
    write_json(folder / "grpo/watched.json", watched)
    rows = [
        {
            "id": f"{i:016x}",
            "prompt": f"What is {i} + 3?",
            "system": 1 if i % 3 else 2,
            "split": "train" if i % 4 else "held_out",
            "votes": {"operations": 1 if i % 3 else 2, "a<script>$b$": 1 if i % 2 else None},
            "agreement": 1.0 if i % 3 else 0.5,
        }
        for i in range(60)
    ]
    write_jsonl(folder / "labels.jsonl", rows)
    answers = [
        {"model": step, "id": row["id"], "system": row["system"], "answer": "7", "completion": f"{step} <b>",
         "correct": step != "base"}
        for step in ("base", "sft", "grpo")
        for row in rows if row["split"] == "held_out"
    ]  # fmt: skip
    write_jsonl(folder / "answers.jsonl", answers)
    recipe = "model:\n  name: some/model\ndata:\n  sources:\n  - name: reasoning_gym:chain_sum\n"
    write_text(folder / "recipe.yaml", recipe + "  prompt: '<b>{prompt}</b> & \"more\" $x </pre>'\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Partition]:
    folder = tmp_path_factory.mktemp("run")
    made = make_partition(folder)
    write_training(folder, made)
    page = report(folder)
    assert page == folder / "report.html"
    return folder, page.read_text(encoding="utf-8"), made


class Page(HTMLParser):
    """Every element's attributes, the text by section, and the tables' rows as lists of cells."""

    VOID = ("meta", "link", "br", "img", "path", "use", "image", "rect", "input")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.places: list[str] = []  # each row's section
        self.section, self.in_cell, self.open = "header", False, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        elif tag == "tr":
            self.rows.append([])
            self.places.append(self.section)
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        elif tag == "small" and self.in_cell:
            self.rows[-1][-1] += " | "

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.in_cell:
            self.rows[-1][-1] += data


def row_of(page: Page, *starts: str, section: str | None = None) -> list[str]:
    """The cells after the head of the one row (of the section, where one is named) that begins with `starts`."""
    rows = [row for row, place in zip(page.rows, page.places) if section in (None, place)]
    found = [row[len(starts) :] for row in rows if tuple(row[: len(starts)]) == starts]
    assert len(found) == 1, (starts, found)
    return found[0]


def test_page_loads_nothing_from_outside(run):
    _, text, _ = run
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "img", "object", "embed"), tag
        for key in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (tag, key, value)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_section_and_figure_is_there(run):
    _, text, _ = run
    page = Page(text)
    assert [a["id"] for tag, a in page.elements if tag == "section"] == list(SECTIONS)
    figures = [a["id"] for tag, a in page.elements if tag == "figure"]
    assert figures == [f"fig-{name}" for name in FIGURES]
    pictures = [a for tag, a in page.elements if tag == "svg"]
    assert len(pictures) == 3 + 1 + 4 + 3 + 3 + 3 + 1 + 1 + 2 + 2 + 1
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in pictures)
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids)), "an id is used twice"
    assert "Not in this run" not in text


def test_figures_are_png_of_sane_size(run):
    folder, _, _ = run
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(f"{f}.png" for f in FIGURES)
    for name in FIGURES:
        content = (folder / "figures" / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 600 <= width <= 2400, (name, width)
        assert 100 <= height <= 2400, (name, height)
        assert len(content) > 3000
        pixels = matplotlib.image.imread(folder / "figures" / f"{name}.png")
        assert pixels[0, 0].tolist() == [1, 1, 1, 1], "white, also before a dark ground"
        assert (pixels[..., 3] == 1).all()


def test_accuracy_is_that_of_the_metrics(run):
    page = Page(run[1])
    for key, title in (("system1", "System 1"), ("system2", "System 2"), ("all", "All")):
        n = METRICS["n"][key]
        cells = row_of(page, title, str(n))
        for cell, step in zip(cells, ("base", "sft", "grpo")):
            value, (low, high) = METRICS["accuracy"][step][key], METRICS["interval"][step][key]
            assert cell == f"{100 * value:.1f} % | {100 * low:.1f}–{100 * high:.1f} | {round(value * n)}/{n}"
        points = [
            METRICS["accuracy"][b][key] - METRICS["accuracy"][a][key] for a, b in (("base", "sft"), ("sft", "grpo"))
        ]
        assert cells[3:] == [f"{100 * p:+.1f}".replace("-", "−") for p in points]
    assert "GRPO cost System 1, which SFT had trained, 5.0 points (the two intervals overlap)" in page.text["accuracy"]
    sft = "SFT raised System 1 accuracy from 13.0 % to 92.0 %"
    grpo = "GRPO raised System 2 accuracy from 12.1 % to 19.1 % and cost System 1 5.0 points"
    assert f"{sft}; {grpo}." in page.text["header"]


def test_regions_leave_the_twin_out_and_equal_the_partition(run):
    _, text, made = run
    page = Page(text)
    summary = made.summary()
    total = RANK * 2 * (70 + 66 + 130 + 70)
    for name, key in (("System 1 only", "s1_only"), ("System 2 only", "s2_only"), ("shared", "shared")):
        share = summary["fraction"][key]
        assert row_of(page, name) == [f"{round(share * total):,}", f"{100 * share:.1f} %"]
    assert row_of(page, "all trainable") == [f"{total:,}", "100 %"]
    assert f"Jaccard index {summary['jaccard']:.3f}" in page.text["importance"]
    by_module = [row_of(page, module) for module in ("q_proj", "down_proj")]
    assert [row[0] for row in by_module] == [f"{2 * RANK * 136:,}", f"{2 * RANK * 200:,}"]
    state = [row_of(page, stage)[1] for stage in ("every element", "SFT", "GRPO")]
    active = [summary["fraction"][f"active_{stage}"] for stage in ("sft", "grpo")]
    assert state == [f"{8 * total:,}", *(f"{8 * round(share * total):,}" for share in active)]


def test_cost_labels_and_recipe(run):
    folder, text, _ = run
    page = Page(text)
    said = "Rollouts, the completions that GRPO learns from, took 2 min 53 s, 70.0 % of its time."
    assert said in page.text["cost"]
    total = sum(METRICS["seconds"].values())
    assert row_of(page, "score") == ["38.4 s", f"{3844 / total:.1f} %", "1.62 GB"]
    assert row_of(page, "grpo") == ["4 min 07 s", f"{24690 / total:.1f} %", "2.41 GB"]
    assert row_of(page, "evaluate")[2] == "–"
    assert row_of(page, "operations", section="labels") == ["40", "20", "0", "100.0 %"]
    assert row_of(page, "a<script>$b$", section="labels")[:3] == ["30", "0", "30"]
    assert "40 of 60 rows (66.7 %) were unanimous" in page.text["labels"]
    assert "gradient norm was not finite in 1 of 9 logged steps" in page.text["training"]
    recipe = (folder / "recipe.yaml").read_text()
    assert recipe in page.text["recipe"]
    assert html.escape(recipe) in text
    assert text.lower().count("<script") == text.count("<script>") == 1, "the page's own alone"


def test_the_watched_loss_says_what_was_kept_and_why(run):
    folder, text, _ = run
    said = Page(text).text["training"]
    assert "on 48 rows that no stage trains on, before GRPO and at its checkpoints" in said
    assert "The run keeps step 40 of 60 (the dot): the last checkpoint whose loss is at most 0.6, 0.1 above" in said
    assert "System 1: loss on rows put aside: 0.5 at step 0, 0.55 at step 20, 0.59 at step 40, 0.7 at" in text
    watched = read_json(folder / "grpo/watched.json")
    figures = SimpleNamespace(draw=lambda name, panels, caption: caption)
    lowest = _watched(watched | {"rise": 0.01, "kept": 20}, figures)  # type: ignore[arg-type]
    assert "keeps step 20 of 60 (the dot): the lowest loss, as no checkpoint&#x27;s was at most 0.51" in lowest


def test_agreement_is_that_of_the_votes(run):
    page = Page(run[1])
    # 60 rows: operations says 1 unless i % 3 == 0, the other says 1 where i is odd and else nothing.
    both = [i for i in range(60) if i % 2]
    alike = [i for i in both if i % 3]
    text = page.text["agreement"]
    assert f"The voters split on {len(both) - len(alike)} of 60 rows" in text
    chance = sum((n / 60) ** 2 for n in (30 + len(alike), 30 - len(alike)))
    kappa = (len(alike) / len(both) - chance) / (1 - chance)
    assert f"Fleiss' κ is {kappa:.3f} (poor)" in text
    # Ties have no majority, so operations is always with it.
    assert row_of(page, "operations", section="agreement") == ["40", "0", "0", "0", "10", "0", "100.0 %"]
    assert row_of(page, "a<script>$b$", section="agreement") == ["20", "0", "20", "0", "0", "10", "100.0 %"]
    assert row_of(page, "What is 3 + 3?") == ["a<script>$b$", "operations", "System\xa02", "50 % of votes"]
    assert "teacher" not in [row[0] for row in page.rows if row]


def test_agreement_has_the_majority_that_made_the_labels(tmp_path):
    """One voter of weight 3 against two: majority panel, confusion table, split rows and label agree."""
    votes = [{"a": 1, "b": 2, "c": 2}, {"a": 2, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}]
    weights = {"a": 3.0}
    cast = {name: [row[name] for row in votes] for name in "abc"}
    plain = Dataset.from_dict({"id": list("xyz"), "prompt": list("xyz"), "split": ["train"] * 3})
    labelled = label(plain, [], cast, weights=weights)
    assert labelled["system"] == [1, 2, 1]
    write_jsonl(tmp_path / "labels.jsonl", labelled)
    write_json(tmp_path / "recipe.yaml", {"model": "m", "label": {"weights": weights}})
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    assert row_of(page, "a", section="agreement") == ["2", "0", "0", "0", "1", "0", "100.0 %"]
    assert row_of(page, "b", section="agreement") == ["1", "1", "0", "1", "0", "0", "33.3 %"]
    panel = [str(a["aria-label"]) for tag, a in page.elements if tag == "svg"][-1]
    assert panel == "Votes equal to the majority: a 100.0 %; b 33.3 %; c 33.3 %."
    assert row_of(page, "a", section="labels")[-1] == "100.0 %"
    assert row_of(page, "x", section="agreement") == ["a", "b, c", "System\xa01", "60 % by weight"]
    assert "On average the majority has 73.3 % of a row's votes, by weight; 1 of 3 rows" in page.text["labels"]
    text = page.text["agreement"]
    assert "The majority is by the recipe's weights" in text
    assert "κ counts every vote alike, whatever its weight." in text
    # Without weights the votes of two are the majority, and the page does not speak of weights.
    write_json(tmp_path / "recipe.yaml", {"model": "m", "label": None})
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    assert row_of(page, "a", section="agreement")[-1] == "33.3 %"
    assert "weight" not in page.text["agreement"] + page.text["labels"]


def test_agreement_says_what_teachers_took(tmp_path):
    def vote(vote, outcome="answered", **values):
        return {"vote": vote, "outcome": outcome, "latency": 0.5, "tokens_in": 100, "tokens_out": 7, "calls": 2,
                "cost": 0.001, **values}  # fmt: skip

    votes = [{"a": vote(1), "b": vote(2, latency=2.0)}, {"a": vote(None, "refused"), "b": {"vote": None,
             "outcome": "not_asked"}}, {"a": vote(2), "b": vote(2, tokens_in=None, cost=0.0)}]  # fmt: skip
    write_jsonl(tmp_path / "votes.jsonl", [{"id": str(i), "votes": said} for i, said in enumerate(votes)])
    write_jsonl(tmp_path / "labels.jsonl",
                [{"id": str(i), "prompt": [{"role": "user", "content": "x" * 500}], "system": 2, "split": "train",
                  "votes": {name: v["vote"] for name, v in said.items()}, "agreement": 0.5, "decided_by": "person"}
                 for i, said in enumerate(votes)])  # fmt: skip
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    took = [row for row, place in zip(page.rows, page.places) if place == "agreement" and len(row) == 8]
    assert ["a", "2", "1 | 1 refused", "6", "0.50 s", "300", "21", "0.003"] in took
    assert ["b", "2", "1 | 1 not asked", "4", "2.00 s", "100", "14", "0.001"] in took
    assert row_of(page, "x" * 159 + "…") == ["a", "b", "System\xa02", "a person"]


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (["recipe.yaml"], ["metrics.json", "scores.safetensors", "partition.safetensors", "labels.jsonl"]),
        (["labels.jsonl"], ["metrics.json", "scores.safetensors", "partition.safetensors"]),
        (["scores.safetensors"], ["metrics.json", "partition.safetensors", "labels.jsonl"]),
        (["partition.safetensors"], ["metrics.json", "scores.safetensors", "labels.jsonl"]),
        (["metrics.json"], ["scores.safetensors", "partition.safetensors", "labels.jsonl"]),
        (["sft/log_history.json"], ["grpo/log_history.json", "metrics.json", "scores.safetensors"]),
    ],
)
def test_missing_stages_are_said(tmp_path, run, kept, missing):
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((run[0] / name).read_bytes())
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    text = " ".join(page.text.values())
    assert [a["id"] for tag, a in page.elements if tag == "section"] == list(SECTIONS)
    for name in missing:
        assert f"{name} is missing, because stage" in text
    for name in kept:
        assert f"{name} is missing" not in text


@pytest.mark.parametrize(
    ("granularity", "selection"),
    [("tile", "scores"), ("rank", "scores"), ("element", "random"), ("element", "all")],
)
def test_other_partitions(tmp_path, granularity, selection):
    made = make_partition(tmp_path, granularity, selection)
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    share = made.summary()["fraction"]["shared"]
    assert row_of(page, "shared")[1] == f"{100 * share:.1f} %"
    assert row_of(page, f"{granularity} (this run)")


@pytest.mark.parametrize("granularity", elements.GRANULARITIES)
@pytest.mark.parametrize("twin", [True, False])
def test_keep_curve_needs_what_the_partition_keeps(granularity, twin):
    scores = make_scores(3, twin)
    made = partition(scores, make_scores(4, twin), theta=0.7, granularity=granularity)
    arrays = {name: elements.trainable(name, t, scores.metadata["rank"]) for name, t in scores.items()}
    curve = elements.keep_curve(arrays, granularity)
    kept = sum(int(mask.sum()) for mask in made.kept(1).values())
    assert curve.needed(0.7) == pytest.approx(kept / sum(a.size for a in arrays.values()), abs=1e-12)
    held = sum(float(scores[name][mask].sum(dtype=torch.float64)) for name, mask in made.kept(1).items())
    total = sum(float(t.sum(dtype=torch.float64)) for t in scores.values())
    assert curve.kept(curve.needed(0.7)) == pytest.approx(held / total, abs=1e-9)
    assert np.all(np.diff(curve.score) >= 0)


def test_layers_are_in_numeric_order():
    codes = {f"m.layers.{i}.mlp.{m}.lora_A.default.weight": np.array([[0, 3]]) for i in (10, 2) for m in ("up", "w")}
    regions = elements.region_map(codes)
    assert regions.layers == ["2", "10"]
    assert regions.modules == ["up", "w"]
    assert regions.counts.tolist() == [[[1, 0, 0, 1]] * 2] * 2


def test_running_again_replaces_page_and_figures(run):
    folder, text, _ = run
    (folder / "figures/old.png").write_bytes(b"")
    assert report(folder).read_text(encoding="utf-8") == text
    assert not (folder / "figures/old.png").exists()


def test_unusable_folders_get_one_line(tmp_path, run):
    with pytest.raises(InputError, match="no such folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no artefact of a run"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "scores.safetensors").write_bytes((run[0] / "scores.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"scores\.safetensors: corrupt or truncated"):
        report(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes((run[0] / "scores.safetensors").read_bytes())
    other = {name: t for name, t in make_scores(1).items() if "q_proj" in name}
    partition(other, other, rank=RANK).save(tmp_path / "partition.safetensors")
    with pytest.raises(InputError, match=r"partition\.safetensors: does not fit"):
        report(tmp_path)


def test_a_run_of_the_quickstart_s_recipe_is_shown_what_other_seeds_gave(tmp_path):
    study = read_json(yardsticks.FIGURES)

    def shown(recipe):
        return yardsticks.yardstick(Artefacts(tmp_path, datetime.now(UTC), recipe=recipe))

    recipe = {**copy.deepcopy(study["recipe"]), "seed": 7, "output_dir": "elsewhere"}
    page = shown(recipe)
    for arm, figures in study["arms"].items():
        assert f"<td>{figures['seeds']}</td>" in page, arm
        assert f"{100 * figures['system2']['last'][0]:.1f} %" in page
    # A run of before a key had its default.
    del recipe["partition"]["system1_cost"]
    assert shown(recipe) == page
    assert shown({**recipe, "partition": {**recipe["partition"], "theta": 0.5}}) == ""
    assert shown({**recipe, "data": {**recipe["data"], "sources": []}}) == ""
    assert shown({}) == ""


def test_a_metric_of_the_user_s_is_named_and_shown_as_a_mean(tmp_path):
    made = make_partition(tmp_path)
    write_training(tmp_path, made)
    groups = ("all", "system1", "system2")
    means = {"base": (12.0, -3.25, 1.5), "sft": (14.5, 2.0, 1.25), "grpo": (15.0, 1.0, 2.25)}
    by_model = {step: dict(zip(groups, values)) for step, values in means.items()}
    metrics = {
        "metric": "my_<metrics>:words",
        "mean": by_model,
        "interval": {step: {k: [v - 1, v + 2] for k, v in values.items()} for step, values in by_model.items()},
        "interval_by": dict.fromkeys(means, "bootstrap"),
        "n": {step: dict(zip(groups, (38, 20, 18))) for step in means},
        "none": {"base": {}, "sft": {"all": 2, "system2": 2}, "grpo": {}},
        "partition": made.summary(),
    }
    write_json(tmp_path / "metrics.json", metrics)
    page = Page(report(tmp_path).read_text())
    cells = row_of(page, "System 1", "20")
    assert cells == ["-3.25 | -4.25 to -1.25 | 20 rows", "2 | 1 to 4 | 20 rows", "1 | 0 to 3 | 20 rows", "+5.25", "−1"]
    said = page.text["accuracy"]
    assert "The mean of my_<metrics>:words over held-out rows" in said
    assert "2 answers have no value, since my_<metrics>:words gave None" in said
    assert "right answers" not in said
    assert "GRPO cost System 1, which SFT had trained, 1 (the two intervals overlap)" in said
    sft = "SFT raised System 1 my_<metrics>:words from -3.25 to 2"
    assert sft in page.text["header"]
    assert "accuracy" not in page.text["header"]


def test_held_out_rows_without_an_answer_leave_a_page(tmp_path):
    write_training(tmp_path, make_partition(tmp_path))
    empty = {"base": {}, "sft": {}, "grpo": {}}
    none = {step: {"all": 9} for step in empty}
    write_json(tmp_path / "metrics.json", {"accuracy": empty, "interval": empty, "n": {}, "none": none})
    assert "The metric gave no value for the held-out rows" in Page(report(tmp_path).read_text()).text["accuracy"]
