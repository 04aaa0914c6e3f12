"""The structure of both packages, read from the imports of every file: which folder may know which.

A folder stands above what it imports. `ARROWS` says, for each folder or file directly under `lorapar/`, what it may
import from the others when it runs; imports for type checking are left out of the table and kept in the search for
circles. Whoever adds an arrow writes it down here, and sees where it leads.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    # At the bottom: what everybody may use.
    "errors": "",
    "files": "errors",
    "distributed": "errors",
    "intervals": "",
    "logs": "distributed errors",
    "progress": "distributed",
    # What a run is told, and what its rows and its model are.
    "recipe": "errors files",
    "data": "errors files",
    "rewards": "data errors",
    "adapter": "distributed errors files recipe",
    "model": "adapter data distributed errors files progress",
    "memory": "adapter data distributed errors model recipe",
    # The stages, in their order.
    "labeling": "data distributed errors files model progress recipe stage",
    "scoring": "adapter data distributed errors files model progress recipe stage",
    "partitioning": "adapter errors files recipe scoring stage",
    "renewing": "adapter data distributed errors partitioning recipe scoring stage",
    "training": "adapter data distributed errors files memory model partitioning progress recipe rewards scoring stage",
    "evaluating": "adapter data distributed errors files intervals model partitioning progress recipe rewards stage",
    "benchmarking": "adapter errors files memory model progress recipe stage",
    "exporting": "adapter data errors files model recipe stage",
    "reporting": "errors files intervals labeling partitioning recipe scoring stage",
    "stage": "data distributed memory model",
    # What runs them.
    "pipeline": (
        "adapter benchmarking distributed errors evaluating exporting files labeling logs memory model partitioning "
        "recipe renewing reporting scoring stage training __init__"
    ),
    # What people do with a finished run.
    "chatting": "adapter data errors logs model pipeline recipe stage",
    "publishing": "adapter data errors exporting files logs model partitioning pipeline recipe reporting stage",
    "doctor": "memory model",
    "cli": "chatting distributed doctor errors memory pipeline publishing recipe",
    "__main__": "cli",
}
# The files that know a whole recipe: a stage's own, the order of the stages, the command line, and the plan, which is
# of a recipe. All others take the values that they need.
KNOW_RECIPE = (
    "recipe/",
    "stage.py",
    "pipeline/",
    "memory/needs.py",
    "memory/advice.py",
    "memory/work.py",
    "chatting/verb.py",
    "publishing/verb.py",
    "cli.py",
    "__init__.py",
)
# The backend's files for layers of other packages: imported by whoever has those, never by `import lorapar_kernels`.
OF_OTHERS = {
    "accelerating.py": {"peft"},
    "bnb_weights.py": {"bitsandbytes"},
    "peft_layers.py": {"peft"},
    "peft_layers_bnb.py": {"bitsandbytes", "peft"},
}
# Values, and all that they may import: nothing that does work on them.
VALUES = {
    "recipe/sections.py": {"errors", "files", "recipe"},
    "scoring/scores.py": {"errors", "files"},
    "partitioning/partition.py": {"errors", "files", "scoring.scores"},
}


def module_of(path: Path, package: str) -> str:
    """ "adapter.layers" of lorapar/adapter/layers.py, "adapter" of its __init__.py, "__init__" of the package's own."""
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, package: str, typed: bool = False) -> set[str]:
    """The modules of `package` that a file imports, anywhere in it; `typed`: also those for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    modules = {module_of(other, package) for other in (ROOT / package).rglob("*.py")}
    here, found = path.relative_to(ROOT / package).parts[:-1], set()
    for node in ast.walk(tree):
        if id(node) in for_types and not typed:
            continue
        if isinstance(node, ast.Import):
            whole = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == package]
            found |= {".".join(names) or "__init__" for names in whole}
        elif isinstance(node, ast.ImportFrom):
            names = node.module.split(".") if node.module else []
            if not node.level and names[:1] != [package]:
                continue
            base = [*here[: len(here) - node.level + 1], *names] if node.level else names[1:]
            for alias in node.names:
                # `from . import charts` names a module, `from .charts import png` a thing in one.
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in modules else ".".join(base) or "__init__")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # The package's face imports by a table (`_WHERE`); a name written out would be an arrow that nobody sees.
            said = ast.unparse(node.args[0])
            assert not said.startswith(("'", '"')), f"{path}: {said} is imported by its name"
    return found


def graph(package: str, typed: bool = False) -> dict[str, set[str]]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return {module_of(path, package): imports(path, package, typed) - {module_of(path, package)} for path in paths}


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """The first loop of imports, None where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges.get(name, ())):
            loop = visit(other, [*trail, name])
            if loop:
                return loop
        done.add(name)
        return None

    return next((loop for name in edges if (loop := visit(name, []))), None)


def by_folder(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    folders: dict[str, set[str]] = {}
    for name, others in edges.items():
        folder = name.split(".")[0]
        folders.setdefault(folder, set()).update({other.split(".")[0] for other in others} - {folder})
    return folders


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("package", ["lorapar", "lorapar_kernels"])
def test_no_circle_of_files(package: str):
    """Lazy imports and those for type checking are arrows too: a reader follows them like any other."""
    edges = {name: others for name, others in graph(package, typed=True).items() if name != "__init__"}
    assert len(edges) > 15
    assert circle({name: others - {"__init__"} for name, others in edges.items()}) is None


def test_the_reading_of_imports_finds_what_is_there():
    edges = graph("lorapar")
    assert {"recipe.sections", "stage"} <= edges["labeling.stage"]
    assert "evaluating.stage" in edges["pipeline.order"]
    assert "training.sft" in edges["training.stage"]  # inside a function
    assert "reporting.charts" in edges["reporting.report"]  # a module by its name
    assert "partitioning.partition" not in edges["adapter.layers"]
    assert "partitioning.partition" in graph("lorapar", typed=True)["adapter.layers"]


def test_absolute_imports_are_read_too(tmp_path: Path, monkeypatch):
    package = tmp_path / "p"
    (package / "a").mkdir(parents=True)
    for name in ("__init__", "a/__init__", "b"):
        (package / f"{name}.py").write_text("")
    file = package / "a" / "c.py"
    file.write_text("import p.b\nfrom p.b import x\nfrom p import a\nfrom ..b import y\nimport torch")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(file, "p") == {"b", "a"}
    file.write_text("import importlib\nimportlib.import_module('p.b')")
    with pytest.raises(AssertionError, match="imported by its name"):
        imports(file, "p")


def test_arrows_between_folders_are_those_of_the_table():
    found = {name: others for name, others in by_folder(graph("lorapar")).items() if name != "__init__"}
    expected = {name: set(others.split()) for name, others in ARROWS.items()}
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == expected[name], f"{name}: what it imports differs from the table"
    # The lazily imported public names are the package's face, and no arrow.
    assert circle({name: others - {"__init__"} for name, others in expected.items()}) is None


def test_only_a_stage_file_knows_the_recipe():
    for path in sorted((ROOT / "lorapar").rglob("*.py")):
        name = path.relative_to(ROOT / "lorapar").as_posix()
        if any(name.startswith(known) or name.endswith(f"/{known}") for known in KNOW_RECIPE):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  for alias in node.names}  # fmt: skip
        assert not words & {"Recipe", "Run", "load_recipe"}, f"{name} knows the recipe or the run"


def test_every_stage_is_declared_in_its_own_folder():
    """And nobody but the order of the stages, and the label command's own options, goes to them."""
    edges = graph("lorapar")
    stages = {name for name in edges if name.endswith(".stage")}
    assert stages == {f"{folder}.stage" for folder in ("labeling", "scoring", "partitioning", "renewing", "training",
                                                       "evaluating", "benchmarking", "exporting",
                                                       "reporting")}  # fmt: skip
    assert edges["pipeline.order"] >= stages
    for name, others in edges.items():
        if name not in ("pipeline.order", "pipeline.running"):
            assert not others & stages, f"{name} imports {others & stages}"


def test_values_stand_below_processes():
    for name, allowed in VALUES.items():
        found = imports(ROOT / "lorapar" / name, "lorapar")
        assert all(other in allowed or other.split(".")[0] in allowed for other in found), f"{name} imports {found}"


def test_kernels_import_one_another_and_triton_alone():
    """A kernel file may import torch, Triton, the standard library, launch.py and its siblings; nobody else Triton."""
    for path in sorted((ROOT / "lorapar_kernels").rglob("*.py")):
        name, tree = module_of(path, "lorapar_kernels"), ast.parse(path.read_text(encoding="utf-8"))
        roots = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        roots |= {(node.module or "").split(".")[0] for node in ast.walk(tree)
                  if isinstance(node, ast.ImportFrom) and not node.level}  # fmt: skip
        if name.startswith("triton_kernels"):
            assert all(other.startswith("triton_kernels.") for other in imports(path, "lorapar_kernels")), name
        else:
            assert "triton" not in roots or name == "compile", f"{name} imports Triton"
    assert not imports(ROOT / "lorapar_kernels" / "triton_kernels" / "__init__.py", "lorapar_kernels")


def test_the_backend_knows_nothing_of_the_method():
    for path in (ROOT / "lorapar_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        roots |= {(node.module or "").split(".")[0] for node in ast.walk(tree)
                  if isinstance(node, ast.ImportFrom) and not node.level}  # fmt: skip
        # torch and Triton, and nothing else that would have to be installed.
        there = OF_OTHERS.get(path.name, set())
        assert roots <= {"torch", "triton", "lorapar_kernels", *sys.stdlib_module_names} | there, path


def test_no_file_or_folder_bears_a_public_name():
    """`lorapar.score` is the function whatever has been imported before."""
    import lorapar

    inside = {path.stem for path in (ROOT / "lorapar").iterdir()}
    assert not inside & (set(lorapar.__all__) - {"InputError"})
