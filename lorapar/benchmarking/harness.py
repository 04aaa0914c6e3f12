"""lm-evaluation-harness with a model that is loaded already: tasks by their names or files, answers, figures.

A task that executes what the model writes is taken apart: the model answers here (`answers`), and lm_eval judges the
answers in a process without network (`judge`, called by judging.py), where there is no model.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from transformers import set_seed

from ..errors import InputError
from ..model.generate import stop_tokens, until
from ..progress import Progress
from .figures import Figures, number
from .tasks import AT, absolute, is_file, needs_all, read_task_file, task_manager

# Logits that a batch of likelihoods may have: 1 GiB in fp32. lm_eval asks for those of every token of its longest rows
# at the size that is meant for answers; with 150,000 words, 64 rows of 700 tokens would have 27 GB.
LOGITS = 1 << 28
Loaded = dict[str, dict[str, Any]]  # lm_eval's TaskDict: tasks and groups by name


class LoadedModel(cast(Any, HFLM)):  # its decorator hides from type checkers what it is
    """lm_eval's model around one that is loaded; it shows our progress in place of lm_eval's, and keeps its answers.

    Attributes: answers: what it has said to each kind of request, in their order.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, positions: int | None, name: str,
                 template_options: dict[str, Any]):  # fmt: skip
        # lm_eval may give the tokenizer a padding token.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size,
                         max_length=positions, chat_template_args=template_options)  # fmt: skip
        self.name, self.terminal, self.answers = name, sys.stderr, {}
        self.words = self.config.get_text_config().vocab_size
        self.rows, self.progress = batch_size, cast(Progress, None)
        self.stops = stop_tokens(model, tokenizer)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._answered("generate_until", requests)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answered("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return self._answered("loglikelihood_rolling", requests)

    def _answered(self, kind: str, requests: Any) -> list[Any]:
        with (
            contextlib.redirect_stderr(self.terminal),
            Progress(f"benchmark {self.name}", len(requests), "request") as self.progress,
        ):
            answers = getattr(super(), kind)(requests, disable_tqdm=True)
            self._did(len(requests))
        self.answers[kind] = answers
        return answers

    def _did(self, rows: int) -> None:
        # Likelihoods of one context share a row, and long texts have several.
        left = self.progress.total - self.progress.done
        if left:
            self.progress.update(min(rows, left))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=1)
        self.batch_size_per_gpu = max(1, min(self.rows, LOGITS // (longest * self.words)))
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        finally:
            self.batch_size_per_gpu = self.rows

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        logits = super()._model_call(inps, attn_mask, labels)
        self._did(len(inps))
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        tokens = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self._did(len(context))
        # lm_eval leaves out special tokens and the text of EOS alone; what ends a turn may be neither.
        for row in tokens[:, context.shape[1] :]:
            row[len(until(row.tolist(), self.stops)) :] = self.eot_token_id
        return tokens


class Answered(LM):
    """A model that says what another has said to the same requests."""

    def __init__(self, answers: dict[str, list[Any]]):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._said("generate_until", requests)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._said("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return self._said("loglikelihood_rolling", requests)

    def _said(self, kind: str, requests: Any) -> list[Any]:
        answers = self.answers[kind]
        if len(answers) != len(requests):
            raise ValueError(f"{len(requests)} requests, and {len(answers)} answers to them")
        return answers


def load_tasks(words: Sequence[str], shots: int | None) -> dict[str, Loaded]:
    """{word: its tasks and groups}, their data sets loaded.

    shots: worked examples before each question; None: as the task says. A task that says 0 keeps it, as in lm_eval.

    Raises InputError, which names the task, where its data set or another part of it cannot be had.
    """
    manager, found, of_word = task_manager(needs_all(words)), {}, {}
    for word, named in zip(words, absolute(words)):
        try:
            # Metrics that execute code refuse to be loaded without it; nothing that a model wrote is here.
            with _environment(HF_ALLOW_CODE_EVAL="1"), quiet():
                found[word] = _load(manager, named)
        except Exception as error:  # of the data set, the hub, or the task's own code
            raise InputError(
                f"{AT}: {word}: the task or its data set cannot be loaded ({_in_a_line(error)})"
            ) from error
        for name in (*found[word]["tasks"], *found[word]["groups"]):
            if of_word.setdefault(name, word) != word:
                raise InputError(f"{AT}: {name} is part of {of_word[name]} and of {word}; name one of them")
        for name, task in found[word]["tasks"].items():
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"{AT}: {word}: {name} shows pictures or sounds, and models are asked in text alone")
            own = task.get_config("num_fewshot")
            task.set_config("num_fewshot", own or 0 if shots is None or own == 0 else shots)
    return found


def _load(manager: Any, named: str) -> Loaded:
    config = read_task_file(named) if is_file(named) else {}
    if "group" not in config:
        return manager.load([named])
    # lm_eval itself takes a file for that of a single task.
    entry = Entry(name=config["group"], kind=Kind.GROUP, yaml_path=Path(named))
    return manager.load([TaskFactory().build(entry, overrides=None, registry=manager.task_index)])


def executes_code(loaded: Loaded) -> bool:
    # Set by lm_eval, or by a task that is written in Python.
    return any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())


def merged(parts: Sequence[Loaded]) -> Loaded:
    return {kind: {name: one for part in parts for name, one in part[kind].items()} for kind in ("tasks", "groups")}


def measure(lm: LM, loaded: Loaded, limit: int | None, seed: int, chat: bool = False) -> dict[str, Figures]:
    """lm_eval's figures of a model in each task and group.

    Args:
        limit: documents of each task at most. seed: of the draw of worked examples, the same for every model, and of
            tasks that sample. chat: ask through the chat template.

    Returns {name: figures.Figures} of each task and group.
    """
    results = _evaluate(lm, loaded, limit, seed, chat)
    return {name: _facts(name, results) for name in results["results"]}


def answers(lm: LoadedModel, loaded: Loaded, limit: int | None, seed: int, chat: bool = False) -> dict[str, list[Any]]:
    """What the model says to the tasks' requests, by kind and in order; nothing is judged and nothing executed."""
    for task in loaded["tasks"].values():
        # What follows the answers goes through the filters' results: without them there is nothing to judge.
        task.apply_filters = lambda: None
    _evaluate(lm, {"tasks": loaded["tasks"], "groups": {}}, limit, seed, chat)
    return lm.answers


def judge(loaded: Loaded, said: dict[str, list[Any]], limit: int | None, seed: int) -> dict[str, Figures]:
    """`measure` of answers given elsewhere. This executes them where a task does so: call it in an isolated process."""
    return measure(Answered(said), loaded, limit, seed)


def _evaluate(lm: LM, loaded: Loaded, limit: int | None, seed: int, chat: bool) -> Any:
    """`lm_eval.simple_evaluate` without what it adds of the machine and of the hub, which takes seconds and network."""
    set_seed(seed)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)
    with quiet():
        return evaluate(
            lm, cast(Any, loaded), limit=limit, log_samples=False, apply_chat_template=chat,
            fewshot_as_multiturn=chat, confirm_run_unsafe_code=True,
        )  # fmt: skip


def _facts(name: str, results: dict[str, Any]) -> Figures:
    entry, counted = results["results"][name], results["n-samples"].get(name, {})
    figures = {}
    for key, value in entry.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = entry.get(f"{metric}_stderr,{filtered}")
            figures[key] = {"value": number(value), "stderr": number(stderr)}
    better = {metric: up for metric, up in (results["higher_is_better"].get(name) or {}).items() if up is not None}
    subtasks = results["group_subtasks"].get(name)
    return {
        "n": counted.get("effective", entry.get("sample_len")),
        "of": counted.get("original"),
        "shots": results["n-shot"].get(name),
        "version": results["versions"].get(name),
        **({"subtasks": list(subtasks)} if subtasks else {}),
        "higher_is_better": better,
        "figures": figures,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm_eval prints, and draws a bar for each task that it prepares."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _in_a_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
