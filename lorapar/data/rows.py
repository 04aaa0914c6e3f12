"""Rows of every source in one form, split by what the prompt says.

    read → columns to prompt, completion, answer → duplicates out → too long out → held out by content hash

A row's `id` is the hash of its normalised prompt, so the same question has the same id wherever and however
often it comes, and rows of one id are either trained on or held out, never both. A prompt may have several
completions: all are trained on; of a held-out prompt the first is kept, because a model is asked it once. Which
prompts are held out depends on their ids and the seed, not on their order.
"""

import hashlib
import json
import logging
import re
import string
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .answers import marked_answer
from .columns import columns_line, find_columns, is_blank
from .messages import check_weights, is_chat, messages_of, tools_of_functions
from .sources import read_source
from .tables import without_nulls
from .tokens import THOUGHT_KEYS, encode, prompt_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..recipe.sections import DataConfig, SourceConfig

log = logging.getLogger("lorapar")
FURTHER = "further_completions_of_held_out"  # in the report of a source
# Names that we set, or that TRL's trainers read in a meaning of their own ("text" would even take the EOS
# token that belongs to the completion). A source's column of such a name is kept as "original_<name>".
TAKEN_COLUMNS = (
    *("id", "split", "source", "text", "conversations", "chosen", "rejected", "image", "images"),
    *("input_ids", "labels", "attention_mask", "completion_mask", "completion_ids", "assistant_masks"),
    # What a reward is given beside the row's columns.
    *("prompts", "completions", "trainer_state", "log_extra", "log_metric"),
)
# GSM8K writes its calculator's work into the answer: 48/2 = <<48/2=24>>24.
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
# A completion of up to this many characters on one line is taken as the final answer itself.
SHORT_ANSWER = 64
# Tokens that a chat template writes beside what the messages say, at most: its system prompt, how to call tools.
TEMPLATES_OWN = 2048
log = logging.getLogger("lorapar")


# One form


def _turns(
    raw: dict, columns: dict[str, str], config: "DataConfig", chat: bool, where: str
) -> tuple[list[dict], list[dict]]:
    """(the prompt's messages, the completion's messages) of one row, plain text as a user's and an
    assistant's."""
    names = [columns[ours] for ours in ("messages", "prompt", "completion") if ours in columns]
    names = names[:1] if "messages" in columns else names
    for name in names:
        if name not in raw:
            raise InputError(f"{where}: no column {name!r}, which other rows have; it has {', '.join(raw)}; give every "
                             "row the same columns")  # fmt: skip
        if is_blank(raw.get(name)):
            raise InputError(f"{where}: column {name!r} is empty")
    history = _history(raw, columns, where)
    chats = [name for name in names
             if "messages" in columns or isinstance(raw[name], dict | list) or is_chat(raw[name])]  # fmt: skip
    if (chats or history) and not chat:
        held = chats[0] if chats else columns["history"]
        if chats:
            messages_of(raw[held], f"{where}: column {held!r}")
        raise InputError(f"{where}: column {held!r} holds messages, which data.chat: false does not allow; for a "
                         "tokenizer without a chat template, model.chat_template gives one")  # fmt: skip
    if "messages" in columns:
        turns = messages_of(raw[names[0]], f"{where}: column {names[0]!r}")
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise InputError(f"{where}: column {names[0]!r} has no assistant's turn after a prompt")
        prompt, completion = turns[:last], [turns[last]]
    else:
        prompt, completion = (
            messages_of(raw[name], f"{where}: column {name!r}")
            if name in chats
            else [{"role": role, "content": str(raw[name])}]
            for name, role in zip(names, ("user", "assistant"))
        )
        if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            whole = "" if completion[0]["role"] not in ("user", "system") else (
                f"; if it is the whole chat, write {columns_line({'messages': names[1]})}")  # fmt: skip
            raise InputError(f"{where}: column {names[1]!r} must begin and end with the assistant's turn{whole}")
        beside = raw.get(columns.get("input", ""))
        # A template that names the column puts it where it belongs.
        if not is_blank(beside) and columns["input"] not in _template_fields(config.prompt, "prompt"):
            prompt[-1]["content"] += f"\n{beside}"
    prompt = [*history, *prompt]
    _check_said(prompt, completion, where)
    check_weights(prompt, completion, config.loss, where)
    system = raw.get(columns.get("system", ""))
    own = prompt[0]["content"] if prompt[0]["role"] == "system" else system
    if not is_blank(system) and own != system:
        raise InputError(f"{where}: column {columns['system']!r} and the chat's own system turn differ; leave one out")
    if not is_blank(system) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": str(system)}, *prompt]
    for turn in completion:
        if "####" in turn["content"]:
            turn["content"] = CALCULATOR_MARK.sub("", turn["content"])
    return prompt, completion


def _check_said(prompt: list[dict], completion: list[dict], where: str) -> None:
    """InputError for an empty turn of the user or the assistant. What a system turn or a tool says may be nothing."""
    for number, turn in enumerate(prompt, start=1):
        said = turn["content"].strip() or any(turn.get(key) for key in ("tool_calls", *THOUGHT_KEYS))
        if not said and (turn["role"] in ("user", "assistant") or len(prompt) == 1):
            raise InputError(f"{where}: message {number} of the prompt, of the role {turn['role']!r}, is empty; fill "
                             "it in, or leave the row out")  # fmt: skip
    if any(not turn["content"].strip() and not turn.get("tool_calls")
           for turn in completion if turn["role"] == "assistant"):  # fmt: skip
        raise InputError(f"{where}: the completion is empty")


def _history(raw: dict, columns: dict[str, str], where: str) -> list[dict]:
    """The turns before an instruction: messages, or pairs of what was asked and answered."""
    value: Any = raw.get(columns.get("history", ""))
    if is_blank(value):
        return []
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        if not all(isinstance(item, dict) for item in pairs) and not isinstance(value, str):
            raise InputError(f"{where}: column {columns['history']!r} is {value!r:.40}, expected pairs: "
                             "[[question, answer], ...]")  # fmt: skip
        return messages_of(value, f"{where}: column {columns['history']!r}")
    return [{"role": role, "content": "" if text is None else str(text)}
            for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # fmt: skip


def _template_fields(template: str, key: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"data.{key}: {template!r} is no template for str.format: {error}") from error


def _fill(template: str, key: str, values: dict[str, Any], where: str) -> str:
    for name in _template_fields(template, key):
        if name not in values:
            raise InputError(f"data.{key}: the template names {{{name}}}; {where} has {', '.join(values)}")
    return template.format(**values)


def _template_values(raw: dict[str, Any]) -> dict[str, Any]:
    """A row's columns and, beneath them, what reasoning-gym says of the row in `metadata` (`expression`, ...)."""
    described = json.loads(raw["metadata"]) if "task" in raw and isinstance(raw.get("metadata"), str) else {}
    return {**described, **raw}


def _apply_template(turns: list[dict], raw: dict, template: str, where: str) -> tuple[list[dict], str]:
    """(the turns with the template around the last of the user, the row's id).

    The id is of what the row's columns say, not of the template's own words: with another template around it
    a row keeps its id, and so its place in the split.
    """
    asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    values = _template_values(raw) | {"prompt": turns[asked]["content"]}
    filled = _fill(template, "prompt", values, where)
    others = [name for name in _template_fields(template, "prompt") if name != "prompt"]
    said = [turn["content"] for turn in turns] + [str(values[name]) for name in others]
    digest = hashlib.sha256(" ".join("\n".join(said).casefold().split()).encode()).hexdigest()
    formed = [dict(turn) for turn in turns]
    formed[asked]["content"] = filled
    return formed, digest[:16]


# A character that no tokenizer and no UTF-8 file takes: half of a pair that JSON writes with \\u, or NUL.
NO_CHARACTER = re.compile("[\\0\\ud800-\\udfff]")


def _check_text(value: Any, where: str) -> None:
    """InputError for a text, however deep in a column, with a character that cannot be written."""
    items = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _check_text(item, where)
    found = NO_CHARACTER.search(value) if isinstance(value, str) else None
    if found:
        what = "a NUL character" if found[0] == "\0" else f"half of a surrogate pair (U+{ord(found[0]):04X})"
        raise InputError(f"{where} has {what} at character {found.start()}; remove it")


def _final_answer(value: Any, completion: str, where: str) -> str:
    """The answer column's value, else what the completion marks as its answer, else a short completion, else
    ""."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, dict | list) and not is_blank(value):
        raise InputError(f"{where} is {value!r:.60}, expected one answer: a text or a number")
    if not is_blank(value):
        return marked_answer(str(value)) or str(value).strip()
    short = completion.strip()
    return marked_answer(completion) or (short if len(short) <= SHORT_ANSWER and "\n" not in short else "")


def _form_row(raw: dict, columns: dict[str, str], config: "DataConfig", chat: bool, where: str) -> dict[str, Any]:
    """One row of a source in our form: id, prompt, completion, answer, and the source's own columns."""
    for name, item in raw.items():
        _check_text(item, f"{where}: column {name!r}")
    turns, completion = _turns(raw, columns, config, chat, where)
    turns, row_id = _apply_template(turns, raw, config.prompt, where)
    if config.system_prompt is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system_prompt}, *turns]
    apart = "answer" in columns and columns["answer"] != columns.get("completion")
    last = completion[-1]["content"]
    given = raw.get(columns["answer"]) if apart else None
    answer = _final_answer(given, last, f"{where}: column {columns.get('answer')!r}")
    values = _template_values(raw) | {"prompt": turns[-1]["content"], "completion": last, "answer": answer}
    completion = [
        *completion[:-1],
        {**completion[-1], "content": _fill(config.completion, "completion", values, where)},
    ]
    row: dict[str, Any] = {
        "id": row_id,
        "prompt": turns if chat else "\n\n".join(turn["content"] for turn in turns),
        "completion": completion if chat else completion[-1]["content"],
        "answer": answer,
    }
    used = {"prompt", "completion", "answer", "messages", *(columns.get(ours) for ours in ("messages", "system"))}
    for name, item in raw.items():
        if name not in used:
            row[f"original_{name}" if name in TAKEN_COLUMNS else name] = item
    if "messages" in columns and is_blank(row.get("tools")) and (tools := tools_of_functions(raw.get("functions"))):
        row["tools"] = tools
    return row


# Split


def _choose_held_out(ids: list[str], share: int | float | bool, seed: int, source: str) -> set[str]:
    """The ids with the smallest hash of (seed, id), as many as `share` says: prompts, a fraction, or True for
    all."""
    if isinstance(share, int) and not isinstance(share, bool):
        if not 0 <= share <= len(ids):
            raise InputError(f"data.held_out: {share} rows of {source}, which has {len(ids)} distinct prompts")
        count = share
    else:
        if not 0 <= share <= 1:
            raise InputError(f"data.held_out: {share} for {source}; a share must lie in [0, 1]")
        count = max(1, round(share * len(ids))) if share > 0 and ids else 0
    return set(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:count])


def _distinct_names(sources: list["SourceConfig"]) -> list[str]:
    """Each source's name; the second of the same name is "<name> (2)"."""
    names = [source.name for source in sources]
    repeats = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, repeats)]


def _too_long(row: dict[str, Any], tokenizer: Any, limit: int | None, positions: int | None) -> str:
    """Why a row is left out for its tokens, and what would keep it; "" for one that is not."""
    if limit is not None and len(prompt_ids(row, tokenizer)) > limit:
        return f"their prompt is longer than data.max_prompt_length: {limit} tokens; raise it to keep them"
    # A token holds a byte at least, and no template adds so many: few rows need be counted.
    most = len(json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace")) + TEMPLATES_OWN
    if positions is not None and most > positions and len(encode(row, tokenizer)[0]) > positions:
        return f"longer with their completion than the model's positions: {positions} tokens (model.name)"
    return ""


def load_rows(
    config: "DataConfig", tokenizer: "PreTrainedTokenizerBase", positions: int | None = None
) -> tuple["Dataset", dict[str, dict[str, int]]]:
    """Every source's rows as one data set, and a report of what became of them.

    Columns: `id`, `prompt` and `completion` (str, or lists of messages), `answer` (str, "" where a row has
    none), `split` ("train" | "held_out"), `source`, and the sources' own. The report says for each source how
    many rows were `read`, left out as `duplicates` or as `too_long`, and put into `train` and `held_out`, and
    how many of these have `no_answer`; where there are any, also how many were left out as
    `further_completions_of_held_out`. A prompt that several sources hold belongs to the first of them that is
    held out as a whole, else to the first, which decides on which side all its rows are.
    """
    if not config.sources:
        raise InputError("data.sources: expected at least one source, got none")
    chat = config.chat if config.chat is not None else tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise InputError("data.chat: true, but the model's tokenizer has no chat template; allowed: false")

    names = _distinct_names(config.sources)
    shares = [config.held_out if source.held_out is None else source.held_out for source in config.sources]
    formed: dict[str, list[dict[str, Any]]] = {}
    for name, source in zip(names, config.sources):
        read = read_source(source)
        first = {column: where for where, raw in reversed(read) for column in raw}
        for column, where in first.items():
            _check_text(column, f"{where}: column {column!r}: its name")
        columns = find_columns([raw for _, raw in read], config, source.name)
        formed[name] = [_form_row(raw, columns, config, chat, where) for where, raw in read]
        if "messages" in columns:
            _say_what_follows([raw[columns["messages"]] for _, raw in read], name)

    report = {name: {"read": len(rows), "duplicates": 0, "too_long": 0} for name, rows in formed.items()}
    distinct: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    seen: set[tuple[str, str]] = set()
    owner: dict[str, str] = {}
    limit = config.max_prompt_length
    left_out: Counter[str] = Counter()
    for name, _ in sorted(zip(names, shares), key=lambda pair: pair[1] is not True):  # stable: else in given order
        for row in formed[name]:
            said = row["id"], json.dumps(row["completion"], sort_keys=True, default=str)
            if said in seen:
                report[name]["duplicates"] += 1
            elif why := _too_long(row, tokenizer, limit, positions):
                report[name]["too_long"] += 1
                left_out[why] += 1
            else:
                seen.add(said)
                owner.setdefault(row["id"], name)
                distinct[name].append(row)

    if not any(distinct.values()):
        why = f"data.max_prompt_length: {limit} tokens" if limit is not None else f"model.name: {positions} positions"
        raise InputError(f"{why} leave no row of {', '.join(names)}")
    for why, count in left_out.items():
        log.warning("data: %d of %d rows left out: %s", count, sum(map(len, formed.values())), why)
    held_out: set[str] = set()
    for name, share in zip(names, shares):
        own = [row_id for row_id, of in owner.items() if of == name]
        held_out |= _choose_held_out(own, share, config.seed, name)
    rows = [row for name in names for row in _divided(distinct[name], name, held_out, owner, report[name])]
    _say_what_repeats(rows, sum(counts.get(FURTHER, 0) for counts in report.values()))
    return to_dataset(rows), report


def _divided(
    rows: list[dict[str, Any]], name: str, held_out: set[str], owner: dict[str, str], counts: dict[str, int]
) -> list[dict[str, Any]]:
    """A source's rows with `split` and `source`, counted: of a prompt that is held out, the first row of its owner."""
    asked: set[str] = set()
    kept = []
    for row in rows:
        if row["id"] not in held_out:
            kept.append({**row, "split": "train", "source": name})
        elif owner[row["id"]] == name and row["id"] not in asked:
            asked.add(row["id"])
            kept.append({**row, "split": "held_out", "source": name})
    counts["train"], counts["held_out"] = len(kept) - len(asked), len(asked)
    counts["no_answer"] = sum(not row["answer"] for row in kept)
    if len(kept) < len(rows):
        counts[FURTHER] = len(rows) - len(kept)
    return kept


def _say_what_follows(chats: list[Any], name: str) -> None:
    """Say how many chats go on after the last answer."""
    go_on = sum(messages_of(chat, name)[-1]["role"] != "assistant" for chat in chats)
    if go_on:
        log.warning("data: %s: %d of %d chats go on after the assistant's last turn; that turn is the completion, and "
                    "what follows it is left out", name, go_on, len(chats))  # fmt: skip


def _say_what_repeats(rows: list[dict[str, Any]], further: int) -> None:
    """Say how many prompts have several completions, and how many of these disagree about the answer."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["id"], []).append(row["answer"])
    several = [given for given in answers.values() if len(given) > 1]
    if several:
        log.info("data: %d training prompts have several completions, %d rows in all: SFT trains on each, GRPO asks "
                 "each prompt once", len(several), sum(map(len, several)))  # fmt: skip
    if further:
        log.info("data: %d further completions of held-out prompts are left out: a model is asked each once", further)
    differ = sum(len(set(given)) > 1 for given in several)
    if differ:
        log.warning("data: the completions of %d prompts have different answers; GRPO's rewards go by the first row's",
                    differ)  # fmt: skip


def to_dataset(rows: list[dict[str, Any]]) -> "Dataset":
    """A data set with every row's columns; InputError that names the first column of two types.

    Columns that hold objects, or lists of several types, are kept as JSON text and read as they were: Arrow's own types
    would give each object the keys of all others, as nulls.
    """
    from datasets import Dataset, Features, Json, List

    columns = {name: [row.get(name) for row in rows] for name in {name: None for row in rows for name in row}}
    kept = {name: _as_json(values) for name, values in columns.items()}
    try:
        plain = Dataset.from_dict({name: values for name, values in columns.items() if not kept[name]})
        if not any(kept.values()):
            return plain
        forms = {"objects": Json(), "lists": List(Json())}
        features = {name: forms[kept[name]] if kept[name] else plain.features[name] for name in columns}
        texts = {name: [_json_text(value, kept[name]) for value in values] if kept[name] else values
                 for name, values in columns.items()}  # fmt: skip
        return Dataset.from_dict(texts, features=Features(features))
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow.ArrowInvalid is a ValueError
        for name, row in ((name, row) for name in columns for row in rows):
            if isinstance(row.get(name), int) and not -(2**63) <= row[name] < 2**63:
                raise InputError(f"{row['source']}: row {row['id']}: column {name!r} is {row[name]}, more than 64 bits "
                                 "hold; make it text") from None  # fmt: skip
        for name in columns:
            given = [row for row in rows if row.get(name) is not None]
            other = next((row for row in given if type(row[name]) is not type(given[0][name])), None)
            if other is not None:
                kinds = [
                    f"{type(row[name]).__name__} in {row['source']} (row {row['id']})" for row in (given[0], other)
                ]
                raise InputError(f"data.sources: column {name!r} is {' and '.join(kinds)}; give it one type") from None
        raise InputError(f"data.sources: the rows do not fit one table: {error}") from error


def _as_json(values: list[Any]) -> str:
    """How a column is kept as JSON text: "lists" of such, or "objects", which some rows may give as another type; ""
    where Arrow's own types serve."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {list}:
        inner = {type(item) for value in values for item in value or () if item is not None}
        return "lists" if inner & {dict, list} or len(inner) > 1 else ""
    return "objects" if kinds & {dict, list} else ""


def _json_text(value: Any, kept: str) -> Any:
    """A value, or each of a list, as JSON: of a text that is JSON itself, `datasets` would make what that says."""
    if value is None or kept == "objects":
        return None if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return [_json_text(item, "objects") for item in value]


# What a chat template is given of a row.
TOLD = ("prompt", "completion", "messages", "tools", "chat_template_kwargs")


def without_arrows_nulls(dataset: Any) -> Any:
    """A caller's data set without the nulls that Arrow puts into messages and tools; anything else is left as it is."""
    from datasets import Dataset, concatenate_datasets

    if not isinstance(dataset, Dataset) or not any(_has_fields(dataset.features.get(name)) for name in TOLD):
        return dataset
    there = [name for name in TOLD if name in dataset.column_names]
    told = to_dataset([without_nulls(row) for row in dataset.select_columns(there).to_list()])
    return concatenate_datasets([dataset.remove_columns(there), told], axis=1)


def _has_fields(feature: Any) -> bool:
    """Whether Arrow keeps a column's objects as structs, whose fields every object has."""
    return isinstance(feature, dict) or (feature is not None and _has_fields(getattr(feature, "feature", None)))
