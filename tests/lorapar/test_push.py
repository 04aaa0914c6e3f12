"""`lorapar push`: what goes to the hub, held against a stand-in for it on this machine, and what never does."""

import html
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import lorapar
from lorapar.adapter.attach import load_adapter
from lorapar.errors import InputError
from lorapar.files import read_jsonl, write_jsonl
from lorapar.pipeline.order import stages_of
from lorapar.pipeline.records import made_with
from lorapar.publishing.base import licence_of, published_base
from lorapar.publishing.redact import LEFT_OUT, Redacted, check_nothing_private, shorten_paths, telling
from lorapar.publishing.verb import hub_datasets
from lorapar.recipe.reading import load_recipe
from lorapar.stage import Run
from tests.lorapar.test_adapter import logits

from .driver import lorapar as command
from .driver import recipe_values, refused, skipped, succeeds, tree, write_recipe
from .ggufs import save
from .hub_stand_in import TOKEN, Hub
from .test_benchmarking import task_file

NAME = "ada/sums"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorapar.json",
         "lorapar_partition.safetensors", "metrics.json", "recipe.yaml", "report.html", "tokenizer.json",
         "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """The stand-in, with a token that it knows; huggingface_hub has read the environment when it was imported."""
    hub = Hub().start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.stop()


@pytest.fixture
def nobody(monkeypatch, tmp_path: Path) -> None:
    """No token of whoever runs the tests."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.fixture
def no_report(monkeypatch) -> None:
    """For tests of what the hub says: drawing the report takes most of a tiny run's push."""
    # By its name: `lorapar.report` is the function.
    verb = importlib.import_module("lorapar.publishing.verb")
    monkeypatch.setattr(verb, "report", lambda folder, *_, **__: (folder / "report.html").write_text("x"))


def push(recipe: Path, run: Path, *words: str) -> tuple[int, str, str]:
    return command("push", recipe, NAME, "--output_dir", run, *words)


def pushed(hub: Hub, recipe: Path, run: Path, *words: str) -> dict[str, bytes]:
    """What the repository holds after a push that must succeed."""
    code, _, err = push(recipe, run, *words)
    assert code == 0, err
    return hub.repositories[NAME]


def there(*_: str) -> bool:
    """A hub that has every name."""
    return True


def as_if_made_by(run: Path, recipe: Path) -> Path:
    """Have a run's records say that its stages were done with a recipe and the files that are there; the recipe."""
    (run / "recipe.yaml").write_text(recipe.read_text())
    this, stages = Run(load_recipe(recipe), run), json.loads((run / "stages.json").read_text())
    for stage in stages_of(this.recipe):
        stages[stage.name]["made_with"] = made_with(stage, this)
    (run / "stages.json").write_text(json.dumps(stages))
    return recipe


def as_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_push_is_one_commit_of_what_the_run_made(hub: Hub, recipe_file: Path, finished: Path, tmp_path, tiny_folder):
    before = tree(finished)
    code, out, err = push(recipe_file, finished)
    assert code == 0, err
    assert out.startswith(f"{hub.url}/{NAME}/commit/{'0' * 40}: {len(FILES)} files, ")
    files = hub.repositories[NAME]
    assert set(files) == FILES
    assert [sorted(named) for _, named in hub.commits] == [sorted(FILES)]
    assert hub.private[NAME] is False
    for name in ("adapter_model.safetensors", "lorapar.json", "tokenizer.json"):
        assert files[name] == (finished / "adapter" / name).read_bytes(), name
    assert files["lorapar_partition.safetensors"] == (finished / "partition.safetensors").read_bytes()
    assert tree(finished) == before
    folder = as_folder(files, tmp_path / "there")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    trained = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), finished / "grpo")
    torch.testing.assert_close(logits(plain), logits(trained), rtol=1e-5, atol=1e-5)
    assert lorapar.Partition.load(folder / "lorapar_partition.safetensors").metadata["theta"] == 0.9


def test_no_path_of_this_machine_goes(hub: Hub, recipe_file: Path, finished: Path, tiny_folder: Path, tmp_path: Path):
    private = {str(finished), str(tiny_folder), str(tiny_folder.parent), str(tmp_path), str(Path.home())}
    for name, content in pushed(hub, recipe_file, finished).items():
        assert not [text for text in private - {"/"} if text.encode() in content], name
    files = hub.repositories[NAME]
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["model"]["name"], recipe["output_dir"]) == (f"./{tiny_folder.name}", "run")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == f"./{tiny_folder.name}"
    card = files["README.md"].decode()
    assert "has no name on the hub: ask for it" in card
    assert "  model.safetensors\n" in card


def test_a_file_that_names_the_run_s_folder_is_not_sent(hub: Hub, recipe_file: Path, finished: Path, no_report):
    (finished / "adapter" / "chat_template.jinja").write_text(f"see {finished}/run.log")
    says = ("chat_template.jinja: holds", "nothing was published")
    refused("push", recipe_file, NAME, "--output_dir", finished, says=says)
    assert hub.seen == []


def test_only_what_export_writes_goes_of_the_adapter_s_folder(hub: Hub, recipe_file: Path, finished: Path, no_report):
    (finished / "adapter" / ".env").write_text("KEY=x")
    (finished / "adapter" / "rows.csv").write_text("private")
    (finished / "adapter" / "checkpoint").mkdir()
    _, out, _ = push(recipe_file, finished, "--dry-run")
    line = next(line for line in out.splitlines() if line.startswith("left out: "))
    assert line.endswith("adapter/.env, adapter/checkpoint/, adapter/rows.csv")
    assert set(pushed(hub, recipe_file, finished)) == FILES


def test_a_dry_run_says_what_would_go_and_asks_nobody(hub, recipe_file, finished, nobody, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = tree(finished)
    code, out, err = push(recipe_file, finished, "--dry-run", "--private")
    assert (code, err) == (0, "")
    assert out.startswith("nothing was sent; ")
    assert "a private repository" in out
    listed = {line.split()[0] for line in out.splitlines()[1 : 1 + len(FILES)]}
    assert listed == FILES
    for name in ("answers.jsonl", "labels.jsonl", "sft/", "grpo/", "scores.safetensors"):
        assert name in next(line for line in out.splitlines() if line.startswith("left out: "))
    assert "changed, so that no path or address of this machine goes: model.name, output_dir" in out
    assert "## Results" in out
    assert hub.seen == []
    assert tree(finished) == before


def test_the_card_has_the_table_of_accuracies_and_how_to_load(hub: Hub, recipe_file: Path, finished: Path, no_report):
    files = pushed(hub, recipe_file, finished)
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert {"lora-par", "lora"} <= set(head["tags"])
    # A base that nobody can look up is no base_model.
    assert "base_model" not in head
    metrics = json.loads(files["metrics.json"])
    for name, title in (("base", "base"), ("sft", "after SFT"), ("grpo", "after GRPO")):
        low, high = metrics["interval"][name]["system2"]
        value = metrics["accuracy"][name]["system2"]
        line = next(line for line in card.splitlines() if line.startswith(f"| {title} |"))
        assert f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in line
    assert f"all rows (n = {metrics['n']['all']})" in card
    for words in (f'PeftModel.from_pretrained(base, "{NAME}")', "## Prompt", "An answer ends with", "@inproceedings{"):
        assert words in card


def test_a_hub_id_in_the_base_s_own_config_is_the_base(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {"base_model_name_or_path": str(folder), "revision": None}
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "owner/model"}))
    base = published_base(settings, str(folder), there)
    assert (base.name, base.on_hub, base.called) == ("owner/model", True, "owner/model")
    assert base.note.endswith("published as owner/model's")
    assert "Where that folder's weights had been changed since" in base.facts[0]
    # A relative folder of whoever trained the base looks like a hub id.
    base = published_base(settings, str(folder), lambda *_: False)
    assert (base.name, base.on_hub, base.called) == ("mine", False, "./mine")
    base = published_base(settings, str(folder), lambda *_: None)
    assert base.on_hub
    assert "not checked: whether the hub has it" in base.note
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "/data/m", "architectures": ["LlamaForCausalLM"]}))
    base = published_base(settings, str(folder), there)
    assert (base.name, base.on_hub) == ("mine", False)
    assert "a local model (LlamaForCausalLM)" in base.facts[0]
    (folder / "model.safetensors").write_bytes(b"x")
    assert "  model.safetensors" in "\n".join(published_base(settings, str(folder), there).facts)
    other = published_base(settings, str(folder), there, same_files=False)
    assert "  model.safetensors" not in "\n".join(other.facts)
    assert "changed or moved" in other.note
    assert published_base({"base_model_name_or_path": "a/b", "revision": "c0"}, "a/b", there).revision == "c0"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: mit\n")
    assert licence_of(folder) == "apache-2.0"


@pytest.fixture
def named_base(tiny_folder: Path) -> Iterator[None]:
    """The base says that it is owner/tiny."""
    config = tiny_folder / "config.json"
    before, stat = config.read_text(), config.stat()
    config.write_text(json.dumps({**json.loads(before), "_name_or_path": "owner/tiny"}))
    yield
    config.write_text(before)
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_base_of_a_name_that_the_hub_has_not_is_unknown(hub, recipe_file, finished, named_base, no_report):
    code, out, _ = push(recipe_file, finished, "--dry-run")
    assert code == 0
    assert "not checked: whether the hub has it" in out
    assert hub.seen == []
    files = pushed(hub, recipe_file, finished)
    assert "GET /api/models/owner/tiny" in hub.seen
    assert b"base_model" not in files["README.md"].split(b"---")[1]
    assert b"owner/tiny" not in files["README.md"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"].startswith("./")
    hub.fails = {"GET /api/models/owner/tiny": (500, "down")}
    code, _, err = push(recipe_file, finished)
    assert (code, err) == (1, "lorapar: error: owner/tiny: the hub refuses (500: down)\n")


def test_a_local_base_is_taken_for_none_of_the_hub_s(tmp_path: Path, tiny_folder: Path, finished: Path):
    """A folder called gpt2: PEFT alone is given the base, and its automatic class finds none rather than another."""
    folder = Path(shutil.copytree(finished / "adapter", tmp_path / "there"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    base = published_base(settings | {"base_model_name_or_path": str(tmp_path / "gpt2")}, "gpt2", there)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base.called}))
    with pytest.raises(OSError, match=r"\./gpt2"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)


def test_a_base_with_a_hub_id_is_the_card_s_base_model(hub, recipe_file, finished, named_base, no_report):
    hub.repositories["owner/tiny"], hub.private["owner/tiny"] = {}, False
    files = pushed(hub, recipe_file, finished)
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("owner/tiny", "adapter")
    assert "base_model:adapter:owner/tiny" in head["tags"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/tiny"
    assert yaml.safe_load(files["recipe.yaml"])["model"]["name"] == "owner/tiny"


def test_private_is_kept_and_a_public_repository_is_not_taken_for_one(
    hub: Hub, recipe_file: Path, finished: Path, no_report
):
    pushed(hub, recipe_file, finished, "--private")
    assert hub.private[NAME] is True
    # Again into the same: one more commit, of what is there.
    pushed(hub, recipe_file, finished, "--private")
    assert len(hub.commits) == 2
    hub.private[NAME] = False
    line = refused("push", recipe_file, NAME, "--output_dir", finished, "--private")
    assert "exists and is public" in line
    assert len(hub.commits) == 2


def test_what_else_a_repository_holds_stays(hub: Hub, recipe_file: Path, finished: Path, no_report):
    hub.repositories[NAME], hub.private[NAME] = {"notes.md": b"mine", "vocab.txt": b"mine", "README.md": b"mine"}, False
    code, out, _ = push(recipe_file, finished)
    assert code == 0
    assert "README.md was another's and has been replaced" in out
    files = hub.repositories[NAME]
    assert (files["notes.md"], files["vocab.txt"]) == (b"mine", b"mine")


def test_what_an_earlier_push_left_is_deleted(hub: Hub, recipe_file: Path, finished: Path, no_report):
    template = finished / "adapter" / "chat_template.jinja"
    template.write_text("of before")
    assert "chat_template.jinja" in pushed(hub, recipe_file, finished)
    hub.repositories[NAME]["notes.md"] = b"mine"
    template.unlink()
    (finished / "metrics.json").unlink()
    code, out, err = push(recipe_file, finished)
    assert code == 0, err
    assert "deleted, of an earlier push: chat_template.jinja, metrics.json" in out
    assert set(hub.repositories[NAME]) == (FILES - {"metrics.json"}) | {"notes.md"}
    assert len(hub.commits) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_repository_with_a_whole_model_is_refused(hub: Hub, recipe_file: Path, finished: Path, no_report, name: str):
    hub.repositories[NAME], hub.private[NAME] = {name: b"x", "README.md": b"mine"}, False
    refused("push", recipe_file, NAME, "--output_dir", finished, says=(f"holds a whole model ({name})",))
    assert hub.repositories[NAME] == {name: b"x", "README.md": b"mine"}


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (
            {"POST /api/repos/create": (401, "Invalid user token")},
            2,
            "does not know the token (401: Invalid user token)",
        ),
        (
            {"POST /api/repos/create": (403, "not yours"), "GET /api": (404, "")},
            2,
            "may not write there (403: not yours)",
        ),
        ({".*/commit/main": (403, "no")}, 2, "may not write there"),
        ({".*/preupload/": (404, "no such repo")}, 2, "finds no such owner or repository (404: no such repo)"),
        ({".*/commit/main": (412, "A commit has happened since")}, 1, "somebody else has changed it meanwhile"),
        ({".*/commit/main": (409, "busy")}, 1, "push again"),
        ({".*/commit/main": (400, "base_model is wrong")}, 2, "the hub refuses (400: base_model is wrong)"),
        ({"POST /api/repos/create": (500, "down")}, 1, "the hub refuses (500: down)"),
        ({"PUT /lfs/": (403, "expired")}, 2, "403: expired"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, recipe_file: Path, finished: Path, no_report, fails, code, says):
    hub.fails = fails
    got, out, err = push(recipe_file, finished)
    assert (got, out) == (code, "")
    assert err.startswith(f"lorapar: error: {NAME}: ")
    assert says in err
    assert len(err.splitlines()) == 1
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, recipe_file: Path, finished: Path, no_report):
    hub.stop()
    code, _, err = push(recipe_file, finished)
    assert code == 1
    assert f"{hub.url} cannot be reached" in err
    assert len(err.splitlines()) == 1


def test_without_a_token_nothing_is_done(hub: Hub, recipe_file: Path, finished: Path, nobody, monkeypatch):
    says = ("no token for the hub", "HF_TOKEN", "hf auth login")
    refused("push", recipe_file, NAME, "--output_dir", finished, says=says, alone=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("push", recipe_file, NAME, "--output_dir", finished, says=("HF_HUB_OFFLINE is set",), alone=True)
    assert hub.seen == []


@pytest.mark.parametrize("name", ["sums", "a/b/c", "ada/su ms", "ada/", "/sums", "ada/sums.git", "../sums", "ada--x/y"])
def test_a_name_that_is_no_repository_is_refused(hub: Hub, recipe_file: Path, finished: Path, name: str):
    refused("push", recipe_file, name, "--output_dir", finished, says=("OWNER/NAME: got",), alone=True)
    assert hub.seen == []


def test_a_run_that_is_not_exported_or_was_trained_since_is_refused(hub, recipe_file, finished, tmp_path):
    words = ("push", recipe_file, NAME, "--dry-run", "--output_dir")
    refused(*words, tmp_path / "none", says=("holds no recipe.yaml",), alone=True)
    path = finished / "stages.json"
    stages = json.loads(path.read_text())
    path.write_text(json.dumps({name: record for name, record in stages.items() if name != "export"}))
    refused(*words, finished, says=("has not been exported; run `lorapar export` first",), alone=True)
    for name in ("grpo", "evaluate"):
        path.write_text(json.dumps(stages | {name: {"started": stages[name]["fingerprint"]}}))
        refused(*words, finished, says=(f"{name} has not been finished; run `lorapar run` again",), alone=True)
    path.write_text(json.dumps(stages))
    weights = finished / "grpo" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((finished / "sft" / "adapter_model.safetensors").read_bytes())
    refused(*words, finished, says=("evaluate is of another grpo/adapter_model.safetensors",), alone=True)
    (finished / "metrics.json").rename(finished / "away.json")
    refused(*words, finished, says=("export is of another grpo/adapter_model.safetensors",), alone=True)
    (finished / "away.json").rename(finished / "metrics.json")
    weights.write_bytes(before)
    labels = (finished / "labels.jsonl").read_text()
    (finished / "labels.jsonl").write_text(labels.replace('"system": 1', '"system": 2', 1))
    refused(*words, finished, says=("score is of another labels.jsonl",), alone=True)
    (finished / "labels.jsonl").write_text(labels)
    (finished / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    refused(*words, finished, says=("adapter_model.safetensors is corrupt",), alone=True)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("changed", "stage"),
    [
        (("--sft.learning_rate", "7"), "sft"),
        (("--lora.lora_alpha", "99"), "score"),
        (("--partition.theta", "0.5"), "partition"),
        (("--data.held_out", "5"), "label"),
        (("--evaluate.limit", "1"), "evaluate"),
    ],
)
def test_a_recipe_that_the_stages_were_not_made_by_is_refused(
    hub: Hub, recipe_file: Path, finished: Path, no_pictures, changed: tuple[str, str], stage: str
):
    succeeds("report", recipe_file, "--output_dir", finished, "--update", *changed)
    says = (f"{stage} is of another recipe; run `lorapar run` again",)
    refused("push", recipe_file, NAME, "--output_dir", finished, *changed, says=says, alone=True)
    # What the line advises helps: that stage is the first that is done again.
    assert skipped(succeeds("label", recipe_file, "--output_dir", finished, *changed)) == ["label"] * (stage != "label")
    assert hub.seen == []


def test_a_run_of_an_earlier_version_goes_by_its_fingerprints(
    hub: Hub, recipe_file: Path, finished: Path, no_pictures, no_report
):
    stages = json.loads((finished / "stages.json").read_text())
    for record in stages.values():
        record.pop("made_with")
    (finished / "stages.json").write_text(json.dumps(stages))
    pushed(hub, recipe_file, finished)
    changed = ("--sft.learning_rate", "7")
    succeeds("report", recipe_file, "--output_dir", finished, "--update", *changed)
    says = ("sft is of another recipe, or other files",)
    refused("push", recipe_file, NAME, "--output_dir", finished, *changed, says=says, alone=True)


def test_what_changes_no_result_keeps_a_run_fit_to_be_pushed(
    hub: Hub, recipe_file: Path, finished: Path, tiny_folder: Path, no_report, tmp_path: Path, monkeypatch
):
    """The folder is a copy, elsewhere; its base has been touched; scores have been deleted for their size."""
    monkeypatch.chdir(tmp_path)
    (finished / "scores.safetensors").unlink()
    weights = tiny_folder / "model.safetensors"
    stat = weights.stat()
    os.utime(weights)
    keys = ("--evaluate.batch_size", "3", "--score.batch_size", "2", "--export.gguf",
            "[adapter]", "--evaluate.tasks", "[gsm8k]", "--sft.longest_first", "false")  # fmt: skip
    try:
        card = pushed(hub, recipe_file, finished, *keys)["README.md"]
    finally:
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert b"sha256sum" not in card


@pytest.mark.slow
def test_a_run_that_was_gone_on_with_can_be_pushed(hub: Hub, tmp_path: Path, monkeypatch):
    """Drawn again, with benchmarks and a GGUF file; then a stage done again, and all that follows."""
    recipe, run = write_recipe(tmp_path / "r.yaml", recipe_values(save(tmp_path / "base"))), tmp_path / "run"
    succeeds("run", recipe, "--output_dir", run)
    docs = tmp_path / "tasks"
    task = task_file(docs, "own")
    write_jsonl(docs / "docs.jsonl", [{"question": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(4)])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    words = (recipe, "--output_dir", run)
    (run / "report.html").unlink()
    succeeds("report", *words)
    succeeds("evaluate", *words, "--tasks", task)
    succeeds("export", *words, "--gguf", "adapter")
    card = pushed(hub, recipe, run)["README.md"].decode()
    assert "| own, 0-shot | exact_match | 4 |" in card
    assert "sha256sum" in card
    succeeds("sft", *words, "--update", "--sft.max_steps", "2")
    more = ("--sft.max_steps", "2")
    refused("push", recipe, NAME, "--output_dir", run, *more, says=("grpo is of another sft/",), alone=True)
    succeeds("run", *words, *more)
    assert "max_steps 2" in pushed(hub, recipe, run, *more)["README.md"].decode()


def test_relative_paths_are_shortened_and_names_are_not(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "rows").mkdir(parents=True)
    paths = {"../clients/acme/rows.jsonl": "rows.jsonl", "clients/rows.csv.gz": "rows.csv.gz", "own/rows": "rows",
             "cust/acme/base": "base", "./acme/m": "m"}  # fmt: skip
    names = ["openai/gsm8k:main", "openai/gsm8k", "reasoning_gym:chain_sum", "Qwen/Qwen2.5-0.5B", "s3://bucket/rows"]
    shown = Redacted({"data": {"sources": [{"name": name} for name in (*paths, *names)]}})
    assert [source["name"] for source in shown.values["data"]["sources"]] == [*paths.values(), *names]
    assert shown.private == set(paths)
    teacher = {"model": "accounts/org/models/judge", "template": "words/own.txt"}
    assert Redacted(teacher).values == {**teacher, "template": "own.txt"}
    metrics = Redacted({"tasks": {"acme/own.yaml": {"n": 4}, "gsm8k": {}}, "files": {"acme/own.yaml": 1}})
    assert metrics.values == {"tasks": {"own.yaml": {"n": 4}, "gsm8k": {}}, "files": {"acme/own.yaml": 1}}
    # By chance another's file may hold a relative path; the report shows its last part.
    assert shorten_paths("<td>../clients/acme/rows.jsonl</td>", shown.private) == "<td>rows.jsonl</td>"


def test_keys_and_private_addresses_are_taken_out_wherever_they_stand():
    key, public = "hf_" + "a" * 30, "https://api.example.com/v1"
    given = {
        "access_token": "x1", "key": "x2", "api-key": "x3", "credential": {"a": "x4"}, "apiKey": "x5", "token": ["x6"],
        "endpoints": ["https://h.example.com/a", "https://h.example.com/b"],
        "note": f"asks with {key} at http://10.0.0.5/x", "also": ["http://ada:pw@example.com/", public],
        "signed": f"{public}?x=1&X-Amz-Signature=ab", "here": "http://judge:8000/v1", "file": "file:///home/ada/x",
    }  # fmt: skip
    shown = Redacted({"extra": given}).values["extra"]
    for name in ("access_token", "key", "api-key", "credential", "apiKey", "token", "signed", "here", "file"):
        assert shown[name] == LEFT_OUT, name
    assert shown["endpoints"] == [LEFT_OUT, LEFT_OUT]
    assert shown["note"] == f"asks with {LEFT_OUT} at {LEFT_OUT}"
    assert shown["also"] == [LEFT_OUT, public]
    assert Redacted({"api_key_env": "sk-" + "b1" * 12}).values == {"api_key_env": LEFT_OUT}
    kept = {"api_key_env": "JUDGE_KEY", "eos_token": "</s>", "pad_token": "<pad>", "max_new_tokens": 4, "key": None,
            "system_prompt": "It is at http://localhost:8000.", "num_tokens": 3, "keyboard": "sk-hynix"}  # fmt: skip
    assert Redacted(kept).values == kept
    # A word that stood under such a key may stand anywhere.
    assert telling(["question", "hf_abcdefgh"]) == ["hf_abcdefgh"]


def test_a_key_in_a_prompt_stops_the_push(
    hub: Hub, recipe_file: Path, finished: Path, tiny_folder, no_report, tmp_path
):
    key = "hf_" + "a" * 30
    card = finished / "adapter" / "README.md"
    card.write_text(card.read_text().replace("What is 2 + 3?", f"{key} What is 2 + 3?"))
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    values["data"]["prompt"] = f"{key} {{prompt}}"
    named = as_if_made_by(finished, write_recipe(tmp_path / "named.yaml", values))
    refused("push", named, NAME, "--output_dir", finished, says=("README.md: holds 'hf_aaa",))


def test_relative_names_stay_here(
    hub: Hub, recipe_file: Path, finished: Path, tiny_folder: Path, tmp_path, monkeypatch
):
    """Of a base and rows that were named from the working directory; one is not there any more."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "clients" / "acme-internal" / "base"
    shutil.copytree(tiny_folder, base)
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    values["model"]["name"] = "clients/acme-internal/base"
    values["data"]["sources"] += [{"name": "acme-internal/rows"}, {"name": "openai/gsm8k:main"}]
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    path = finished / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    named = as_if_made_by(finished, write_recipe(tmp_path / "named.yaml", values))
    hub.datasets = {"openai/gsm8k"}
    _, out, _ = push(named, finished, "--dry-run")
    assert "not checked: whether the hub has the data set acme-internal/rows, openai/gsm8k" in out
    files = pushed(hub, named, finished)
    for name, content in files.items():
        assert b"acme-internal" not in content, name
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert recipe["model"]["name"] == "./base"
    assert [source["name"] for source in recipe["data"]["sources"][-2:]] == ["rows", "openai/gsm8k:main"]
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["datasets"] == ["openai/gsm8k"]


def test_a_damaged_file_is_called_by_its_place_in_the_run(hub: Hub, recipe_file: Path, finished: Path):
    (finished / "answers.jsonl").write_text("{")
    says = (f"{finished / 'answers.jsonl'}: line 1 is corrupt",)
    refused("push", recipe_file, NAME, "--output_dir", finished, says=says, alone=True)


def test_tokens_addresses_and_paths_are_taken_out_of_a_recipe_and_words_are_not(tmp_path: Path):
    teacher = {"model": "judge", "base_url": "http://ada:pw@10.0.0.3:8000/v1", "api_key_env": "KEY",
               "parameters": {"temperature": 0, "extra_headers": {"Authorization": "Bearer x"}}}  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    values = {
        "model": {"name": str(tmp_path / "my model"), "eos_token": "<eos>"},
        "data": {
            "sources": [{"name": str(rows)}, {"name": "~/more.csv"}],
            "prompt": "/no_think",
            "system_prompt": "/x",
        },
        "label": {"teachers": [teacher], "template": r"C:\Users\ada\words.txt"},
        "sft": {"hub_token": "hf_secret", "max_steps": 4, "logging_dir": "/var/log/x"},
        "evaluate": {"tasks": ["gsm8k", "/home/ada/own.yaml"]},
    }
    shown = Redacted(values)
    assert shown.values["model"] == {"name": "my model", "eos_token": "<eos>"}
    assert [source["name"] for source in shown.values["data"]["sources"]] == ["rows.jsonl", "more.csv"]
    assert (shown.values["data"]["prompt"], shown.values["data"]["system_prompt"]) == ("/no_think", "/x")
    assert shown.values["label"]["template"] == "words.txt"
    got = shown.values["label"]["teachers"][0]
    assert got == {**teacher, "base_url": LEFT_OUT, "parameters": {"temperature": 0, "extra_headers": LEFT_OUT}}
    assert shown.values["sft"] == {"hub_token": LEFT_OUT, "max_steps": 4, "logging_dir": "x"}
    assert shown.values["evaluate"]["tasks"] == ["gsm8k", "own.yaml"]
    assert "sft.hub_token" in shown.replaced
    assert values["sft"]["hub_token"] == "hf_secret"


@pytest.mark.parametrize("words", [(), ("--with-answers",)])
def test_rows_and_answers_go_only_where_they_are_asked_for(hub: Hub, recipe_file: Path, finished: Path, words):
    held_out = next(row for row in read_jsonl(finished / "labels.jsonl") if row["split"] == "held_out")
    shown = html.escape(held_out["prompt"]).encode() in pushed(hub, recipe_file, finished, *words)["report.html"]
    assert shown is bool(words)
    assert not {"answers.jsonl", "labels.jsonl", "votes.jsonl"} & set(hub.repositories[NAME])


def test_benchmarks_are_on_the_card_with_their_standard_errors(hub: Hub, recipe_file: Path, finished: Path, no_report):
    figures = {name: {"acc,none": {"value": 0.25 + i / 8, "stderr": 0.0312}} for i, name in enumerate(["base", "sft"])}
    metrics = json.loads((finished / "metrics.json").read_text())
    tasks = {"sums": {"n": 64, "of": 96, "shots": 0, **figures, "grpo": {"acc,none": {"value": 0.5, "stderr": None}}}}
    (finished / "metrics.json").write_text(json.dumps(metrics | {"tasks": tasks}))
    card = pushed(hub, recipe_file, finished)["README.md"].decode()
    assert "| task | metric | documents | base | after SFT | after GRPO |" in card
    assert "| sums, 0-shot | acc | 64 of 96 | 0.25 ± 0.031 | 0.375 ± 0.031 | 0.5 |" in card


def test_a_page_s_paths_are_shortened_and_a_word_of_a_tokenizer_is_no_path(tmp_path: Path):
    private = ["/srv/models/judge & co", "/data", "hf_secret"]
    page = "<td>/srv/models/judge &amp; co</td> /data"
    assert shorten_paths(page, private) == "<td>judge &amp; co</td> /data"
    (tmp_path / "f").write_text(page)
    check_nothing_private([("f", tmp_path / "f")], ["/data"])
    for text in ("/srv/models/judge", "hf_secret"):
        (tmp_path / "f").write_text(f"{page} hf_secret")
        with pytest.raises(InputError, match="f: holds"):
            check_nothing_private([("f", tmp_path / "f")], [text])


def test_a_teacher_called_by_its_folder_is_called_by_its_last_part(hub, recipe_file, finished, tmp_path):
    judge = str(tmp_path / "models" / "judge")
    rows = [row | {"votes": {judge: row["system"]}} for row in read_jsonl(finished / "labels.jsonl")]
    write_jsonl(finished / "labels.jsonl", rows)
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    values["label"]["teachers"] = [{"model": judge}]
    named = write_recipe(tmp_path / "named.yaml", values)
    report = pushed(hub, as_if_made_by(finished, named), finished)["report.html"]
    assert judge.encode() not in report
    assert b"judge" in report


def test_datasets_of_the_hub_are_told_from_files(tmp_path: Path, monkeypatch):
    (tmp_path / "own" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["openai/gsm8k:main", "openai/gsm8k", "data/rows.jsonl", "reasoning_gym:chain_sum", "rows.csv", "own/rows"]
    assert hub_datasets(names, lambda *_: None) == ["openai/gsm8k"]
    assert hub_datasets(names, lambda *_: False) == []


def test_help_names_every_option():
    code, out, _ = command("push", "--help")
    assert code == 0
    for word in ("OWNER/NAME", "--dry-run", "--private", "--with-answers"):
        assert word in out


@pytest.mark.slow
def test_others_load_it_by_its_name(hub: Hub, recipe_file: Path, finished: Path, tiny_folder: Path, tmp_path: Path):
    """Both ends as processes that read the environment themselves."""
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
             "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))} | given
    words = ["-m", "lorapar", "push", str(recipe_file), NAME, "--output_dir", str(finished)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/{NAME}/commit/")
    assert "Traceback" not in done.stderr
    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"model = PeftModel.from_pretrained(base, {NAME!r}).eval()\n"
        f"tokenizer = AutoTokenizer.from_pretrained({NAME!r})\n"
        "ids = tokenizer('2 + 3 =', return_tensors='pt')['input_ids']\n"
        "torch.save([ids, model(input_ids=ids).logits.detach()], sys.argv[2])\n"
    )
    out = tmp_path / "logits.pt"
    command_line = [sys.executable, "-c", program, str(tiny_folder), str(out)]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    ids, theirs = torch.load(out)
    trained = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), finished / "grpo").eval()
    with torch.no_grad():
        ours = trained(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
