"""A finished run of the tiny model, made once and copied by the tests that go on from it."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .driver import recipe_values, succeeds, write_recipe


@pytest.fixture(scope="session")
def recipe_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", recipe_values(tiny_folder))


@pytest.fixture(scope="session")
def finished_run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    succeeds("run", recipe_file, "--output_dir", folder)
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, times of change included."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def changed_recipe(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed_recipe(sft={"max_steps": 1})`: the tiny recipe with some keys of some sections set otherwise."""

    def make(**sections: object) -> Path:
        values = recipe_values(tiny_folder)
        for section, value in sections.items():
            both = isinstance(value, dict) and isinstance(values.get(section), dict)
            values[section] = {**values[section], **value} if both else value  # type: ignore[dict-item]
        return write_recipe(tmp_path / "changed.yaml", values)

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """The report takes half of a tiny run's time, and has its own tests."""
    # By its name: `lorapar.report` is the function.
    module = importlib.import_module("lorapar.reporting.report")
    monkeypatch.setattr(module, "report", lambda folder, *_: (folder / "report.html").write_text("x"))
