"""Which of a data set's columns is the prompt, which the completion: as the recipe says, else by the names in use.

    messages                                   a chat; its last answer is the completion
    prompt, question, instruction, ...         with one of completion, response, output, answer, solution, ...
    instruction (+ input) and output           Alpaca; the input follows the instruction
    chosen and rejected, a text without parts  refused, with the `data.columns` line to write

Where two columns could be meant, none is taken: the error has the line to write, filled with the best guess.
"""

import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .messages import CHATS, is_chat

if TYPE_CHECKING:
    from ..recipe.sections import DataConfig

log = logging.getLogger("lorapar")
OUR_COLUMNS = ("prompt", "input", "history", "completion", "answer", "system", "messages")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "inputs", "user", "human")
COMPLETIONS = ("completion", "response", "output", "answer", "solution", "generation", "target", "targets", "assistant")
# What belongs to an instruction, and what systems are told.
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
PREFERENCES = ("chosen", "rejected")
# Of data that says of each completion whether it is a good one.
VERDICTS = ("label", "kto_tag", "desirable")
# Columns that a question may need to be understood.
BESIDE_A_QUESTION = ("input", "context", "passage", "article", "document", "choices", "options")
# Words in the name of a column that is probably the prompt, or the completion.
LIKE_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "user", "human", "frage", "article")
LIKE_COMPLETIONS = ("completion", "response", "output", "answer", "solution", "reply", "target", "assistant", "summary")
LABEL = re.compile(r"(?:s|sys|system)?[\s_-]*[12](?:\.0*)?", re.IGNORECASE)
# What a column is hardly called: a number, the end of a sentence, a long text.
NO_NAME = re.compile(r"^[-+]?\d[\d.,]*$|[.?!=:]$|.{48}", re.DOTALL)
LOOKED_AT = 200  # rows, for what a column holds

Rows = Sequence[dict[str, Any]]


def find_columns(rows: Rows, config: "DataConfig", source: str) -> dict[str, str]:
    """Our column → the source's column, where it has one: `messages`, or `prompt` and `completion`, and the others.

    InputError, with the `data.columns` line to write, where the names there do not say it.
    """
    if source.startswith("reasoning_gym:"):
        return {"prompt": "question", "completion": "completion", "answer": "answer"}
    there = list({name: None for row in rows for name in row})
    for ours, theirs in config.columns.items():
        if ours not in OUR_COLUMNS:
            raise InputError(f"data.columns: unknown key {ours!r}; allowed: {', '.join(OUR_COLUMNS)}")
        if theirs not in there:
            raise InputError(f"data.columns.{ours}: {source} has no column {theirs!r}; it has {', '.join(there)}")
    columns = dict(config.columns)
    named = _named(there)
    if "messages" not in columns and "prompt" not in columns:
        columns |= _find_prompt(rows, columns, named, source, there)
    taken = [theirs for ours, theirs in columns.items() if ours != "completion"]
    if "answer" not in columns and "answer" in named and named["answer"] not in taken:
        columns["answer"] = named["answer"]
    if "completion" not in columns and "prompt" in columns:
        columns["completion"] = _find_completion(rows, columns, config.columns, named, source, there)
    _check_verdicts(rows, columns, config.columns, named, source)
    told = next((named[name] for name in SYSTEMS if name in named and _tells(rows, named[name])), None)
    if "system" not in columns and told is not None and told not in columns.values():
        columns["system"] = told
    _check_apart(columns)
    _warn_of_unused(rows, columns, config, named, source)
    return columns


def _check_apart(columns: dict[str, str]) -> None:
    """InputError where one column stands for two of ours. A completion may be its own answer."""
    seen: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs in seen and {ours, seen[theirs]} != {"completion", "answer"}:
            raise InputError(f"data.columns: {seen[theirs]} and {ours} are both column {theirs!r}; name one for each")
        seen[theirs] = ours


def _named(there: Sequence[str]) -> dict[str, str]:
    """{a name in small letters: the column}, where just one column has it; a column that is spelled so comes first."""
    folded = [name.strip().casefold() for name in there]
    return {name: column for name, column in zip(folded, there) if folded.count(name) == 1 or name == column}


def _find_prompt(
    rows: Rows, mapped: dict[str, str], named: dict[str, str], source: str, there: Sequence[str]
) -> dict[str, str]:
    """{"messages" or "prompt": column}, with the input and the history that belong to an instruction."""
    answered = bool({"completion", "answer"} & {*mapped, *named})
    for name in ("prompt", "question"):
        if name in named and answered:
            return {"prompt": named[name]}
    if "completion" not in mapped and set(PREFERENCES) <= set(named):
        raise _of_preferences(rows, mapped, named, source, there)
    chat = next((named[name] for name in CHATS if name in named and _is(is_chat, rows, named[name])), None)
    if chat is None:
        # What is wrong with these, the rows say.
        chat = next((named[name] for name in CHATS if name in named and (
            name == "messages" or all(is_blank(row.get(named[name])) for row in rows))), None)  # fmt: skip
    if chat is not None:
        return {"messages": chat}
    if "instruction" in named:
        found = {"prompt": named["instruction"]}
        beside = [named[name] for name in INPUTS if name in named and named[name] not in mapped.values()]
        if len(beside) == 1 and "input" not in mapped:
            found["input"] = beside[0]
        if "history" in named and "history" not in mapped:
            found["history"] = named["history"]
        others = [name for name in PROMPTS if name in named and name not in ("instruction", *INPUTS)]
        if not others:
            return found
    candidates = [named[name] for name in PROMPTS if name in named and named[name] not in mapped.values()]
    if len(candidates) == 1:
        return {"prompt": candidates[0]}
    raise _not_known(rows, mapped, source, there, "prompt", candidates)


def _find_completion(
    rows: Rows, columns: dict[str, str], mapped: dict[str, str], named: dict[str, str], source: str,
    there: Sequence[str],
) -> str:  # fmt: skip
    if "completion" in named:
        return named["completion"]
    candidates = [named[name] for name in COMPLETIONS if name in named and named[name] not in columns.values()]
    answer = columns.get("answer")
    # These are asked for by our own names, which an answer of GSM8K's kind goes with.
    if answer is not None and (not candidates or "prompt" in mapped or columns["prompt"] in ("prompt", "question")):
        return answer
    if len(candidates) == 1:
        return candidates[0]
    raise _not_known(rows, columns, source, there, "completion", candidates)


def _check_verdicts(
    rows: Rows, columns: dict[str, str], mapped: dict[str, str], named: dict[str, str], source: str
) -> None:
    """Refuse data that calls some of its completions bad, unless the recipe names the completion itself."""
    if "completion" in mapped or "messages" in mapped:
        return
    for name in VERDICTS:
        values = {str(row.get(named[name])).strip().casefold() for row in rows} if name in named else set()
        if values == {"true", "false"} or values == {"false"}:
            kept = {ours: columns[ours] for ours in OUR_COLUMNS if ours in columns and ours != "answer"}
            raise InputError(
                f"data.sources: {source} has a column {named[name]!r} of true and false, which says of a completion "
                "whether it is a good one; keep the rows with true alone, without that column, or train on all with "
                f"{columns_line(kept)}"
            )


def _tells(rows: Rows, column: str) -> bool:
    """Whether a column holds what a model is told at the start of a chat: sentences, not the labels 1 and 2."""
    values = [row.get(column) for row in rows if not is_blank(row.get(column))]
    return bool(values) and all(isinstance(value, str) and not LABEL.fullmatch(value.strip()) for value in values) and (
        any(len(str(value).split()) > 1 for value in values)
    )  # fmt: skip


def _warn_of_unused(
    rows: Rows, columns: dict[str, str], config: "DataConfig", named: dict[str, str], source: str
) -> None:
    """Say which columns that look as if the model should see them are in neither prompt nor completion."""
    used = {*columns.values(), *re.findall(r"{(\w+)", config.prompt + config.completion)}
    if "messages" in columns:
        return
    for name in BESIDE_A_QUESTION:
        if name in named and named[name] not in used and any(not is_blank(row.get(named[name])) for row in rows):
            log.warning("data: %s: column %r is not part of the prompt; data.prompt: \"{%s}\\n\\n{prompt}\" puts it "
                        "there", source, named[name], named[name])  # fmt: skip
    for name in COMPLETIONS:
        if name in named and named[name] not in used and name not in PROMPTS and "completion" not in config.columns:
            log.warning("data: %s: the completion is column %r, and %r is not used; %s trains on that", source,
                        columns.get("completion"), named[name], columns_line({"completion": named[name]}))  # fmt: skip


# What to write


def columns_line(mapping: dict[str, str]) -> str:
    """A recipe's line that maps these columns."""

    def quoted(name: str) -> str:
        plain = re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII)
        return name if plain and name.casefold() not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null") \
            else json.dumps(name, ensure_ascii=False)  # fmt: skip

    return f"data.columns: {{{', '.join(f'{ours}: {quoted(theirs)}' for ours, theirs in mapping.items())}}}"


def _of_preferences(
    rows: Rows, mapped: dict[str, str], named: dict[str, str], source: str, there: Sequence[str]
) -> InputError:
    chosen = named["chosen"]
    begins = f"data.sources: {source} has pairs of a better and a worse answer (chosen, rejected)"
    first = next((row[chosen] for row in rows if not is_blank(row.get(chosen))), "")
    if is_chat(first) and isinstance(first, list | str) and not _answers_alone(first):
        return InputError(f"{begins}; to train on the better one, write {columns_line({**mapped, 'messages': chosen})}")
    chat = next((named[name] for name in CHATS if name in named and _is(is_chat, rows, named[name])), None)
    if chat is not None:
        line = columns_line({**mapped, "prompt": chat, "completion": chosen})
        return InputError(f"{begins}; to train on the better one, write {line}")
    try:
        _find_prompt(rows, {**mapped, "completion": chosen}, named, source, there)
    except InputError:
        guessed = _guess(rows, {**mapped, "completion": chosen}, [name for name in there if name not in PREFERENCES])
        if guessed is None:
            return InputError(f"{begins}, each with its prompt in one text; write the better one in two columns, "
                              "prompt and completion, or as messages")  # fmt: skip
        return InputError(f"{begins}; to train on the better one, write {columns_line(guessed)}")
    return InputError(f"{begins}; to train on the better one, write {columns_line({**mapped, 'completion': chosen})}")


def _answers_alone(chat: Any) -> bool:
    turns = json.loads(chat) if isinstance(chat, str) else chat
    return str(turns[0].get("role", turns[0].get("from"))).casefold() not in ("user", "human", "system")


def _not_known(
    rows: Rows, known: dict[str, str], source: str, there: Sequence[str], what: str, candidates: Sequence[str]
) -> InputError:
    """Columns whose names do not say which is the prompt, or which the completion."""
    had = f"it has {', '.join(there)}"
    if candidates:
        begins = f"data.columns.{what}: {source} has more than one column that may be it ({', '.join(candidates)})"
    elif what == "prompt":
        begins = f"data.columns.prompt: {source} has no column prompt, question or messages, or another known name"
    else:
        begins = f"data.columns.completion: {source} has no column completion or answer, or another known name"
    if re.search(r"\.[ct]sv(\.\w+)?$", source, re.IGNORECASE) and any(map(NO_NAME.search, there)):
        return InputError(f"data.sources: {source} seems to have no header: its first line is {', '.join(there)}; put "
                          "a line with the columns' names above it, such as prompt,completion")  # fmt: skip
    guessed = _guess(rows, known, there)
    if guessed is not None:
        return InputError(f"{begins}; {had}; write, if this is what they are, {columns_line(guessed)}")
    if "text" in there:
        return InputError(f"{begins}; {had}; a text alone does not say where its prompt ends: split it into two "
                          "columns, prompt and completion")  # fmt: skip
    return InputError(f"{begins}; {had}; a row needs a prompt and a completion, or messages")


def _guess(rows: Rows, known: dict[str, str], there: Sequence[str]) -> dict[str, str] | None:
    """The most likely mapping of columns that hold text or messages; None where there are too few of them."""
    left = [name for name in there if name not in known.values()]
    chat = next((name for name in left if _is(is_chat, rows, name)), None)
    if chat is not None and not {"prompt", "completion"} & set(known):
        return {**known, "messages": chat}
    texts = [name for name in left if _is(lambda value: isinstance(value, str), rows, name)]
    mapping = dict(known)
    for ours, words, other in (("prompt", LIKE_PROMPTS, LIKE_COMPLETIONS), ("completion", LIKE_COMPLETIONS, ())):
        if ours in mapping:
            continue
        beside = BESIDE_A_QUESTION if ours == "completion" else ()
        able = [name for name in texts if name not in mapping.values() and name.casefold() not in beside]
        if not able:
            return None
        named = [name for word in words for name in able if word in name.casefold()]
        unlike = [name for name in able if not any(word in name.casefold() for word in other)]
        longest = max(unlike or able, key=lambda name: (_length(rows, name), -able.index(name)))
        mapping[ours] = named[0] if named else (unlike or able)[0] if ours == "prompt" else longest
    order = {ours: at for at, ours in enumerate(OUR_COLUMNS)}
    return dict(sorted(mapping.items(), key=lambda item: order[item[0]]))


def _length(rows: Rows, column: str) -> int:
    return sum(len(str(row.get(column, ""))) for row in rows[:LOOKED_AT])


def _is(test: Any, rows: Rows, column: str) -> bool:
    """Whether the first values that a column has all pass a test."""
    values = [row[column] for row in rows[:LOOKED_AT] if not is_blank(row.get(column))]
    return bool(values) and all(map(test, values))


def is_blank(value: Any) -> bool:
    """True for None, NaN (a columnar file's None), an empty list, and text without a visible character."""
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())
