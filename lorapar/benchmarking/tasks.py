"""The tasks of lm-evaluation-harness that a recipe names: which there are, which execute code, what their files read.

Found in the tasks' own YAML alone: nothing of a task is imported, and no data set is asked for.
"""

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, not_installed, require, suggestion
from ..files import expanded, sha256_file, sha256_json

AT = "evaluate.tasks"


def check_tasks(words: Sequence[str], run_code: bool) -> None:
    """InputError for a word that names no task or a file of none, and for a task that executes code unless it may."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{AT}: benchmarks need {not_installed('lm-eval, which', 'eval')}")
    twice = [word for i, word in enumerate(words) if word in words[:i]]
    require(not twice, AT, twice[:1], "each task once")
    known = index(words)
    for word in words:
        if not is_file(word) and word not in known:
            wants = f"; a task's file ends in .yaml, got {word!r}" if Path(word).suffix or "/" in word else ""
            raise InputError(f"{AT}: lm-evaluation-harness has no task {word!r}; {suggestion(word, known, 3)}{wants}")
    refuse_code(code_tasks(words), run_code)


def refuse_code(names: Sequence[str], run_code: bool) -> None:
    """InputError for tasks that execute code, unless they may."""
    if names and not run_code:
        raise InputError(f"{AT}: {', '.join(names)}: executes code that the model writes; --run-code (or "
                         "evaluate.run_code: true) lets it, in a process without network")  # fmt: skip


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
    require(isinstance(config.get("task") or config.get("group"), str), f"{AT}: {path}", sorted(config)[:5],
            "a file of lm-evaluation-harness with the key task, or group")  # fmt: skip
    return config


def digests(words: Iterable[str]) -> dict[str, Any]:
    """{file: digests} of each task's file, of the Python files beside it and of the data files that it names."""
    found = {}
    for word in filter(is_file, words):
        config, path = read_task_file(word), expanded(word, AT)
        beside = {file.name: sha256_file(file) for file in sorted(path.absolute().parent.glob("*.py"))}
        found[word] = {"config": sha256_json(config), "beside": beside, "data": dict(_data_files(config))}
    return found


def _data_files(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    options = config.get("dataset_kwargs") or {}
    given = [options.get("data_files") or []]
    while given:
        value = given.pop()
        if isinstance(value, str):
            if Path(value).is_file():
                yield value, sha256_file(value)
        else:
            given += value.values() if isinstance(value, dict) else value


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
    return config.get("unsafe_code", False) is not False
