"""What is not installed: each extra that code or text names exists, and is named in one way."""

import re
import tomllib
from pathlib import Path

import pytest

from lorapar import cli
from lorapar.errors import InputError, not_installed
from lorapar.memory.switches import SWITCHES

from .driver import refused

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
CODE = sorted((ROOT / "lorapar").rglob("*.py"))


def test_every_extra_that_is_named_exists():
    named = {extra for _, _, extra, _ in SWITCHES.values() if extra}
    for path in TEXTS:
        named |= set(re.findall(r"lorapar\[(\w+)\]", path.read_text(encoding="utf-8")))
    for path in CODE:
        # The extra is the last argument.
        named |= set(re.findall(r"not_installed\([^\n]*, [\"'](\w+)[\"']\)", path.read_text(encoding="utf-8")))
    assert {"bnb", "liger", "quickstart", "teachers", "train", "vllm"} <= named <= set(EXTRAS)


def test_after_the_set_up_extras_are_named_in_one_way():
    for path in TEXTS:
        text = path.read_text(encoding="utf-8").partition("\n## Set up\n")
        # README's set-up installs a checkout.
        after = text[2].partition("\n## ")[2] if text[1] else text[0]
        assert not re.search(r"pip install -e", after), path
    # And in code by one function.
    assert [path.name for path in CODE if "pip install 'lorapar[" in path.read_text(encoding="utf-8")] == ["errors.py"]
    assert not_installed("x", "train") == "x is not installed; pip install 'lorapar[train]'"


def test_the_command_line_knows_what_the_quickstart_brings():
    names = [re.split(r"[<>=\[]", need)[0].replace("-", "_") for need in (*EXTRAS["train"], *EXTRAS["quickstart"])]
    assert {"yaml" if name == "pyyaml" else name for name in names if name != "lorapar"} == cli.BROUGHT


@pytest.mark.parametrize("verb", ["run", "plan", "doctor"])
def test_a_package_that_the_quickstart_brings_is_named_and_no_other(verb: str, recipe_file: Path, monkeypatch):
    def needs(name: str):
        def fails(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(cli, "_recipe", fails)
        monkeypatch.setattr("lorapar.doctor.doctor", fails)

    words = (verb,) if verb == "doctor" else (verb, recipe_file)
    needs("yaml")
    refused(*words, says=("yaml is not installed; pip install 'lorapar[quickstart]'",), alone=True)
    for name in ("fcntl", "trl.experimental.gone"):
        needs(name)
        with pytest.raises(ModuleNotFoundError, match=name):
            cli.main([str(word) for word in words])


def test_an_endpoint_without_its_client_names_the_extra(monkeypatch):
    from lorapar.labeling.endpoint import EndpointTeacher
    from lorapar.recipe.sections import TeacherConfig

    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    says = r"needs openai, which is not installed; pip install 'lorapar\[teachers\]'"
    with pytest.raises(InputError, match=says):
        EndpointTeacher(TeacherConfig(model="x", base_url="http://127.0.0.1:9/v1"), "label.teachers[0]")
