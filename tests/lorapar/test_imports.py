"""What importing the packages loads, prints and needs (tests/test_structure.py has what may import what)."""

import ast
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import lorapar
from lorapar.pipeline import running as pipeline
from lorapar.recipe.reading import parse

ROOT = Path(__file__).parents[2]


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
        "['trl', 'datasets', 'bitsandbytes', 'pandas', 'matplotlib', 'reasoning_gym'])); "
        "import lorapar; from lorapar import attach, activate, score, partition, Partition, PartitionedAdamW; "
        "import lorapar.memory.needs, lorapar.training.answer_head, lorapar.scoring.batches; "
        "import lorapar.data.rows, lorapar.model.load; "
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


@pytest.mark.parametrize(
    "program",
    [
        "import sys, lorapar; assert 'bitsandbytes' not in sys.modules; lorapar.attach; assert 'peft' in sys.modules",
        "import lorapar.adapter.attach",
        "import sys, runpy; sys.argv = ['lorapar', 'doctor']; runpy.run_module('lorapar.cli').get('main')()",
        # A process that multiprocessing starts imports what it is to call.
        "import multiprocessing, sys; from lorapar.doctor import doctor\n"
        "if __name__ == '__main__': multiprocessing.get_context('spawn').Pool(1).apply(doctor)",
    ],
)
def test_importing_the_method_prints_nothing(program: str):
    """PEFT imports bitsandbytes, which on a CPU with AVX512-BF16 warned of a missing kernel that is never called."""
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_public_names_are_one_table_and_no_module_has_one_of_them():
    tree = ast.parse((ROOT / "lorapar" / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == lorapar._WHERE
    assert lorapar.__all__ == list(lorapar._WHERE) == sorted(lorapar._WHERE)
    assert [name for name in dir(lorapar) if not name.startswith("__")] == lorapar.__all__
    beside = {path.stem for path in (ROOT / "lorapar").iterdir()}
    assert not beside & set(lorapar.__all__)
    for name in lorapar.__all__:
        assert getattr(lorapar, name).__name__ == name


def test_a_public_name_is_its_function_can_be_replaced_and_others_are_missing(monkeypatch):
    import lorapar.scoring.score

    assert lorapar.score is lorapar.scoring.score.score
    monkeypatch.setattr(lorapar, "score", len)
    assert lorapar.score is len
    with pytest.raises(AttributeError, match="module 'lorapar' has no attribute 'scroe'"):
        lorapar.scroe  # noqa: B018


def test_of_bitsandbytes_warnings_that_one_alone_is_dropped(caplog):
    """On any processor: the record that bitsandbytes makes on one with AVX512-BF16, and another of the same logger."""
    assert lorapar.__version__
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
