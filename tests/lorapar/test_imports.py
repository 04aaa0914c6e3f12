"""Imports point one way, and the backend knows nothing of the method."""

import ast
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import lorapar
from lorapar import pipeline
from lorapar.config import parse

ROOT = Path(__file__).parents[2]


def imported(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports when it runs, those for type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    names = set()
    depth = len(path.relative_to(ROOT / package).parts)
    for node in ast.walk(tree):
        if id(node) in typed or not isinstance(node, ast.ImportFrom):
            continue
        if node.level == depth:
            names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return names


def graph(package: str) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        edges.setdefault(name, set()).update(imported(path, package) - {name})
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        for other in edges.get(name, ()):
            found = visit(other, [*trail, name])
            if found:
                return found
        return None

    return next((found for name in edges if (found := visit(name, []))), None)


def test_the_method_has_no_cycle():
    edges = graph("lorapar")
    assert {"stages"} <= edges["pipeline"]
    assert {"adapter", "score_batches", "score_sums"} <= edges["score"]
    assert {"adapter", "data"} <= edges["score_batches"]
    assert cycle({name: to for name, to in edges.items() if name != "__init__"}) is None
    assert cycle({"a": {"b"}, "b": {"a"}}) == ["a", "b", "a"]


def test_the_backend_has_no_cycle_and_knows_nothing_of_the_method():
    edges = graph("lorapar_kernels")
    assert cycle({name: to for name, to in edges.items() if name != "__init__"}) is None
    # The kernels know nothing of the ops that launch them, and importing their folder alone imports nothing.
    assert edges["triton_kernels"] == set()
    kernels = graph("lorapar_kernels/triton_kernels")
    assert cycle(kernels) is None
    assert {"dropout", "launch"} <= kernels["lora_passes"]
    initial = (ROOT / "lorapar_kernels/triton_kernels/__init__.py").read_text()
    assert not [node for node in ast.walk(ast.parse(initial)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for path in (ROOT / "lorapar_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            # torch and Triton, and nothing else that would have to be installed.
            allowed = {"torch", "triton", "lorapar_kernels", *sys.stdlib_module_names}
            assert {root.split(".")[0] for root in roots if root} <= allowed, path


def test_importing_the_backend_beside_torch_loads_its_own_modules_alone():
    """Which is what makes it quick: nothing else installed here is touched, nothing is compiled."""
    program = (
        "import sys, torch; before = set(sys.modules); import lorapar_kernels; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lorapar_kernels']"


def test_importing_the_backend_loads_neither_the_method_nor_triton():
    program = (
        "import sys, lorapar_kernels; "
        "print([m for m in ('lorapar', 'transformers', 'peft', 'trl', 'triton', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['triton']")  # torch itself may bring Triton in
    quick = subprocess.run([sys.executable, "-m", "lorapar", "--help"], capture_output=True, text=True, check=True)
    assert "run every stage" in quick.stdout


def test_what_a_bare_gpu_machine_imports_needs_peft_and_transformers_alone():
    """bench/gpu attaches, scores, activates, steps and plans where TRL, datasets and bitsandbytes are not installed."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['trl', 'datasets', 'bitsandbytes', 'math_verify', 'pandas', 'matplotlib', 'reasoning_gym'])); "
        "import lorapar; from lorapar import attach, activate, score, partition, Partition, PartitionedAdamW; "
        "import lorapar.plan, lorapar.answer_head, lorapar.score_batches, lorapar.data, lorapar.models; "
        "import bench.training_cases, bench.plain_training, bench.scoring, bench.baselines.released_script"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_checkout_that_was_never_installed_begins_a_run(tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "lorapar":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    pipeline._claim(parse({"model": "smollm2-135m", "data": {"sources": ["none.jsonl"]}}), tmp_path)
    assert (tmp_path / "recipe.yaml").is_file()


def test_importing_the_method_prints_nothing():
    """PEFT imports bitsandbytes, which on a CPU with AVX512-BF16 warned of a missing kernel that is never called."""
    pytest.importorskip("bitsandbytes")
    program = "import sys, lorapar; print('bitsandbytes' in sys.modules); lorapar.attach; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr == ""


def test_of_bitsandbytes_warnings_that_one_alone_is_dropped(caplog):
    """On any processor: the record that bitsandbytes makes on one with AVX512-BF16, and another of the same logger."""
    assert lorapar.__version__
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
