"""A row's text as tokens, by the tokenizer's chat template or as plain text.

Everything takes its tokens from here: length limits, the plan, scoring, SFT, the prompts of GRPO and evaluation, and
the card of an exported model. A row is trained on behind exactly the tokens that generation gives the model:

    prompt as generation sees it  +  completion up to the end of the turn
"""

import functools
import json
import logging
import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("lorapar")
IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers
# Stands for what an assistant says where a template is asked what it writes around that.
WORDS = "lorapar probe"
# A tag that a text leaves open at its end, such as a generation prompt's <think>; one that it closes there; and a
# thought that an answer begins with: (tag, thought, the rest).
OPEN_TAG = re.compile(r"<(\w+)>\s*$")
CLOSE_TAG = re.compile(r"</(\w+)>\s*$")
THOUGHT = re.compile(r"<(\w+)>(.*?)</\1>\s*(.*)", re.DOTALL)
NEWLINE = "\n"


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
    if isinstance(prompt, str):
        asked = _plain_ids(prompt, tokenizer)
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
        text = render(prompt, row, tokenizer, add_generation_prompt=True)
        answer = _chat_answer(row, text, tokenizer)
        asked, whole = _ids(text, tokenizer), _ids(text + answer, tokenizer)
    if whole[: len(asked)] != asked:
        # Tokens merge across the boundary.
        whole = asked + _ids(answer, tokenizer)
    if empty or len(whole) == len(asked):
        raise InputError(f"row {row.get('id', '(no id)')}: the completion has no tokens to learn from")
    return whole, len(asked)


def _chat_answer(row: dict[str, Any], asked: str, tokenizer: Any) -> str:
    """What follows the prompt `asked`: a completion as the chat template writes it, up to the end of its turn."""
    prompt, completion, name = row["prompt"], row["completion"], row.get("id", "(no id)")
    whole = render(prompt + completion, row, tokenizer)
    thought = THOUGHT.match(str(completion[0].get("content") or "").lstrip()) if len(completion) == 1 else None
    tag = f"<{thought[1]}>" if thought else ""
    history = render(prompt, row, tokenizer) if thought or not whole.startswith(asked) else ""
    if thought and whole[len(history) :].count(tag) > 1:
        # The template reads a thought under a key of its own, and writes an empty one ahead of one in the content.
        apart = {**completion[0], "reasoning_content": thought[2].strip("\n"), "content": thought[3]}
        once = render([*prompt, apart], row, tokenizer)
        whole = once if once[len(history) :].count(tag) == 1 else whole
    if whole.startswith(asked):
        answer = whole[len(asked) :]
        if thought and asked.rstrip().endswith(tag) and answer.lstrip().startswith(tag):
            # The generation prompt has opened the thought already.
            answer = answer.lstrip().removeprefix(tag).lstrip("\n")
    elif asked.startswith(history) and whole.startswith(history):
        answer = _behind(asked[len(history) :], whole[len(history) :], thought, name, tokenizer)
    else:
        raise InputError(
            f"row {name}: the chat template writes the prompt differently once a completion follows it, so the model "
            "would be trained on another prompt than it is asked; use another model.chat_template"
        )
    for call in completion[0].get("tool_calls") or ():
        called = call.get("function", call).get("name")
        if called is not None and called not in answer.removesuffix(turn_end(tokenizer)):
            raise InputError(f"row {name}: the chat template does not write its call of {called!r}; "
                             "use another model.chat_template")  # fmt: skip
    if turn_end_token(tokenizer) is None and not answer.rstrip().endswith(tokenizer.eos_token or "\0"):
        _warn_of_end()
    return answer


@functools.cache
def _warn_of_end() -> None:
    log.warning(
        "the chat template ends an assistant's turn with no token of its own, so no row teaches the model to stop"
    )


def _behind(header: str, turn: str, thought: re.Match[str] | None, name: Any, tokenizer: Any) -> str:
    """The end of `turn` behind a generation prompt `header` that the template does not write in front of an answer.

    thought: what the answer begins with, where it is one.
    """
    opened = OPEN_TAG.search(header)
    if thought and opened and opened[1] == thought[1]:
        # The template leaves the thought out of a finished answer.
        return f"{thought[2].lstrip(NEWLINE)}</{thought[1]}>\n\n{thought[3]}{turn_end(tokenizer)}"
    shared = _shared_lines(header, turn)
    missing, rest = header.removeprefix(shared), turn.removeprefix(shared)
    closed = CLOSE_TAG.search(missing)
    if closed and f"</{closed[1]}>" in rest:
        raise InputError(
            f"row {name}: its answer holds a thought, but the generation prompt ends with {missing!r}, which asks for "
            "none; turn thinking on (such as model.chat_template_kwargs: {enable_thinking: true}, or the row's own "
            "chat_template_kwargs), or leave the thought out"
        )
    if OPEN_TAG.search(missing):
        rest = f"</{OPEN_TAG.findall(missing)[-1]}>\n\n{rest}"
    _warn_of_header(missing)
    return rest


def _shared_lines(one: str, other: str) -> str:
    """What two texts begin with, up to the end of a line or a tag, so that no word is cut."""
    n = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[: max(one.rfind(mark, 0, n) for mark in "\n>") + 1]


@functools.cache
def _warn_of_header(missing: str) -> None:
    log.warning(
        "the generation prompt ends with %r, which the chat template leaves out before a finished answer; training "
        "keeps it, because generation has it, and closes a thought that it opens. To train answers without thoughts, "
        "turn thinking off if the template can (model.chat_template_kwargs: {enable_thinking: false})",
        missing,
    )


@functools.cache
def _warn_of_tools() -> None:
    log.warning("rows have `tools`, which the chat template does not write: the model is not told of them")


def render(turns: list[dict], row: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    """Messages as the chat template writes them, given the row's `tools` and `chat_template_kwargs`."""
    tools, kwargs = as_value(row.get("tools")), as_value(row.get("chat_template_kwargs"))
    if _takes_blocks(tokenizer, str(tokenizer.chat_template)):
        turns = [_in_blocks(turn) for turn in turns]
    if tools and not _writes_tools(tokenizer, str(tokenizer.chat_template)):
        _warn_of_tools()
    try:
        # Of an empty list some templates write a heading without tools.
        return tokenizer.apply_chat_template(turns, tokenize=False, tools=tools or None, **options, **(kwargs or {}))
    except (TemplateError, TypeError) as error:
        raise InputError(f"row {row.get('id', '(no id)')}: the chat template refuses its messages: {error}") from error


def as_value(column: Any) -> Any:
    """A column that may hold JSON text."""
    return json.loads(column) if isinstance(column, str) and column else column


def _in_blocks(turn: dict[str, Any]) -> dict[str, Any]:
    text = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else turn


@functools.lru_cache(maxsize=8)
def _takes_blocks(tokenizer: Any, template: str) -> bool:
    """Whether a template reads messages as lists of blocks alone, as those of some vision models do.

    Of a text it would write nothing, and the model would be asked nothing, in silence.
    """
    text, blocks = (_probe(tokenizer, content) for content in (WORDS, [{"type": "text", "text": WORDS}]))
    return WORDS not in text and WORDS in blocks


@functools.lru_cache(maxsize=8)
def _writes_tools(tokenizer: Any, template: str) -> bool:
    tool = {"type": "function", "function": {"name": WORDS, "description": "", "parameters": {"type": "object",
            "properties": {}}}}  # fmt: skip
    content = [{"type": "text", "text": ""}] if _takes_blocks(tokenizer, template) else ""
    return WORDS in _probe(tokenizer, content, tools=[tool])


def _probe(tokenizer: Any, content: Any, *following: dict[str, Any], tools: list[dict] | None = None) -> str:
    """A question, an answer of `content` and what follows as the template writes them; "" where it refuses them."""
    try:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}, *following]
        return tokenizer.apply_chat_template(turns, tokenize=False, tools=tools)
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
    if eos is None or len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        return ids
    added = not text.endswith(eos) or (ids[-2] == ids[-1] and not text.endswith(eos * 2))
    return ids[:-1] if added else ids


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
