"""The card beside what is exported: how to load it, the prompt as in training, and what ends an answer."""

from pathlib import Path
from typing import Any

from ..data.tokens import prompt_ids
from ..files import write_text

# Asked in a card, so that no row of anybody's data is published.
QUESTION = "What is 2 + 3?"
ADAPTER = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")"""
MERGED = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")"""


def write_card(folder: Path, base: str, tokenizer: Any, prompt: Any, stops: list[int], merged: bool) -> None:
    """Write `folder`/README.md.

    Args:
        base: the base model's name. prompt: text or messages, shown as tokens make of it what every stage was given.
        stops: the ids that end an answer. merged: the folder holds a whole model, not an adapter.
    """
    shown = tokenizer.decode(prompt_ids({"prompt": prompt}, tokenizer))
    fence = "````"
    ends = ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}` ({token})" for token in stops)
    tags = ["lora-par", "lora"] if merged else ["lora-par", "lora", f"base_model:adapter:{base}"]
    by = (
        "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`"
        if isinstance(prompt, list)
        else "as text"
    )
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: text-generation",
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
        "",
        f"# {Path(base).name}, trained with LoRA-PAR",
        "",
        f"{'The model' if merged else 'An adapter'} of `{base}`, trained by "
        "[LoRA-PAR](https://huggingface.co/papers/2507.20999): SFT of the System 1 elements, then GRPO of the System 2 "
        "elements.",
        "",
        "```python",
        MERGED if merged else ADAPTER,
        "```",
        "",
        "## Prompt",
        "",
        f"Every stage and the evaluation asked the model in this form, which this folder's tokenizer writes ({by}):",
        "",
        fence,
        shown,
        fence,
        "",
        f"An answer ends with {ends}." if stops else "No token ends an answer.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
