"""The card beside what is exported: how to load it, the prompt as in training, and what ends an answer."""

from pathlib import Path
from typing import Any

from ..data.tokens import prompt_ids
from ..files import write_text

# Asked in a card, so that no row of anybody's data is published.
QUESTION = "What is 2 + 3?"
ADAPTER = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")"""
# PEFT has no auto class for a multimodal model, and its class for text would load another one.
ADAPTER_OF_WRAPPER = """from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "this folder")"""
MERGED = """from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")"""


def write_card(
    folder: Path, base: str, tokenizer: Any, prompt: Any, stops: list[int], merged: bool, auto_class: str,
    weights: str = "",
) -> None:  # fmt: skip
    """Write `folder`/README.md.

    Args:
        base: the base model's name. prompt: text or messages, shown as tokens make of it what every stage was given.
        stops: the ids that end an answer. merged: the folder holds a whole model, not an adapter.
        auto_class: the transformers class that loads the base as what it is. weights: how those that were trained on
            differ from the base's own.
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
    differs = f"It was trained on that model's weights {weights}; on the model's own its answers differ a little."
    text = auto_class == "AutoModelForCausalLM"
    code = MERGED if merged else ADAPTER if text else ADAPTER_OF_WRAPPER
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if merged else 'peft'}",
        f"pipeline_tag: {'text-generation' if text else 'image-text-to-text'}",
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
        *([differs, ""] if weights and not merged else []),
        "```python",
        code.format(auto_class=auto_class, base=base),
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
