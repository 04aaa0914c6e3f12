"""The tasks of lm-evaluation-harness that a recipe names: which there are, which execute code, what their files read.

Found in the tasks' own YAML alone: nothing of a task is imported, and no data set is asked for.
"""

import functools
import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..errors import InputError, install, nearest, not_installed, require
from ..files import expanded, sha256_file, sha256_json

AT = "evaluate.tasks"
# The versions of lm_eval whose inner modules are known here.
LEAST, BELOW = "0.4.12", "0.5"
# Tasks of lm_eval that evaluate an answer as an expression (sympy's parse_expr, which is Python's eval) and are not
# marked as executing code, by where their functions are.
EVALUATE_ANSWERS = ("/lm_eval/tasks/score/math/",)


def check_tasks(words: Sequence[str], run_code: bool) -> None:
    """InputError for a word that names no task or a file of none, and for a task that executes code unless it may."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{AT}: benchmarks need {not_installed('lm-eval, which', 'eval')}")
    version = lm_eval_version()
    if not Version(LEAST) <= Version(version) < Version(BELOW):
        raise InputError(f"{AT}: lm-eval {version} is installed, and benchmarks need {LEAST} or later, below {BELOW}; "
                         f"{install('eval')}")  # fmt: skip
    twice = [word for i, word in enumerate(words) if word in words[:i]]
    require(not twice, AT, twice[:1], "each task once")
    known = index(words)
    for word in words:
        if not is_file(word):
            wants = f"; a task's file ends in .yaml, got {word!r}" if Path(word).suffix or "/" in word else ""
            _require_known(word, known, AT, wants)
            continue
        for part in parts(read_task_file(word)):
            for member in part["task"] if "group" in part else []:
                if isinstance(member, str):
                    _require_known(member, known, f"{AT}: {word}")
    refuse_code(code_tasks(words), run_code)


def refuse_code(names: Sequence[str], run_code: bool) -> None:
    """InputError for tasks that execute code, unless they may."""
    if names and not run_code:
        raise InputError(f"{AT}: {', '.join(names)}: executes code that the model writes; --run-code (or "
                         "evaluate.run_code: true) lets it, in a process without network")  # fmt: skip


def lm_eval_version() -> str:
    return importlib.metadata.version("lm_eval")


def _require_known(name: str, known: dict[str, Any], at: str, wants: str = "") -> None:
    if name not in known:
        near = nearest(name, known, 3)
        hint = f"nearest: {', '.join(near)}" if near else "`lm_eval ls tasks` lists them"
        raise InputError(f"{at}: lm-evaluation-harness has no task {name!r}; {hint}{wants}")


def code_tasks(words: Sequence[str]) -> list[str]:
    """The words that name a task, or a group with one, that executes what the model writes."""
    known = index(words)
    return [word for word in words if any(map(_executes, _configs(word, known)))]


def is_file(word: str) -> bool:
    return word.endswith(".yaml")


def absolute(words: Iterable[str]) -> list[str]:
    """The words, files by their whole path."""
    return [str(expanded(word, AT).absolute()) if is_file(word) else word for word in words]


def index(words: Sequence[str]) -> dict[str, Any]:
    """{name: entry} of the tasks, groups and tags that lm-evaluation-harness has; nothing where only files are named.

    It has 14,000, and reading their files takes seconds.
    """
    return task_manager(needs_all(words)).task_index


def needs_all(words: Sequence[str]) -> bool:
    """Whether a name, or a file of a group, which holds names, has to be looked up among all tasks."""
    return any(not is_file(word) or "group" in read_task_file(word) for word in words)


@functools.cache
def task_manager(everything: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def read_task_file(word: str) -> dict[str, Any]:
    """A task's file with what it includes; functions stay names. InputError where it is none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = expanded(word, AT)
    if not path.is_file():
        raise InputError(f"{AT}: {path}: no such file")
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:  # of YAML, or of a file that it includes
        raise InputError(f"{AT}: {path}: not a task's file ({error})") from error
    for part in parts(config):
        _check_part(part, f"{AT}: {path}")
    return config


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A file's configuration, and those of the tasks and groups that are written out within its group."""
    yield config
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, dict):
            yield from parts(member)


def _check_part(part: dict[str, Any], at: str) -> None:
    """InputError for what is neither a task nor a group, and for data files that are no paths."""
    name, members = part.get("group", part.get("task")), part.get("task")
    listed = isinstance(members, list) and members != [] and all(isinstance(member, str | dict) for member in members)
    require(isinstance(name, str) and ("group" not in part or listed), at, sorted(map(str, part))[:5],
            "a file of lm-evaluation-harness with the key task (a name), or group and task (a list)")  # fmt: skip
    options = part.get("dataset_kwargs")
    require(options is None or isinstance(options, dict), f"{at}: dataset_kwargs", options, "keys and values")
    for value in _leaves((options or {}).get("data_files")):
        require(isinstance(value, str), f"{at}: dataset_kwargs.data_files", value, "a path, or several")
    folder = (options or {}).get("data_dir")
    require(folder is None or isinstance(folder, str), f"{at}: dataset_kwargs.data_dir", folder, "a path")


def digests(words: Iterable[str]) -> dict[str, Any]:
    """{file: digests} of each task's file, of the Python files beside it and beside those that it includes, and of the
    data files and folders on this machine that it names."""
    found = {}
    for word in filter(is_file, words):
        config = read_task_file(word)
        folders = {file.parent for file in _with_included(expanded(word, AT).resolve())}
        code = [file for folder in folders for file in folder.glob("*.py")]
        data = [file for part in parts(config) for file in _data_files(part)]
        found[word] = {
            "config": sha256_json(config),
            **{kind: {str(file): sha256_file(file) for file in sorted(set(files))}
               for kind, files in (("beside", code), ("data", data))},
        }  # fmt: skip
    return found


def _with_included(path: Path) -> Iterator[Path]:
    """A task's file and those that it includes; `read_task_file` has found no cycle among them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    yield path
    included = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _with_included((path.parent / name).resolve())


def _data_files(part: dict[str, Any]) -> Iterator[Path]:
    """The files on this machine that `datasets.load_dataset` may read for a task."""
    options, source = part.get("dataset_kwargs") or {}, part.get("dataset_path")
    source = Path(source if isinstance(source, str) and Path(source).is_dir() else "")
    folder = source / os.path.expanduser(options.get("data_dir") or "")
    patterns = list(_leaves(options.get("data_files")))
    if not patterns and folder != Path():
        patterns = ["**"]
    for pattern in patterns:
        # A name with brackets may be a file's own. What is a whole path takes the place of the folder.
        found = [pattern, *glob.glob(pattern, root_dir=folder, recursive=True)]
        yield from filter(Path.is_file, [folder / name for name in found])


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif value is not None:
        yield value


def _configs(word: Any, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configurations of a task, of all tasks of a group or a tag; of a task within a group, what the group sets."""
    if isinstance(word, dict):
        yield word
        named = [word.get("group"), word.get("task")]
        members = [member for one in named for member in (one if isinstance(one, list) else [one]) if member]
    elif is_file(word):
        config = read_task_file(word)
        yield config
        members = config["task"] if isinstance(config.get("task"), list) else []
    elif word in known:
        entry = known[word]
        config = entry.cfg or {}
        yield config
        members = config["task"] if isinstance(config.get("task"), list) else [] if entry.cfg else sorted(entry.tags)
    else:
        members = []
    for member in members:
        yield from _configs(member, known)


def _executes(config: dict[str, Any]) -> bool:
    evaluates = any(place in str(config.get("process_results")).replace("\\", "/") for place in EVALUATE_ANSWERS)
    return evaluates or config.get("unsafe_code", False) is not False
