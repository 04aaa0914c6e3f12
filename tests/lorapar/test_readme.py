"""README's commands and its example of the backend are what they say."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert "pip install -e '.[quickstart]' && lorapar run examples/quickstart.yaml" in README
    assert "pip install -e '.[test]' && make test" in README
    assert (ROOT / "examples" / "quickstart.yaml").is_file()
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install" in ci
    assert "-e '.[test]' && make test" in ci


def test_readme_opens_with_what_it_does_a_measured_result_and_two_commands():
    before, _, rest = README.partition("\n## ")
    title, what = before.split("\n", 2)[0], before.split("\n\n")[1]
    assert title == "# LoRA-PAR"
    assert what.startswith("**Fine-tune a language model")
    assert "For people who" in what
    assert re.search(r"^\| System 2.*\d+ % \[\d+, \d+\]", before, re.M)
    assert rest.startswith("Set up\n")
    set_up = rest.partition("\n## ")[0]
    assert re.findall(r"```\n(.*?)\n```", set_up, re.DOTALL) == [
        "pip install -e '.[quickstart]' && lorapar run examples/quickstart.yaml",
        "pip install -e '.[test]' && make test",
    ]


def test_the_recipes_of_the_labelling_page_are_recipes(monkeypatch, tmp_path):
    from lorapar import stages
    from lorapar.config import parse
    from lorapar.labeling.stage import panel_of
    from lorapar.recipe_file import parse_yaml

    page = (ROOT / "docs" / "labeling.md").read_text(encoding="utf-8")
    recipes = [parse(parse_yaml(block)) for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]
    assert [len(recipe.label.teachers) for recipe in recipes] == [1, 6, 1]
    assert all(teacher.api_key_env for teacher in recipes[1].label.teachers)
    assert recipes[2].label.teachers[0].base_url is None
    for teacher in recipes[1].label.teachers:
        monkeypatch.setenv(str(teacher.api_key_env), "k")
    # All that is known before a teacher is asked holds of them.
    for recipe, seats, enough in zip(recipes, (1, 6, 1), (1, 3, 2)):
        stages.check_recipe(recipe, tmp_path, "label")
        panel = panel_of(recipe, stages._voter_names(recipe))
        assert panel is not None
        assert (len(panel.seats), panel.enough) == (seats, enough)
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_every_link_inside_the_project_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
