"""A row's text as tokens, by the tokenizer's chat template or as plain text.

Every stage takes its tokens from here: length limits, the plan, scoring, SFT, the prompts of GRPO and of evaluation, and
what an exported model's card shows. A row is trained on behind the very tokens that generation hands the model:

    prompt as generation sees it  +  completion up to the end of the turn
"""

import functools
import json
import logging
import re
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("lorapar")
IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers
# Stands for what an assistant says where a template is asked what it writes around that.
WORDS = "lorapar probe"
# A tag that a text leaves open at its end, such as a generation prompt's <think>.
OPEN_TAG = re.compile(r"<(\w+)>\s*$")


def prompt_ids(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt's token ids as generation sees them: a chat ends with the template's generation prompt."""
    if isinstance(row["prompt"], str):
        return _plain_ids(row["prompt"], tokenizer)
    return _ids(render(row["prompt"], row, tokenizer, add_generation_prompt=True), tokenizer)


def encode(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int]:
    """(token ids of prompt and completion, number of prompt tokens); the prompt's are those of `prompt_ids`.

    A plain completion gets the EOS token unless it ends with it; a chat gets what its template writes. Nothing is cut.
    InputError for a row without completion tokens.

    Where the prompt's tokens begin those of the whole, this is what TRL's SFTTrainer prepares (`_prepare_dataset`, TRL
    1.16; a test holds the two equal). Elsewhere TRL trains on a context that generation never sees: it drops the tokens
    at the prompt's end that merge with the completion's beginning, or the part of a generation prompt that the template
    does not write in front of a finished answer.
    """
    prompt, completion = row["prompt"], row["completion"]
    asked = prompt_ids(row, tokenizer)
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError(
                "model.eos_token: the tokenizer has no EOS token, which ends a plain completion; name one of its tokens"
            )
        empty = completion in ("", eos)
        answer = completion if completion.endswith(eos) else completion + eos
        whole = _plain_ids(prompt + answer, tokenizer)
    else:
        empty = not any(turn.get("content") or turn.get("tool_calls") for turn in completion)
        text, answer = render(prompt, row, tokenizer, add_generation_prompt=True), _chat_answer(row, tokenizer)
        whole = _ids(text + answer, tokenizer)
    if whole[: len(asked)] != asked:
        # Tokens merge across the boundary.
        whole = asked + _ids(answer, tokenizer)
    if empty or len(whole) == len(asked):
        raise InputError(f"row {row.get('id', '(no id)')}: the completion has no tokens to learn from")
    return whole, len(asked)


def _chat_answer(row: dict[str, Any], tokenizer: Any) -> str:
    """What follows the generation prompt: a completion as the chat template writes it, up to the end of its turn."""
    prompt, completion = row["prompt"], row["completion"]
    asked = render(prompt, row, tokenizer, add_generation_prompt=True)
    whole = render(prompt + completion, row, tokenizer)
    tag = OPEN_TAG.search(asked)
    opening = f"<{tag[1]}>" if tag else ""
    if whole.startswith(asked):
        answer = whole[len(asked) :]
        # The generation prompt has opened the tag that the answer opens too.
        doubled = opening and answer.lstrip().startswith(opening)
        return answer.lstrip().removeprefix(opening).lstrip("\n") if doubled else answer
    history = render(prompt, row, tokenizer)
    if not (asked.startswith(history) and whole.startswith(history)):
        raise InputError(
            f"row {row.get('id', '(no id)')}: the chat template writes the prompt in another way once a completion "
            "follows it, so the model would be trained on another prompt than it is asked; use another model.chat_template"
        )
    header, turn = asked[len(history) :], whole[len(history) :]
    words = str(completion[0].get("content") or "").lstrip()
    if opening and len(completion) == 1 and words.startswith(opening):
        # The template leaves out what a finished answer holds in that tag; the row has it.
        return words.removeprefix(opening).lstrip("\n") + turn_end(tokenizer)
    shared = _shared_lines(header, turn)
    _warn_of_header(header.removeprefix(shared))
    return turn.removeprefix(shared)


def _shared_lines(one: str, other: str) -> str:
    """What two texts begin with, up to the end of a line or a tag, so that no word is cut."""
    n = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[: max(one.rfind(mark, 0, n) for mark in "\n>") + 1]


@functools.cache
def _warn_of_header(rest: str) -> None:
    log.warning(
        "the generation prompt ends with %r, which the chat template does not write in front of a finished answer; rows "
        "are trained on behind it, as the model is asked. If it opens a thought that your rows do not hold, turn "
        "thinking off (model.chat_template_kwargs: {enable_thinking: false})", rest,
    )  # fmt: skip


def render(turns: list[dict], row: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    """Messages as the chat template writes them, given the row's `tools` and `chat_template_kwargs`."""
    tools, kwargs = _as_value(row.get("tools")), _as_value(row.get("chat_template_kwargs"))
    if _takes_blocks(tokenizer, str(tokenizer.chat_template)):
        turns = [_in_blocks(turn) for turn in turns]
    # Of an empty list some templates write a heading without tools.
    return tokenizer.apply_chat_template(turns, tokenize=False, tools=tools or None, **options, **(kwargs or {}))


def _as_value(column: Any) -> Any:
    """A column that may hold JSON text."""
    return json.loads(column) if isinstance(column, str) and column else column


def _in_blocks(turn: dict[str, Any]) -> dict[str, Any]:
    text = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": text}]} if isinstance(text, str) and text else turn


@functools.lru_cache(maxsize=8)
def _takes_blocks(tokenizer: Any, template: str) -> bool:
    """Whether a template reads messages as lists of blocks alone, as those of some vision models do.

    Of a text it would write nothing, and the model would be asked nothing, in silence.
    """
    text, blocks = (_probe(tokenizer, content) for content in (WORDS, [{"type": "text", "text": WORDS}]))
    return WORDS not in text and WORDS in blocks


def _probe(tokenizer: Any, content: Any, *following: dict[str, Any]) -> str:
    """A question, an answer of `content` and what follows as the template writes them; "" where it refuses them."""
    from jinja2 import TemplateError

    try:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}, *following]
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return ""


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, template: str) -> str:
    blocks = _takes_blocks(tokenizer, template)
    content = [{"type": "text", "text": WORDS}] if blocks else WORDS
    for following in ((), ({"role": "user", "content": content},)):
        _, found, end = _probe(tokenizer, content, *following).partition(WORDS)[2].partition(WORDS)
        # Templates that never end the last turn end one by the token that begins the next.
        if found and end.strip():
            return end.partition(WORDS)[0]
    return ""


def turn_end(tokenizer: Any) -> str:
    """What the chat template writes after an assistant's words; "" without a template, or where that is nothing."""
    return _turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else ""


def turn_end_token(tokenizer: Any) -> int | None:
    """The token that the chat template ends an assistant's turn with; None where that is no token of its own."""
    end = turn_end(tokenizer).lstrip()
    added = {**tokenizer.get_added_vocab(), **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))}
    return next((added[token] for token in sorted(added, key=len, reverse=True) if end.startswith(token)), None)


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    """A text's ids with the tokens that the tokenizer begins a text with, without an EOS that it adds at the end."""
    ids, eos = tokenizer(text)["input_ids"], tokenizer.eos_token
    added = eos is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos)
    twice = eos is not None and text.endswith(eos) and ids[-2:] == [tokenizer.eos_token_id] * 2
    return ids[:-1] if added or (twice and not text.endswith(eos * 2)) else ids


def check_known(ids: list[int], model: Any, tokenizer: Any, name: str) -> None:
    """InputError where the row `name` holds a token that `model` has no embedding for."""
    check_below(model.get_input_embeddings().weight.shape[0], ids, tokenizer, f"row {name}")


def check_below(embeddings: int, ids: list[int], tokenizer: Any, where: str) -> None:
    """InputError for a token from `embeddings` on."""
    highest = max(ids, default=0)
    if highest >= embeddings:
        token = "" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(highest)!r} "
        raise InputError(
            f"{where}: the token {token}({highest}) is none of the model's "
            f"{embeddings}; a token that was added to the tokenizer, or that a chat template writes, must be added to "
            "the model and trained first"
        )
