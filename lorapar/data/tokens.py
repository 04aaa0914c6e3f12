"""A row's text as tokens, by the tokenizer's chat template or as plain text.

Scoring, evaluation, length limits and the plan take their tokens from here. SFT and GRPO hand TRL the text, which makes
the same tokens of it (a test holds the two equal).
"""

import json
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _token_ids(text: str | list, row: dict[str, Any], tokenizer: Any, **options: Any) -> list[int]:
    """Ids of a text, or of messages by the chat template with what TRL hands it from the row's columns."""
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options |= {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"]


def prompt_ids(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt's token ids as generation sees them: a chat ends with the template's generation prompt."""
    return _token_ids(row["prompt"], row, tokenizer, add_generation_prompt=True)


def encode(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int]:
    """(token ids of prompt and completion, number of prompt tokens), as TRL's SFTTrainer prepares the row.

    A plain completion gets the EOS token unless it ends with it; a chat gets what its template writes. The
    completion starts where the tokenised prompt and the tokenised whole part ways, which need not be the
    prompt's end. Nothing is cut. InputError for a row without completion tokens. Source:
    trl/trainer/sft_trainer.py, `_prepare_dataset`, TRL 1.16; a test holds the two equal.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError("model.name: the tokenizer has no EOS token, which ends a plain completion")
        empty = completion in ("", eos)
        completion = completion if completion.endswith(eos) else completion + eos
    else:
        empty = not any(turn.get("content") or turn.get("tool_calls") for turn in completion)
    whole = _token_ids(prompt + completion, row, tokenizer)
    asked = prompt_ids(row, tokenizer)
    parted = (i for i, (one, other) in enumerate(zip(asked, whole)) if one != other)
    n_prompt = next(parted, min(len(asked), len(whole)))
    if empty or n_prompt == len(whole):
        raise InputError(f"row {row.get('id', '(no id)')}: the completion has no tokens to learn from")
    return whole, n_prompt
