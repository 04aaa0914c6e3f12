"""Rows of every source in one form, split by what the prompt says.

    read → columns to prompt, completion, answer → duplicates out → too long out → held out by content hash

A row's `id` is the hash of its normalised prompt, so the same question is the same row wherever and however
often it comes: it is kept once, and it is either trained on or held out, never both. Which rows are held out
depends on their ids and the seed, not on their order.
"""

import hashlib
import json
import re
import string
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .answers import marked_answer
from .sources import read_source, without_nulls
from .tokens import prompt_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..recipe.sections import DataConfig, SourceConfig

OUR_COLUMNS = ("prompt", "completion", "answer", "system", "messages")
# Names that we set, or that TRL's trainers read in a meaning of their own ("text" would even take the EOS
# token that belongs to the completion). A source's column of such a name is kept as "original_<name>".
TAKEN_COLUMNS = (
    *("id", "split", "source", "text", "conversations", "chosen", "rejected", "image", "images"),
    *("input_ids", "labels", "attention_mask", "completion_mask", "completion_ids", "assistant_masks"),
)
# GSM8K writes its calculator's work into the answer: 48/2 = <<48/2=24>>24.
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
# A completion of up to this many characters on one line is taken as the final answer itself.
SHORT_ANSWER = 64


# One form


def _find_columns(rows: list[dict[str, Any]], config: "DataConfig", source: "SourceConfig") -> dict[str, str]:
    """Our column → the source's column: as mapped, else by TRL's names, else question and answer."""
    if source.name.startswith("reasoning_gym:"):
        return {"prompt": "question", "completion": "completion", "answer": "answer"}
    there = list({name: None for row in rows for name in row})
    listed = ", ".join(there)
    for ours, theirs in config.columns.items():
        if ours not in OUR_COLUMNS:
            raise InputError(f"data.columns: unknown key {ours!r}; allowed: {', '.join(OUR_COLUMNS)}")
        if theirs not in there:
            raise InputError(f"data.columns.{ours}: {source.name} has no column {theirs!r}; it has {listed}")
    columns = dict(config.columns)
    if "prompt" not in columns and "messages" not in columns:
        name = next((name for name in ("prompt", "question", "messages") if name in there), None)
        if name is None:
            raise InputError(
                f"data.columns.prompt: {source.name} has no column prompt, question or messages; map one of {listed}"
            )
        columns["messages" if name == "messages" else "prompt"] = name
    if "answer" not in columns and "answer" in there:
        columns["answer"] = "answer"
    if "completion" not in columns and "prompt" in columns:
        name = "completion" if "completion" in there else columns.get("answer")
        if name is None:
            raise InputError(
                f"data.columns.completion: {source.name} has no column completion or answer; map one of {listed}"
            )
        columns["completion"] = name
    return columns


def _is_blank(value: Any) -> bool:
    """True for None, NaN (a columnar file's None), an empty list, and text without a visible character."""
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A checked list of messages, without the empty keys that a columnar file adds to each."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{where} is not a list of messages ({{role, content}})")
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    for message in messages:
        if "role" not in message:
            raise InputError(f"{where} has a message without a role")
        content = message.setdefault("content", "")
        if not isinstance(content, str):
            raise InputError(f"{where} has a message whose content is no text but a {type(content).__name__}")
    return messages


def _turns(raw: dict, columns: dict[str, str], chat: bool, where: str) -> tuple[list[dict], list[dict]]:
    """(the prompt's messages, the completion's messages) of one row, plain text as a user's and an
    assistant's."""
    names = [columns[ours] for ours in ("messages", "prompt", "completion") if ours in columns]
    for name in names if "messages" not in columns else names[:1]:
        if _is_blank(raw.get(name)):
            raise InputError(f"{where}: column {name!r} is empty")
    if isinstance(raw[names[0]], list) and not chat:
        raise InputError(f"{where}: column {names[0]!r} holds messages, which data.chat: false does not allow")
    if "messages" in columns:
        turns = _messages(raw[names[0]], f"{where}: column {names[0]!r}")
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise InputError(f"{where}: column {names[0]!r} has no assistant's turn after a prompt")
        prompt, completion = turns[:last], [turns[last]]
    else:
        prompt, completion = (
            _messages(raw[name], f"{where}: column {name!r}")
            if isinstance(raw[name], list)
            else [{"role": role, "content": str(raw[name])}]
            for name, role in zip(names, ("user", "assistant"))
        )
    system = raw.get(columns.get("system", ""))
    if not _is_blank(system):
        prompt = [{"role": "system", "content": str(system)}, *prompt]
    for turn in completion:
        if "####" in turn["content"]:
            turn["content"] = CALCULATOR_MARK.sub("", turn["content"])
    if not any(turn["content"].strip() or "tool_calls" in turn for turn in completion):
        raise InputError(f"{where}: the completion is empty")
    return prompt, completion


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


def _final_answer(value: Any, completion: str) -> str:
    """The answer column's value, else what the completion marks as its answer, else a short completion, else
    ""."""
    if not _is_blank(value):
        return marked_answer(str(value)) or str(value).strip()
    short = completion.strip()
    return marked_answer(completion) or (short if len(short) <= SHORT_ANSWER and "\n" not in short else "")


def _form_row(raw: dict, columns: dict[str, str], config: "DataConfig", chat: bool, where: str) -> dict[str, Any]:
    """One row of a source in our form: id, prompt, completion, answer, and the source's own columns."""
    turns, completion = _turns(raw, columns, chat, where)
    turns, row_id = _apply_template(turns, raw, config.prompt, where)
    if config.system_prompt is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system_prompt}, *turns]
    apart = "answer" in columns and columns["answer"] != columns.get("completion")
    last = completion[-1]["content"]
    answer = _final_answer(raw.get(columns["answer"]) if apart else None, last)
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
    used = {"prompt", "completion", "answer", "messages", columns.get("messages"), columns.get("system")}
    for name, item in raw.items():
        if name not in used:
            row[f"original_{name}" if name in TAKEN_COLUMNS else name] = item
    return row


# Split


def _choose_held_out(ids: list[str], share: int | float | bool, seed: int, source: str) -> set[str]:
    """The ids with the smallest hash of (seed, id), as many as `share` says: rows, a fraction, or True for
    all."""
    if isinstance(share, int) and not isinstance(share, bool):
        if not 0 <= share <= len(ids):
            raise InputError(f"data.held_out: {share} rows of {source}, which has {len(ids)} distinct ones")
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


def load_rows(
    config: "DataConfig", tokenizer: "PreTrainedTokenizerBase"
) -> tuple["Dataset", dict[str, dict[str, int]]]:
    """Every source's rows as one data set, and a report of what became of them.

    Columns: `id`, `prompt` and `completion` (str, or lists of messages), `answer` (str, "" where a row has
    none), `split` ("train" | "held_out"), `source`, and the sources' own. The report says for each source how
    many rows were `read`, left out as `duplicates` or as `too_long`, and put into `train` and `held_out`, and
    how many of these have `no_answer`. A question that several sources hold belongs to the first of them that
    is held out as a whole, else to the first.
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
        raws = read_source(source)
        columns = _find_columns(raws, config, source)
        formed[name] = [_form_row(raw, columns, config, chat, f"{name}: row {i}") for i, raw in enumerate(raws, 1)]

    report = {name: {"read": len(rows), "duplicates": 0, "too_long": 0} for name, rows in formed.items()}
    distinct: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    seen: set[str] = set()
    limit = config.max_prompt_length
    for name, _ in sorted(zip(names, shares), key=lambda pair: pair[1] is not True):  # stable: else in given order
        for row in formed[name]:
            if row["id"] in seen:
                report[name]["duplicates"] += 1
            elif limit is not None and len(prompt_ids(row, tokenizer)) > limit:
                report[name]["too_long"] += 1
            else:
                seen.add(row["id"])
                distinct[name].append(row)

    if not any(distinct.values()):
        raise InputError(f"data.max_prompt_length: {limit} tokens leave no row of {', '.join(names)}")
    rows = []
    for name, share in zip(names, shares):
        held_out = _choose_held_out([row["id"] for row in distinct[name]], share, config.seed, name)
        report[name]["train"] = len(distinct[name]) - len(held_out)
        report[name]["held_out"] = len(held_out)
        report[name]["no_answer"] = sum(not row["answer"] for row in distinct[name])
        for row in distinct[name]:
            rows.append({**row, "split": "held_out" if row["id"] in held_out else "train", "source": name})
    return to_dataset(rows), report


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
