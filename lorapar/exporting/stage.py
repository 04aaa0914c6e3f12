"""The export stage of a run: `adapter/`, and `merged/` and `gguf/` where the recipe asks for them."""

from pathlib import Path

import torch

from ..adapter.attach import load_adapter
from ..model.load import load_config
from ..recipe.sections import Recipe
from ..stage import ADAPTED, Facts, Run, Stage, adapter_files, weights_of
from .card import QUESTION
from .export import export
from .gguf import FOLDER, check_gguf, export_gguf, files_of
from .modelfile import Asked
from .serving import check_vllm


def export_stage(run: Run) -> Facts:
    """Write the last stage's adapter as plain PEFT loads it, the merged model, and what llama.cpp and Ollama load."""
    recipe, folder, config = run.recipe, run.folder, run.recipe.export
    model = load_adapter(run.load_whole_model(), folder / recipe.stages[-1])
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    differences = export(model, run.tokenizer, folder, config.merged, dtype, recipe.model.revision,
                         recipe.model.trust_remote_code, example_prompt(run))  # fmt: skip
    if config.gguf:
        given = Path(recipe.model.name).expanduser()
        base_file = given.resolve() if given.suffix == ".gguf" else None
        chat = isinstance(example_prompt(run), list)
        asked = Asked(chat, recipe.data.system_prompt, recipe.data.prompt)
        export_gguf(model, run.tokenizer, folder, config.gguf, recipe.model.revision, asked, base_file)
    served = {"vllm": check_vllm(folder / "adapter", model.get_base_model())}
    return {f"{what}_logit_difference": value for what, value in differences.items()} | served


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
