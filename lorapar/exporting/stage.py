"""The export stage of a run: `adapter/`, and `merged/` and `gguf/` where the recipe asks for them."""

import logging
from pathlib import Path

import torch

from ..adapter.attach import load_adapter
from ..adapter.merging import MADE_OF
from ..files import read_json, sha256_file, why_not_whole
from ..model.load import load_config
from ..recipe.sections import Recipe
from ..stage import ADAPTED, Facts, Run, Stage, adapter_files, weights_of
from .card import QUESTION
from .export import export
from .gguf import FOLDER, check_gguf, check_space, export_gguf, files_of
from .modelfile import Asked
from .serving import check_vllm

log = logging.getLogger("lorapar")


def export_stage(run: Run) -> Facts:
    """Write the last stage's adapter as plain PEFT loads it, the merged model, and what llama.cpp and Ollama load."""
    recipe, folder, config = run.recipe, run.folder, run.recipe.export
    model = load_adapter(run.load_whole_model(), folder / recipe.stages[-1])
    if config.gguf:
        # Before adapter/ is written anew.
        check_space(model, folder, config.gguf, recipe.model.revision)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    differences = export(model, run.tokenizer, folder, config.merged, dtype, recipe.model.revision,
                         recipe.model.trust_remote_code, example_prompt(run))  # fmt: skip
    adapter = sha256_file(folder / weights_of("adapter"))
    if config.gguf:
        given = Path(recipe.model.name).expanduser()
        base_file = given.resolve() if given.suffix == ".gguf" else None
        chat = isinstance(example_prompt(run), list)
        asked = Asked(chat, recipe.data.system_prompt, recipe.data.prompt)
        export_gguf(model, run.tokenizer, folder, config.gguf, recipe.model.revision, asked, base_file, adapter)
    for name, asked_for in (("merged", config.merged), (FOLDER, config.gguf)):
        if (folder / name).is_dir() and not asked_for and _made_of(folder / name) != adapter:
            log.warning("export: %s/ was not made of this adapter, but of an earlier one or of one it does not name; "
                        "ask for it again (export.%s), or delete it", name, name)  # fmt: skip
    served = {"vllm": check_vllm(folder / "adapter", model.get_base_model())}
    return {f"{what}_logit_difference": value for what, value in differences.items()} | served


def _made_of(folder: Path) -> str | None:
    """The sha256 of the adapter that merged/ or gguf/ says it was made of."""
    path = folder / MADE_OF
    return None if why_not_whole(path) else read_json(path).get("adapter_sha256")


def example_prompt(run: Run) -> str | list[dict[str, str]]:
    """A made-up question as the recipe's rows put theirs; other columns of the template stay in braces."""
    data = run.recipe.data
    question = data.prompt.replace("{prompt}", QUESTION)
    turns = [("system", data.system_prompt)] if data.system_prompt is not None else []
    turns.append(("user", question))
    if data.chat is False or run.tokenizer.chat_template is None:
        return "\n\n".join(content for _, content in turns)
    return [{"role": role, "content": content} for role, content in turns]


def check(run: Run) -> None:
    """InputError for a model that is not converted to GGUF here, before any stage has trained it."""
    if run.recipe.export.gguf:
        check_gguf(load_config(run.recipe.model), run.tokenizer, run.recipe.export.gguf)


def stage(recipe: Recipe) -> Stage:
    config = recipe.export
    gguf = [f"{FOLDER}/{name}" for name in files_of(config.gguf)]
    return Stage(
        "export",
        run=export_stage,
        sections=(*ADAPTED, "export"),
        reads=(weights_of(recipe.stages[-1]),),
        writes=(*adapter_files("adapter"), *(["merged/config.json"] if config.merged else []), *gguf),
        folders=("merged",) * config.merged + (FOLDER,) * bool(gguf),
        check=check,
    )
