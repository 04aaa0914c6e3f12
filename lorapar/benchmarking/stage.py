"""The benchmark stage of a run: `tasks.json`, which becomes the key `tasks` of `metrics.json`."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..adapter.attach import load_adapter
from ..errors import InputError, StageFailed
from ..files import sha256_file, write_json
from ..memory.process import is_out_of_memory
from ..recipe.sections import EvaluateConfig, Recipe
from ..stage import ADAPTED, Facts, Run, Stage, weights_of
from .figures import Figures, read_figures
from .tasks import AT, absolute, check_tasks, code_tasks, digests, lm_eval_version, refuse_code

log = logging.getLogger("lorapar")
# A process that executes a model's answers may take so long: to start, and for each answer.
START_SECONDS, ANSWER_SECONDS = 600, 20


def benchmark_stage(run: Run) -> Facts:
    """lm-evaluation-harness on the base (adapter off) and after each stage, in one load of the model."""
    from .harness import LoadedModel, answers, executes_code, load_tasks, measure, merged

    recipe, folder, config = run.recipe, run.folder, run.recipe.evaluate
    loaded = load_tasks(config.tasks, config.task_shots)
    marked = code_tasks(config.tasks)
    code = [word for word in config.tasks if word in marked or executes_code(loaded[word])]
    refuse_code(code, config.run_code)
    plain = merged([loaded[word] for word in config.tasks if word not in code])
    coded = merged([loaded[word] for word in code])

    def figures_of(model: Any, name: str) -> dict[str, Any]:
        def asked() -> LoadedModel:
            options = recipe.model.chat_template_kwargs or {}
            return LoadedModel(model, run.tokenizer, config.batch_size, run.positions, name, options)

        found = {}
        if plain["tasks"]:
            found |= measure(asked(), plain, config.task_limit, recipe.seed, config.task_chat)
        if coded["tasks"]:
            said = answers(asked(), coded, config.task_limit, recipe.seed, config.task_chat)
            names = (*coded["tasks"], *coded["groups"])
            found |= _judged_apart(code, names, said, config, recipe.seed)
        return found

    first, *later = recipe.stages
    model = load_adapter(run.load_whole_model(), folder / first)
    by_model = {}
    for name in ("base", first, *later):
        if name in later:
            model = load_adapter(model.unload(), folder / name)
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            by_model[name] = _in_one_line(lambda: figures_of(model, name))  # noqa: B023
        log.info("benchmark: %s: %s", name, _shortly(by_model[name]))
    tasks = {
        name: {
            **{key: value for key, value in facts.items() if key != "figures"},
            "chat": config.task_chat,
            "lm_eval": lm_eval_version(),
            **{model: figures[name]["figures"] for model, figures in by_model.items()},
        }
        for name, facts in by_model["base"].items()
    }
    adapters = {name: sha256_file(folder / weights_of(name)) for name in recipe.stages}
    write_json(folder / "tasks.json", {"tasks": tasks, "adapters": adapters})
    return {"tasks": len(tasks)}


def _judged_apart(
    words: list[str], names: Iterable[str], said: dict[str, list[Any]], config: EvaluateConfig, seed: int
) -> dict[str, Figures]:
    """The figures of answers that are executed, from a process without network; names: of its tasks and groups."""
    from .isolation import run_isolated

    seconds = START_SECONDS + ANSWER_SECONDS * sum(map(len, said.values()))
    request = {"tasks": absolute(words), "shots": config.task_shots, "limit": config.task_limit, "seed": seed,
               "answers": said, "seconds": seconds}  # fmt: skip
    return read_figures(run_isolated("lorapar.benchmarking.judging", json.dumps(request), seconds), names)


def _in_one_line(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        if isinstance(error, InputError | StageFailed) or is_out_of_memory(error):
            raise
        # Of a task's own code, or of what it asks for: a longer answer than the model has positions.
        said = str(error).strip().splitlines()
        raise StageFailed(f"benchmark: lm-evaluation-harness failed ({type(error).__name__}: "
                          f"{said[0] if said else 'it said nothing'})") from error  # fmt: skip


def _shortly(figures: dict[str, Any]) -> dict[str, float]:
    """The tasks' figures for the log, those of a group without its parts."""
    parts = {part for facts in figures.values() for part in facts.get("subtasks", []) if facts["figures"]}
    return {
        f"{name} {key.removesuffix(',none')}": round(figure["value"], 4)
        for name, facts in figures.items()
        for key, figure in facts["figures"].items()
        if name not in parts and figure["value"] is not None
    }


def check(run: Run) -> None:
    """Find the tasks; refuse those that execute code unless they may and can be cut off from the network."""
    config = run.recipe.evaluate
    check_tasks(config.tasks, config.run_code)
    if code_tasks(config.tasks):
        from .isolation import check_isolation

        check_isolation()
    if config.task_chat and run.tokenizer.chat_template is None:
        raise InputError("evaluate.task_chat: the tokenizer has no chat template; name one in model.chat_template, or "
                         "leave the key out")  # fmt: skip


def inputs(run: Run) -> Facts:
    config = run.recipe.evaluate
    return {
        "tasks": config.tasks,
        "limit": config.task_limit,
        "shots": config.task_shots,
        "chat": config.task_chat,
        "lm_eval": lm_eval_version(),
        AT: digests(config.tasks),
    }


def stage(recipe: Recipe) -> Stage:
    return Stage(
        "benchmark",
        run=benchmark_stage,
        sections=(*ADAPTED, "stages", "seed"),
        reads=tuple(map(weights_of, recipe.stages)),
        writes=("tasks.json",),
        outside=inputs,
        check=check,
    )
