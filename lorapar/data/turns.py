"""Which of a row's tokens carry a loss: those of its last answer, or those of every turn of the assistant.

The tokens are `encode`'s in both cases; only their labels differ. An assistant's turn is what generation would have
written in its place: all behind the generation prompt, up to the end of the turn and with what the template writes
there. Earlier turns are found

    in a template with {% generation %}     by the marks, as transformers reads them
    in any other                            between the template's own words

For the second, the conversation is written once more with a word of ours in the place of each message's words. What is
the same in both texts is the template's; the messages' words must fill the rest to the letter. Where they do not, or a
turn's end is not the one that stops generation, the row is refused: a label is never guessed.
"""

import functools
import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from ..errors import InputError
from .messages import check_weights
from .tokens import (
    IGNORED,
    WORDS,
    chat_texts,
    check_written,
    encode,
    joined_ids,
    parted,
    render,
    shared_lines,
    text_ids,
    text_ids_behind,
    thought_of,
    turn_end_token,
    writes_calls,
    written_end,
)

Turns = Literal["last", "assistant"]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
# What a generation prompt may end with beside the assistant's name: a thought that it opens, or opens and closes.
THOUGHT_TAGS = re.compile(r"<(\w+)>\s*(</\1>\s*)?$")
OUR_WORD = re.compile(r"lorapar(\d+)word")
Span = tuple[int, int]


def labelled(row: dict[str, Any], tokenizer: Any, turns: Turns = "last") -> tuple[list[int], list[int]]:
    """(token ids, labels) of a row: a label is the token itself, or IGNORED where it carries no loss.

    turns: "last": the completion's; "assistant": those of every assistant message of prompt and completion. A plain
    text is no conversation: its completion is the assistant's only turn. A message of the weight 0 carries no loss.
    Raises InputError as `encode` does, for a row whose earlier turns cannot be told from the rest, and for one without
    a turn to learn from.
    """
    ids, n_prompt = encode(row, tokenizer)
    labels = [IGNORED] * n_prompt + ids[n_prompt:]
    row = parted(row)
    if isinstance(row["prompt"], str):
        return ids, labels
    prompt, completion = row["prompt"], row["completion"]
    check_weights(prompt, completion, turns, f"row {row.get('id', '(no id)')}")
    if turns == "last":
        return ids, labels
    answers = [turn for turn in (*prompt, *completion) if turn.get("role") == "assistant"]
    if any(turn.get("tool_calls") for turn in answers) and not writes_calls(tokenizer):
        raise InputError(f"row {row.get('id', '(no id)')}: data.loss: assistant: the chat template does not write tool "
                         "calls; use another model.chat_template, or leave such rows out")  # fmt: skip
    learned: list[Span] = []
    if any(turn.get("role") == "assistant" for turn in prompt):
        learned += _in_prompt(row, ids[:n_prompt], tokenizer)
    learned += [(n_prompt, len(ids))] if len(completion) == 1 else _in_completion(row, ids, n_prompt, tokenizer)
    if any(turn.get("weight") == 0 for turn in answers):
        learned = [span for span, turn in zip(learned, answers, strict=True) if turn.get("weight") != 0]
    labels = [IGNORED] * len(ids)
    for start, end in learned:
        labels[start:end] = ids[start:end]
    return ids, labels


def _in_prompt(row: dict[str, Any], ids: list[int], tokenizer: Any) -> list[Span]:
    """The assistant's tokens in a prompt, whose ids these are."""
    prompt, options = row["prompt"], {"add_generation_prompt": True}
    if _marks_turns(tokenizer):
        return _marked(prompt, row, tokenizer, ids, **options)
    text = render(prompt, row, tokenizer, **options)
    spans = list(_spans(prompt, row, tokenizer, text, **options).values())
    return _tokens_of(spans, ids, text, tokenizer, lambda end: text_ids(text[:end], tokenizer), row)


def _in_completion(row: dict[str, Any], ids: list[int], n_prompt: int, tokenizer: Any) -> list[Span]:
    """The assistant's tokens in a completion of several messages, the tools' answers and the headers between left out.

    The first turn begins where the prompt ends. What `encode` changes of the template's text is in that turn, so the
    others are at their places from the end.
    """
    prompt, completion, name = row["prompt"], row["completion"], row.get("id", "(no id)")
    turns = [*prompt, *completion]
    whole = render(turns, row, tokenizer)
    asked, answer = chat_texts(row, tokenizer)
    if _marks_turns(tokenizer):
        written = text_ids(whole, tokenizer)
        shift = len(ids) - len(written)
        spans = [(a + shift, b + shift) for a, b in _marked(turns, row, tokenizer, written) if b + shift > n_prompt]
        fits = len(spans) >= sum(turn.get("role") == "assistant" for turn in completion)
        fits = fits and ids[spans[0][1] :] == written[spans[0][1] - shift :]
    else:
        text = asked + answer
        shift = len(text) - len(whole)
        found = _spans(turns, row, tokenizer, whole)
        spans = [(a + shift, b + shift) for i, (a, b) in found.items() if i >= len(prompt)]
        fits = spans[0][1] > len(asked) and text[spans[0][1] :] == whole[spans[0][1] - shift :]
        spans[0] = len(asked), spans[0][1]

        def ids_up_to(end: int) -> list[int]:
            return joined_ids(asked, answer[: end - len(asked)], tokenizer)[0]

        spans = _tokens_of(spans, ids, text, tokenizer, ids_up_to, row) if fits else spans
    if not fits:
        raise _untold(name, "it writes the completion otherwise behind its prompt")
    spans[0] = n_prompt, spans[0][1]
    # As of a single answer, what the template writes behind the last turn.
    spans[-1] = spans[-1][0], len(ids) if completion[-1].get("role") == "assistant" else spans[-1][1]
    return spans


def _untold(name: Any, why: str) -> InputError:
    return InputError(
        f"row {name}: data.loss: assistant: the assistant's earlier turns cannot be told from the rest in this chat "
        f"template: {why}; mark them with {{% generation %}} in a model.chat_template, or use data.loss: last"
    )


# By the template's marks


def _marks_turns(tokenizer: Any) -> bool:
    # transformers maps the marks to tokens by what a fast tokenizer knows of its text.
    return tokenizer.is_fast and GENERATION.search(str(tokenizer.chat_template)) is not None


def _marked(turns: list[dict], row: dict[str, Any], tokenizer: Any, ids: list[int], **options: Any) -> list[Span]:
    """The runs of tokens within {% generation %}, each with the token that ends the turn where that comes next."""
    name = row.get("id", "(no id)")
    made: Any = render(
        turns, row, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    mask = list(made["assistant_masks"])
    if list(made["input_ids"]) != ids:
        raise _untold(name, "its marks are of other tokens")
    end = turn_end_token(tokenizer)
    for place in range(1, len(ids)):
        if mask[place - 1] and not mask[place] and ids[place] == end:
            mask[place] = 1
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
    spans = list(zip(edges[::2], edges[1::2]))
    expected = sum(turn.get("role") == "assistant" for turn in turns)
    if len(spans) < expected:
        raise _untold(name, f"it marks {len(spans)} of {expected} turns of the assistant")
    if len(spans) > expected and any(turn.get("weight") == 0 for turn in turns):
        raise _untold(name, f"it marks {len(spans)} parts of {expected} turns, one of which has the weight 0")
    return spans


# Between the template's own words


def _spans(turns: list[dict], row: dict[str, Any], tokenizer: Any, text: str, **options: Any) -> dict[int, Span]:
    """{place among `turns`: (start, end) in `text`} of the assistant's messages, in order; `text`: the turns as the
    template writes them."""
    name = row.get("id", "(no id)")
    apart = bool(_header(tokenizer, str(tokenizer.chat_template)))
    replaced, words = zip(*(_with_our_word(turn, i, apart, name) for i, turn in enumerate(turns)))
    pieces = OUR_WORD.split(render(list(replaced), row, tokenizer, **options))
    # [(message, start, end)] of what stands in the place of our words.
    regions: list[tuple[int, int, int]] = []
    place = len(pieces[0])
    fits = text.startswith(pieces[0])
    for message, behind in zip(map(int, pieces[1::2]), pieces[2::2]):
        form = next((form for form in _forms(words[message]) if text.startswith(form + behind, place)), None)
        if form is None or not fits:
            raise _untold(name, f"it changes message {message + 1}, or what is around it, by what the message says")
        regions.append((message, place, place + len(form)))
        place += len(form) + len(behind)
    if not fits or place != len(text):
        raise _untold(name, "it changes with what the messages say")
    spans: dict[int, Span] = {}
    for i, turn in enumerate(turns):
        if turn.get("role") == "assistant":
            spans[i] = _span(i, turn, regions, text, tokenizer, name)
            check_written([turn], [thought_of(turn)], text[slice(*spans[i])], name)
    return spans


def _with_our_word(turn: dict[str, Any], number: int, apart: bool, name: Any) -> tuple[dict[str, Any], str]:
    """(a message with a word of ours in the place of its words, or of its last call's name; what it stands for).

    apart: an assistant's thought stays as it is, ahead of the words.
    """
    ours, calls, content = f"lorapar{number}word", turn.get("tool_calls"), turn.get("content")
    if turn.get("role") == "assistant" and calls:
        last = calls[-1]
        inner = last["function"] if isinstance(last.get("function"), dict) else last
        renamed = {**inner, "name": ours}
        last = {**last, "function": renamed} if inner is not last else renamed
        return {**turn, "tool_calls": [*calls[:-1], last]}, str(inner.get("name"))
    if not isinstance(content or "", str):
        if turn.get("role") == "assistant":
            raise _untold(name, f"message {number + 1} is a list of blocks")
        return turn, ""
    thought = thought_of(turn) if apart and turn.get("role") == "assistant" else None
    said = thought[2] if thought else content or ""
    return {**turn, "content": (content or "").removesuffix(said) + ours if said else (content or "") + ours}, said


def _forms(words: str) -> list[str]:
    """Words as templates write them: as they are, without spaces around, as JSON."""
    return [words, words.strip(), words.lstrip(), words.rstrip(), words.strip("\n"), words.lstrip("\n"),
            json.dumps(words), json.dumps(words, ensure_ascii=False)]  # fmt: skip


def _span(
    i: int, turn: dict[str, Any], regions: list[tuple[int, int, int]], text: str, tokenizer: Any, name: Any
) -> Span:
    """Message i's turn in `text`: from behind the assistant's header to the end of the turn."""
    own = [place for place, region in enumerate(regions) if region[0] == i]
    if not own or own != list(range(own[0], own[-1] + 1)):
        raise _untold(name, f"it does not write message {i + 1} in one piece")
    first, last = own[0], own[-1]
    before = regions[first - 1][2] if first else 0
    after = regions[last + 1][1] if last + 1 < len(regions) else len(text)
    begins, ends = regions[first][1], regions[last][2]
    header, end = _header(tokenizer, str(tokenizer.chat_template)), written_end(tokenizer)
    found = text.find(header, before, begins) if header else -1
    if header and found < 0:
        raise _untold(name, f"it writes no {header!r} ahead of message {i + 1}")
    if not header and (turn.get("tool_calls") or not text[before:begins].strip()):
        raise _untold(name, f"it writes nothing that shows where message {i + 1} begins")
    start = found + len(header) if header else before + len(text[before:begins].rstrip())
    token = turn_end_token(tokenizer)
    mark = "" if token is None else tokenizer.convert_ids_to_tokens(token)
    core = end[: end.index(mark) + len(mark)] if mark and mark in end else end.rstrip()
    if not core:
        if turn.get("tool_calls"):
            raise _untold(name, f"it writes nothing that shows where message {i + 1} ends")
        return start, ends
    stop = text.find(core, ends, after)
    # Behind a call's name come its arguments, which may say anything.
    if stop < 0 or (text.count(core, ends, after) > 1 if turn.get("tool_calls") else text[ends:stop].strip()):
        raise _untold(name, f"it ends message {i + 1} otherwise than a last answer, which ends with {core!r}")
    stop += len(core)
    rest = end[len(core) :]
    return start, stop + len(rest if text.startswith(rest, stop) else shared_lines(rest, text[stop:after]))


@functools.lru_cache(maxsize=8)
def _header(tokenizer: Any, template: str) -> str:
    """What the template writes ahead of an assistant's words, by its generation prompt, without a thought's tags."""
    user, system = {"role": "user", "content": WORDS}, {"role": "system", "content": WORDS}
    for turns in ([user], [system, user]):
        try:
            history, asked = (render(turns, {}, tokenizer, add_generation_prompt=flag) for flag in (False, True))
        except (InputError, TemplateError):
            continue
        # Some end a text that ends with a question.
        shared = history if asked.startswith(history) else shared_lines(history, asked)
        return THOUGHT_TAGS.sub("", asked[len(shared) :])
    return ""


# Text to tokens


def _tokens_of(
    spans: list[Span], ids: list[int], text: str, tokenizer: Any, ids_up_to: Callable[[int], list[int]],
    row: dict[str, Any],
) -> list[Span]:  # fmt: skip
    """The places in `ids`, the tokens of `text`, of spans of characters in it."""
    name = row.get("id", "(no id)")
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    parts = [text_ids(text[: cuts[1]], tokenizer)]
    parts += [text_ids_behind(text[a:b], tokenizer) if a < b else [] for a, b in pairwise(cuts[1:])]
    if [token for part in parts for token in part] == ids:
        ends = [sum(map(len, parts[: n + 1])) for n in range(len(parts))]
        places = ends[:-1]
    else:
        # Tokens merge across a cut, or the tokenizer begins every text with a space of its own.
        places = [_boundary(cut, ids, ids_up_to, tokenizer, name) for cut in cuts[1:-1]]
    return list(zip(places[::2], places[1::2]))


def _boundary(cut: int, ids: list[int], ids_up_to: Callable[[int], list[int]], tokenizer: Any, name: Any) -> int:
    """The first token that holds anything behind the character `cut`; it may hold spaces ahead of it."""
    ahead = ids_up_to(cut)
    place = _common(ahead, ids)
    if tokenizer.decode(ahead[place:]).strip():
        raise _untold(name, f"a token holds {tokenizer.decode(ahead[place:])!r} and part of the next turn")
    return place


def _common(one: Any, other: Any) -> int:
    """How many elements two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
