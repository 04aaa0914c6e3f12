"""Windows and macOS, as far as Linux can show: no module that only Unix has, and no Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lorapar.files import read_jsonl
from lorapar.memory import process

from .driver import write_recipe
from .teaching_server import running
from .test_label_command import recipe_values

# Libraries import these where they exist, so only our own imports are refused.
ELSEWHERE = """
import builtins, importlib.util, runpy, sys
real, find = builtins.__import__, importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
def without(name, globals=None, *rest, **options):
    ours = str((globals or {}).get("__name__")).split(".")[0] in ("lorapar", "lorapar_kernels")
    if ours and name.split(".")[0] in ("fcntl", "resource", "termios", "grp", "pwd", "triton"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest, **options)
builtins.__import__ = without
sys.argv = ["lorapar", *sys.argv[1:]]
runpy.run_module("lorapar", run_name="__main__", alter_sys=True)
"""


def elsewhere(*words: object, **environment: str) -> str:
    """What the command line prints in a process where lorapar can import nothing that Linux alone has."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, words)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_doctor_need_no_unix_and_print_in_a_windows_code_page():
    windows = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    assert "usage: lorapar" in elsewhere("--help", **windows)
    assert "what runs on cpu" in elsewhere("doctor", **windows)


def test_label_needs_no_unix(tiny_folder: Path, tmp_path: Path):
    with running(latency=0.0) as url:
        recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_folder, tmp_path, url, 12, ["ada"]))
        elsewhere("label", recipe, "--output_dir", tmp_path / "run")
    assert len(read_jsonl(tmp_path / "run" / "labels.jsonl")) == 12
    assert (tmp_path / "run" / "run.log").stat().st_size > 0


def test_no_module_imports_what_unix_alone_has_as_it_is_loaded():
    root = Path(__file__).parents[2]
    for path in [*(root / "lorapar").rglob("*.py"), *(root / "lorapar_kernels").rglob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & {"fcntl", "resource", "termios", "grp", "pwd"}, path


@pytest.mark.skipif(os.name != "posix", reason="needs the module resource")
def test_peak_memory_without_proc(monkeypatch):
    monkeypatch.setattr(process, "_STATUS", Path("/nowhere"))
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: False)
    now = process.resident_bytes()
    assert process.peak_memory_bytes() > now / 2
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: used)
    monkeypatch.setattr(sys, "platform", "win32")
    assert process.peak_memory_bytes() == 12345
    # It has no glibc either, and CDLL(None) fails there.
    monkeypatch.setattr(process.ctypes, "CDLL", None)
    process.release_freed()
    process.give_back_large_blocks()
