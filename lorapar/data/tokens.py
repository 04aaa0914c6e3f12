"""A row's text as tokens, by the tokenizer's chat template or as plain text.

Everything takes its tokens from here: length limits, the plan, scoring, SFT, the prompts of GRPO and evaluation, and
the card of an exported model. A row is trained on behind exactly the tokens that generation gives the model:

    prompt as generation sees it  +  completion up to the end of the turn
"""

import functools
import json
import logging
import re
from collections.abc import Mapping
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
# The keys that a message's thought may have, apart from its content.
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
NEWLINE = "\n"
# What a chat template is given by us: no variables for a row or a recipe to set.
OURS = ("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt",
        "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "padding", "truncation", "max_length")  # fmt: skip


def prompt_ids(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt's token ids as generation sees them: a chat ends with the template's generation prompt."""
    row = parted(row)
    if isinstance(row["prompt"], str):
        return _asked_plainly(row, tokenizer)
    return text_ids(render(row["prompt"], row, tokenizer, add_generation_prompt=True), tokenizer)


def parted(row: dict[str, Any], needed: tuple[str, ...] = ("prompt",)) -> dict[str, Any]:
    """A row whose `messages` are a prompt and the last that an assistant says, with these as columns; InputError for a
    row without the columns `needed`."""
    if "messages" in row and "prompt" not in row:
        turns = row["messages"]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return {**row, "prompt": turns[:last], "completion": turns[last : last + 1]}
    check_columns(row, needed)
    return row


def check_columns(row: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """InputError for a row without one of the columns `needed`."""
    missing = [column for column in needed if column not in row]
    if missing:
        raise InputError(
            f"row {row.get('id', '(no id)')}: no {missing[0]}; a row holds prompt and completion, messages, or "
            "input_ids and labels"
        )


def encode(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int]:
    """(token ids of prompt and completion, number of prompt tokens); the prompt's are those of `prompt_ids`.

    A plain completion gets the EOS token unless it ends with it; a chat gets what its template writes. Nothing is cut.
    InputError for a row without completion tokens.

    Where the prompt's tokens begin those of the whole, this is what TRL's SFTTrainer prepares (`_prepare_dataset`, TRL
    1.16; a test holds the two equal). Elsewhere TRL trains on a context that generation never sees: it drops the tokens
    at the prompt's end that merge with the completion's beginning, or the part of a generation prompt that the template
    does not write in front of a finished answer.
    """
    row = parted(row, ("prompt", "completion"))
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) != isinstance(completion, str) or completion in (None, []):
        raise InputError(
            f"row {row.get('id', '(no id)')}: prompt and completion must both be text, or both be lists of messages; "
            f"got {type(prompt).__name__} and {completion!r:.40}"
        )
    if isinstance(prompt, str):
        asked = _asked_plainly(row, tokenizer)
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError(
                "model.eos_token: the tokenizer has no EOS token, which ends a plain completion; name one of its tokens"
            )
        empty = completion in ("", eos)
        answer = completion if completion.endswith(eos) else completion + eos
        whole = _plain_ids(prompt + answer, tokenizer)
        if whole[: len(asked)] != asked:
            # Tokens merge across the boundary.
            whole = asked + text_ids_behind(answer, tokenizer)
        n_prompt = len(asked)
    else:
        if not prompt or completion[0].get("role") != "assistant":
            raise InputError(f"row {row.get('id', '(no id)')}: expected a prompt of at least one message, then an "
                             "assistant's")  # fmt: skip
        empty = not any(turn.get("content") or turn.get("tool_calls") for turn in completion)
        whole, n_prompt = joined_ids(*chat_texts(row, tokenizer), tokenizer)
    if empty or len(whole) == n_prompt:
        raise InputError(f"row {row.get('id', '(no id)')}: the completion has no tokens to learn from")
    return whole, n_prompt


def chat_texts(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """(a chat's prompt as generation sees it, what is trained on behind it) as text."""
    asked = render(row["prompt"], row, tokenizer, add_generation_prompt=True)
    return asked, _chat_answer(row, asked, tokenizer)


def joined_ids(asked: str, answer: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int]:
    """(ids of a chat's two texts, number of the first's): those of the whole, where they begin with the first's own."""
    ids, whole = text_ids(asked, tokenizer), text_ids(asked + answer, tokenizer)
    # Else tokens merge across the boundary.
    return whole if whole[: len(ids)] == ids else ids + text_ids_behind(answer, tokenizer), len(ids)


def _chat_answer(row: dict[str, Any], asked: str, tokenizer: Any) -> str:
    """What follows the prompt `asked`: a completion as the chat template writes it, up to the end of its turn."""
    prompt, completion, name = row["prompt"], row["completion"], row.get("id", "(no id)")
    whole = render(prompt + completion, row, tokenizer)
    thoughts = [thought_of(turn) for turn in completion]
    thought = thoughts[0]
    tag = f"<{thought[0]}>" if thought and thought[0] else ""
    if whole.startswith(asked):
        answer = whole[len(asked) :]
        if tag and asked.rstrip().endswith(tag) and answer.lstrip().startswith(tag):
            # The generation prompt has opened the thought already.
            answer = answer.lstrip().removeprefix(tag).lstrip("\n")
    else:
        history = render(prompt, row, tokenizer)
        if not (asked.startswith(history) and whole.startswith(history)):
            raise InputError(
                f"row {name}: the chat template writes the prompt differently once a completion follows it, so the "
                "model would be trained on another prompt than it is asked; use another model.chat_template"
            )
        alone = thought if len(completion) == 1 else None
        answer = _behind(asked[len(history) :], whole[len(history) :], alone, name, tokenizer)
    check_written(completion, thoughts, answer, name)
    token = turn_end_token(tokenizer)
    ends = [tokenizer.eos_token] if token is None else [tokenizer.eos_token, tokenizer.convert_ids_to_tokens(token)]
    if not completion[-1].get("tool_calls") and not any(end in answer for end in ends if end):
        _warn_of_end()
    return answer


def thought_of(turn: dict[str, Any]) -> tuple[str, str, str] | None:
    """(tag, thought, the rest) of a message: in its content, or under a key of its own, with "" for a tag."""
    content = str(turn.get("content") or "")
    found = THOUGHT.match(content.lstrip())
    if found:
        return found[1], found[2], found[3]
    apart = next((turn[key] for key in THOUGHT_KEYS if turn.get(key)), None)
    return ("", str(apart), content) if apart else None


def check_written(completion: list[dict], thoughts: list[tuple[str, str, str] | None], answer: str, name: Any) -> None:
    """Refuse an answer without a call that the row holds; warn of one without a thought or words that it holds."""
    said = [str(turn["content"]) for turn in completion if isinstance(turn.get("content"), str)]
    for turn, thought in zip(completion, thoughts):
        for call in turn.get("tool_calls") or ():
            called = call.get("function", call).get("name")
            # A call may be named in words too.
            in_words = sum(words.count(called) for words in said if words.strip() in answer) if called else 0
            if called is not None and answer.count(called) <= in_words:
                raise InputError(f"row {name}: the chat template does not write its call of {called!r}; "
                                 "use another model.chat_template")  # fmt: skip
        words = thought[2] if thought else turn.get("content")
        if thought and thought[1].strip() not in answer:
            _warn_of_loss("thought", "thoughts")
        if turn.get("role") == "assistant" and isinstance(words, str) and words.strip() not in answer:
            _warn_of_loss("words beside a tool call" if turn.get("tool_calls") else "words", "words")


@functools.cache
def _warn_of_loss(what: str, these: str) -> None:
    log.warning(
        "the chat template does not write an answer's %s as the rows have it: these %s are not trained on; use another "
        "model.chat_template to train on them", what, these,
    )  # fmt: skip


@functools.cache
def _warn_of_end() -> None:
    log.warning(
        "the chat template writes no token behind a last answer that ends it, so no row teaches the model to stop"
    )


def _behind(header: str, turn: str, thought: tuple[str, str, str] | None, name: Any, tokenizer: Any) -> str:
    """The end of `turn` behind a generation prompt `header` that the template does not write in front of an answer.

    thought: what the answer begins with, where it is one.
    """
    opened = OPEN_TAG.search(header)
    if thought and opened and (thought[0] == opened[1] or (not thought[0] and thought[1].strip() not in turn)):
        # The template leaves the thought out of a finished answer.
        inner = thought[1].lstrip(NEWLINE) if thought[0] else thought[1].strip() + NEWLINE
        return f"{inner}</{opened[1]}>\n\n{thought[2]}{turn_end(tokenizer)}"
    shared = shared_lines(header, turn)
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


def shared_lines(one: str, other: str) -> str:
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
def _warn_of_tools(what: str) -> None:
    log.warning("rows have `tools`, which %s does not write: the model is not told of them", what)


@functools.cache
def _warn_of_calls() -> None:
    log.warning("rows have tool calls, which the chat template does not write: the model does not see them in a "
                "prompt; use another model.chat_template")  # fmt: skip


def render(turns: list[dict], row: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    """Messages as the chat template writes them, given the row's `tools` and `chat_template_kwargs`."""
    tools, kwargs, options = _tools(row), row_kwargs(row), {"tokenize": False, **options}
    turns = [_apart(turn, tokenizer) if turn.get("role") == "assistant" else turn for turn in turns]
    if _takes_blocks(tokenizer, str(tokenizer.chat_template)):
        turns = [_in_blocks(turn) for turn in turns]
    if tools and not _writes_tools(tokenizer, str(tokenizer.chat_template)):
        _warn_of_tools("the chat template")
    if any(turn.get("tool_calls") for turn in turns) and not writes_calls(tokenizer):
        _warn_of_calls()
    refused: Exception | None = None
    for as_text in (False, True) if any(turn.get("tool_calls") for turn in turns) else (False,):
        called = [_with_arguments(turn, as_text) for turn in turns]
        try:
            # Of an empty list some templates write a heading without tools.
            return tokenizer.apply_chat_template(called, tools=tools or None, **options, **kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            refused = refused or error
    raise InputError(f"row {row.get('id', '(no id)')}: the chat template refuses its messages: {refused}") from refused


def row_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's `chat_template_kwargs`: an object, or JSON text of one; {} where it has none."""
    kwargs = _of_column(row, "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise _no_such(row, "chat_template_kwargs", kwargs, "an object of the chat template's variables")
    for name in kwargs or {}:
        if name in OURS:
            raise InputError(
                f"row {row.get('id', '(no id)')}: column 'chat_template_kwargs': {name!r} is no variable of a chat "
                "template; remove it"
            )
    return kwargs or {}


def _tools(row: dict[str, Any]) -> list[Any]:
    """The row's `tools`: a list of objects, each of which or all of it may be JSON text; [] where it has none."""
    tools = _of_column(row, "tools")
    if tools is not None and not isinstance(tools, list):
        raise _no_such(row, "tools", tools, "a list of tools, each an object with a name and parameters")
    made = [_of_column({**row, "tools": tool}, "tools") if isinstance(tool, str) else tool for tool in tools or ()]
    for tool in made:
        if not isinstance(tool, dict) and not callable(tool):
            raise _no_such(row, "tools", tool, "a list of tools, each an object with a name and parameters")
    return made


def _of_column(row: dict[str, Any], column: str) -> Any:
    """What a column holds, as JSON text or as it is; None for an empty cell (a columnar file's may be NaN)."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            return json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            raise _no_such(row, column, value, "JSON text, or its value") from None
    return None if isinstance(value, float) and value != value else value


def _no_such(row: dict[str, Any], column: str, given: Any, expected: str) -> InputError:
    return InputError(f"row {row.get('id', '(no id)')}: column {column!r}: got {given!r:.60}, expected {expected}")


def _apart(turn: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A message with its thought under a key of its own, where the template writes an empty one ahead of one in the
    content."""
    thought = thought_of(turn)
    if thought is None or not thought[0] or not _doubles(tokenizer, str(tokenizer.chat_template), thought[0]):
        return turn
    return {**turn, "reasoning_content": thought[1].strip("\n"), "content": thought[2]}


@functools.lru_cache(maxsize=8)
def _doubles(tokenizer: Any, template: str, tag: str) -> bool:
    # Once for the user, who may write what he likes.
    return _probe(tokenizer, f"<{tag}>\n{WORDS}\n</{tag}>\n\n{WORDS}").count(f"<{tag}>") > 2


def _with_arguments(turn: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """A message whose tool calls have their arguments as objects, or as the JSON text that a few templates want.

    Data in OpenAI's form has them as text, of which most templates would write a quoted string.
    """
    if not turn.get("tool_calls"):
        return turn
    return {**turn, "tool_calls": [_with_arguments_of(call, as_text) for call in turn["tool_calls"]]}


def _with_arguments_of(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments_of(call["function"], as_text)}
    given = call.get("arguments")
    if as_text:
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)} if isinstance(given, dict) else call
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        return call
    return {**call, "arguments": value} if isinstance(value, dict) else call


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


def writes_calls(tokenizer: Any) -> bool:
    """Whether the chat template writes the calls of an assistant's message; True where it refuses every message that
    is tried, and so says itself what it wants."""
    return _writes_calls(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _writes_calls(tokenizer: Any, template: str) -> bool:
    asked, said = (
        [{"type": "text", "text": text}] if _takes_blocks(tokenizer, template) else text for text in ("Q", "")
    )
    written = []
    # As objects, and as the text that a few templates want.
    for arguments in ({"a": 1}, '{"a": 1}'):
        call = {"id": "call00000", "type": "function", "function": {"name": WORDS, "arguments": arguments}}
        calling = [{"role": "user", "content": asked}, {"role": "assistant", "content": said, "tool_calls": [call]}]
        # Some ask for a system turn, some for the call's result.
        for before, behind in (((), ()), (("system",), ()), ((), ("tool",)), (("system",), ("tool",))):
            turns = [*({"role": role, "content": asked} for role in before), *calling,
                     *({"role": role, "tool_call_id": "call00000", "content": asked} for role in behind)]  # fmt: skip
            try:
                written.append(tokenizer.apply_chat_template(turns, tokenize=False))
            except (TemplateError, TypeError, ValueError):
                continue
    return not written or any(WORDS in text for text in written)


def _probe(tokenizer: Any, content: Any, *following: dict[str, Any], tools: list[dict] | None = None) -> str:
    """A question, an answer of `content` and what follows as the template writes them; "" where it refuses them."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}, *following]
    system = {"role": "system", "content": "S" if isinstance(content, str) else [{"type": "text", "text": "S"}]}
    # Some ask for a system turn.
    for asked in (turns, [system, *turns]):
        try:
            return tokenizer.apply_chat_template(asked, tokenize=False, tools=tools)
        except (TemplateError, TypeError, ValueError):
            continue
    return ""


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, template: str, eos: str | None) -> str:
    blocks = _takes_blocks(tokenizer, template)
    content = [{"type": "text", "text": WORDS}] if blocks else WORDS
    for following in ((), ({"role": "user", "content": content},)):
        _, found, end = _probe(tokenizer, content, *following).partition(WORDS)[2].partition(WORDS)
        # Templates that never end the last turn end one by the token that begins the next.
        if found and end.strip():
            return end.partition(WORDS)[0]
    return ""


@functools.lru_cache(maxsize=8)
def _written_end(tokenizer: Any, template: str, eos: str | None) -> str:
    content = [{"type": "text", "text": WORDS}] if _takes_blocks(tokenizer, template) else WORDS
    return _probe(tokenizer, content).partition(WORDS)[2].partition(WORDS)[2]


def written_end(tokenizer: Any) -> str:
    """What the chat template writes after the words of a last answer; "" where that is nothing."""
    return _written_end(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)


def turn_end(tokenizer: Any) -> str:
    """What the chat template writes after an assistant's words; "" without a template, or where that is nothing."""
    given = tokenizer.chat_template
    return _turn_end(tokenizer, str(given), tokenizer.eos_token) if given else ""


def turn_end_token(tokenizer: Any) -> int | None:
    """The first token of its own that the chat template writes behind an assistant's words; None where it has none."""
    end = turn_end(tokenizer)
    added = {**tokenizer.get_added_vocab(), **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))}
    # Some tokenizers have runs of spaces or line ends as added tokens.
    found = [(end.index(token), -len(token), added[token]) for token in added if token.strip() and token in end]
    return min(found)[2] if found else None


def text_ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_ids_behind(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text that follows another: SentencePiece begins a text with a space of its own."""
    first = text_ids(NEWLINE, tokenizer) if _begins_with_space(tokenizer) else []
    ids = text_ids(NEWLINE + text, tokenizer) if first else []
    return ids[len(first) :] if first and ids[: len(first)] == first else text_ids(text, tokenizer)


@functools.lru_cache(maxsize=8)
def _begins_with_space(tokenizer: Any) -> bool:
    return tokenizer.decode(text_ids("a", tokenizer) * 2) == "a a"


def _asked_plainly(row: dict[str, Any], tokenizer: Any) -> list[int]:
    if row.get("tools") is not None and _tools(row):
        _warn_of_tools("a plain prompt")
    return _plain_ids(row["prompt"], tokenizer)


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
