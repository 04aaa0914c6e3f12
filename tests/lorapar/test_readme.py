"""README's commands and its example of the backend are what they say."""

import re
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = "pip install -e '.[quickstart]' && lorapar run examples/quickstart.yaml"
TEST = "pip install -e '.[test]' && make test"


def test_the_backend_example_runs_and_masks_as_it_says():
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "lorapar_kernels" in block
    )
    names: dict = {}
    exec(code, names)
    gradient, active = names["a"].grad, names["active"]
    assert torch.equal(gradient[~active], torch.zeros_like(gradient[~active]))
    assert gradient[active].abs().sum() > 0
    assert len([line for line in code.splitlines() if line.strip()]) <= 6


def test_the_two_set_up_commands_are_there_and_name_what_exists():
    assert QUICKSTART in README
    assert TEST in README
    assert (ROOT / "examples" / "quickstart.yaml").is_file()


def test_ci_runs_both_commands_as_written_and_holds_nothing_else_than_torch():
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    (line,) = [line for line in lines if TEST in line]
    assert line.startswith(f"({TEST})")
    assert lines[lines.index(line) - 1] == "enter today"
    assert lines[lines.index(QUICKSTART) - 1].startswith("enter first && ")
    # The versions of constraints.txt have an environment, a copy of the tree and a verb of their own.
    (pinned,) = [line for line in lines if "--constraint" in line]
    assert pinned.endswith("make pinned")
    assert lines[lines.index(pinned) - 1].startswith("enter pinned && ")
    assert re.search(r"^pinned:.*\binterpret\b", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_every_week_the_two_commands_run_as_written_on_the_oldest_and_the_newest_torch():
    """And on nothing else that is pinned."""
    file = ROOT / ".github" / "workflows" / "weekly.yml"
    workflow = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    assert set(workflow["on"]) == {"schedule", "workflow_dispatch"}
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", workflow["on"]["schedule"][0]["cron"])
    job = workflow["jobs"]["readme"]
    assert [command["run"] for command in job["strategy"]["matrix"]["command"]] == [QUICKSTART, TEST]
    least = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert least is not None
    wanted = [torch["requirement"] for torch in job["strategy"]["matrix"]["torch"]]
    assert wanted == [f"torch=={least.group(1)}.*", "torch"]
    for step in job["steps"]:
        assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    assert not any("constraint" in step.get("run", "") for step in job["steps"])


def row_of(arm: str, text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))


def test_readme_opens_with_what_it_does_a_measured_result_and_two_commands():
    before, _, rest = README.partition("\n## ")
    title, what = before.split("\n", 2)[0], before.split("\n\n")[1]
    assert title == "# LoRA-PAR"
    assert what.startswith("**Fine-tune a language model")
    assert "For people who" in what
    assert re.search(r"^\| \| System 1 .*\| System 2 ", before, re.M)
    for arm in ("LoRA-PAR", "plain LoRA: every element in both stages", "as many elements, chosen at random"):
        assert len(re.findall(r"\d %(?:\*\*)? \[[\d.]+, [\d.]+\]", row_of(arm, before))) == 4
    assert rest.startswith("Set up\n")
    set_up = rest.partition("\n## ")[0]
    assert re.findall(r"```\n(.*?)\n```", set_up, re.DOTALL) == [QUICKSTART, TEST]


def test_the_recipes_of_the_labelling_page_are_recipes(monkeypatch, tmp_path):
    from lorapar.labeling.stage import panel_of, voter_names
    from lorapar.pipeline.running import check_settings
    from lorapar.recipe.reading import parse, parse_yaml
    from lorapar.stage import Run

    page = (ROOT / "docs" / "labeling.md").read_text(encoding="utf-8")
    recipes = [parse(parse_yaml(block)) for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]
    assert [len(recipe.label.teachers) for recipe in recipes] == [1, 6, 1]
    assert all(teacher.api_key_env for teacher in recipes[1].label.teachers)
    assert recipes[2].label.teachers[0].base_url is None
    for teacher in recipes[1].label.teachers:
        monkeypatch.setenv(str(teacher.api_key_env), "k")
    # All that is known before a teacher is asked holds of them.
    for recipe, members, enough in zip(recipes, (1, 6, 1), (1, 3, 2)):
        check_settings(Run(recipe, tmp_path), ["label"])
        panel = panel_of(recipe, voter_names(recipe))
        assert panel is not None
        assert (len(panel.members), panel.enough) == (members, enough)
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_every_link_inside_the_project_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
