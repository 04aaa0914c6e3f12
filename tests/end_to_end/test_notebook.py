"""The notebook is README's example, and runs from top to bottom on SmolLM2-135M."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "lorapar.ipynb"
MAKER = ROOT / "examples" / "make_notebook.py"


def made_of(maker: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(maker)], capture_output=True, text=True, encoding="utf-8")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_what_readme_makes_and_holds_no_output():
    """`python examples/make_notebook.py > examples/lorapar.ipynb` after a change."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text == made_of(MAKER).stdout
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(json.loads(text)))


def test_every_line_of_readme_s_example_is_in_it_in_order():
    example = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## From Python\n")[2]
    found = re.search(r"```python\n(.*?)```", example, flags=re.DOTALL)
    assert found is not None
    code = "\n".join("".join(cell["source"]) for cell in code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8"))))
    at = 0
    for line in filter(None, found[1].splitlines()):
        at = code.index(f"{line}\n", at)


def test_an_example_with_other_statements_makes_none(tmp_path: Path):
    (tmp_path / "examples").mkdir()
    maker = tmp_path / "examples" / MAKER.name
    maker.write_text(MAKER.read_text(encoding="utf-8"), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("partition = lorapar.partition(*", "p = lorapar.partition(*"))
    made = made_of(maker)
    assert (made.returncode, made.stdout) == (1, "")
    assert "the example of 'From Python' has other statements" in made.stderr


def test_without_a_checkout_the_first_cell_says_so(tmp_path: Path, monkeypatch):
    """As on a cloud GPU: pip's failure did not stop the cell, and the next one found no lorapar."""
    cell = "".join(code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))[0]["source"])
    cell = re.sub(r"%pip .*", "installed = True", cell)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"CHECKOUT = '\.\.' is no checkout of LoRA-PAR"):
        exec(cell, {})
    (tmp_path / "checkout" / "examples").mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "checkout" / "examples")
    ran: dict[str, Any] = {}
    exec(cell, ran)
    assert ran["installed"]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch):
    # The kernel is a process of its own, in another folder.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
            for cell in code_cells(notebook)]  # fmt: skip
    table = re.findall(r"^(base|after SFT|after GRPO) +([\d.]+)% +([\d.]+)%$", "".join(said), flags=re.M)
    assert [name for name, *_ in table] == ["base", "after SFT", "after GRPO"]
    system1 = [float(share) for _, share, _ in table]
    assert all(0 <= share <= 100 for share in system1)
    # It has learned what it was taught.
    assert system1[1] > system1[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    # What plain PEFT has answered.
    assert re.fullmatch(r"Compute: 2 \+ 3 \+ 4 =.+\n", said[-1], flags=re.DOTALL), said[-1]
