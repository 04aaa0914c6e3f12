"""Data as people have it: the forms of rows that are read without settings, and what is refused, with what to do."""

import csv
import io
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from lorapar.data.columns import COMPLETIONS, INPUTS, OUR_COLUMNS, PROMPTS, SYSTEMS
from lorapar.data.labels import once_a_prompt, put_aside
from lorapar.data.messages import CALLS, ROLES
from lorapar.data.rows import load_rows
from lorapar.data.tables import COMPRESSIONS, FILE_FORMS
from lorapar.errors import InputError
from lorapar.files import read_jsonl
from lorapar.recipe.sections import DataConfig, SourceConfig
from tests.tiny import chat_tokenizer, tiny_model, tiny_tokenizer

from .driver import lorapar, recipe_values, records, refused, skipped, succeeds, write_recipe

CHAT, PLAIN = chat_tokenizer(), tiny_tokenizer()
LONG = "First this, then that. " * 4  # too long to be an answer by itself


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def said(speaker: str, value: object) -> dict:
    return {"from": speaker, "value": value}


def load(path: Path, *rows: dict, tokenizer=CHAT, **settings):
    path = path / "rows.jsonl" if path.is_dir() else path
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(DataConfig([SourceConfig(str(path))], **{"held_out": 0, **settings}), tokenizer)


def error_of(path: Path, *rows: dict, **settings) -> str:
    with pytest.raises(InputError) as caught:
        load(path, *rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


QUESTION, REPLY = turn("user", "2 + 2?"), turn("assistant", "4")
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}

# A row, and the messages of its prompt and its completion.
CHATS = {
    "sharegpt": ({"conversations": [said("human", "2 + 2?"), said("gpt", "4")]}, [QUESTION, REPLY]),
    "other names": ({"conversations": [said("user", "2 + 2?"), said("chatgpt", "4")]}, [QUESTION, REPLY]),
    "capitals": ({"conversations": [said("Human", "2 + 2?"), said("Assistant", "4")]}, [QUESTION, REPLY]),
    "bing": ({"conversation": [said("human", "2 + 2?"), said("bing", "4")]}, [QUESTION, REPLY]),
    "model": ({"conversations": [said("user", "2 + 2?"), said("model", "4")]}, [QUESTION, REPLY]),
    "system": (
        {"conversations": [said("system", "Be short."), said("human", "2 + 2?"), said("gpt", "4")]},
        [turn("system", "Be short."), QUESTION, REPLY],
    ),
    "system column": (
        {"conversations": [said("human", "2 + 2?"), said("gpt", "4")], "system": "You are a calculator."},
        [turn("system", "You are a calculator."), QUESTION, REPLY],
    ),
    "tools": (
        {"conversations": [said("human", "2 + 2?"), said("function_call", json.dumps(CALL)),
                           said("observation", "4"), said("gpt", "4")]},
        [QUESTION, CALLING, turn("tool", "4"), REPLY],
    ),
    "tool and its call last": (
        {"conversations": [said("human", "2 + 2?"), said("function_call", CALL)]}, [QUESTION, CALLING],
    ),
    "OpenAI's older call": (
        {"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": CALL},
                      {"role": "function", "name": "add", "content": "4"}, REPLY]},
        [QUESTION, CALLING, {**turn("tool", "4"), "name": "add"}, REPLY],
    ),
    "an older call as JSON text, last": (
        {"messages": [QUESTION, {"role": "assistant", "function_call": json.dumps(CALL)}]}, [QUESTION, CALLING],
    ),
    "an older call of no name and a call as JSON text": (
        {"messages": [{**QUESTION, "tool_calls": []}, {**CALLING, "tool_calls": json.dumps(CALLING["tool_calls"])},
                      turn("Function", "4"), {**REPLY, "function_call": {"name": None, "arguments": None}}]},
        [QUESTION, CALLING, turn("tool", "4"), REPLY],
    ),
    "role and content": ({"conversations": [QUESTION, REPLY]}, [QUESTION, REPLY]),
    "role and value": (
        {"conversations": [{"role": "user", "value": "2 + 2?"}, {"role": "assistant", "value": "4"}]},
        [QUESTION, REPLY],
    ),
    "from and value in messages": ({"messages": [said("human", "2 + 2?"), said("gpt", "4")]}, [QUESTION, REPLY]),
    "human and gpt as roles": ({"messages": [turn("human", "2 + 2?"), turn("gpt", "4")]}, [QUESTION, REPLY]),
    "json text": ({"messages": json.dumps([QUESTION, REPLY])}, [QUESTION, REPLY]),
    "json text of prompt and completion": (
        {"prompt": json.dumps([QUESTION]), "completion": json.dumps([REPLY])}, [QUESTION, REPLY],
    ),
    "a system turn and the same in a column": (
        {"messages": [turn("system", "Be brief."), QUESTION, REPLY], "system": "Be brief."},
        [turn("system", "Be brief."), QUESTION, REPLY],
    ),
    "blocks": (
        {"messages": [turn("user", [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]),
                      turn("assistant", [{"type": "text", "text": "4"}])]},
        [QUESTION, REPLY],
    ),
    "blocks of a response": (
        {"messages": [turn("user", [{"type": "input_text", "text": "2 + 2?"}]),
                      turn("assistant", [{"type": "output_text", "text": "4"}])]},
        [QUESTION, REPLY],
    ),
    "blocks in prompt and completion": (
        {"prompt": [turn("user", [{"type": "text", "text": "2 + 2?"}])], "completion": [REPLY]}, [QUESTION, REPLY],
    ),
    "prompt and messages": ({"prompt": "2 + 2?", "prompt_id": "x", "messages": [QUESTION, REPLY]}, [QUESTION, REPLY]),
    "problem, solution and messages": (
        {"problem": "2 + 2?", "solution": LONG, "messages": [QUESTION, REPLY]}, [QUESTION, REPLY],
    ),
    "history": (
        {"instruction": "And 3?", "input": "", "output": "6", "history": [["2 + 2?", "4"]]},
        [QUESTION, REPLY, turn("user", "And 3?"), turn("assistant", "6")],
    ),
    "a completion of one message": ({"prompt": [QUESTION], "completion": REPLY}, [QUESTION, REPLY]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
def test_chats(case: str, tmp_path: Path):
    row, turns = CHATS[case]
    loaded = load(tmp_path, row)[0][0]
    assert [*loaded["prompt"], *loaded["completion"]] == turns
    assert len(loaded["completion"]) == 1
    assert not {"messages", "conversations"} & set(loaded)


def test_weights_and_what_may_be_empty(tmp_path: Path):
    weighed = [{**QUESTION, "weight": 0}, {**REPLY, "weight": 0}, QUESTION, {**REPLY, "weight": 1.0}]
    loaded = load(tmp_path, {"messages": weighed})[0][0]
    assert [*loaded["prompt"], *loaded["completion"]] == [QUESTION, {**REPLY, "weight": 0}, QUESTION, REPLY]
    last = {"conversations": [*weighed[:3], {**said("gpt", "4"), "weight": False}]}
    assert "every turn of the assistant has the weight 0" in error_of(tmp_path, last, loss="assistant")
    last["conversations"][1] = REPLY
    assert load(tmp_path, last, loss="assistant")[0][0]["completion"] == [{**REPLY, "weight": 0}]
    turns = [turn("system", ""), QUESTION, CALLING, turn("tool", ""), REPLY]
    assert [*load(tmp_path, {"messages": turns})[0][0]["prompt"], REPLY] == turns


def test_older_functions_are_the_tools(tmp_path: Path):
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    chat = {"messages": [QUESTION, REPLY]}
    for given in ([function], json.dumps([function])):
        assert load(tmp_path, {**chat, "functions": given})[0][0]["tools"] == [
            {"type": "function", "function": function}
        ]
    tools = [{"type": "function", "function": {**function, "name": "own"}}]
    assert load(tmp_path, {**chat, "functions": [function], "tools": tools})[0][0]["tools"] == tools
    assert "tools" not in load(tmp_path, {**chat, "functions": "sums"})[0][0]


# A row, its prompt, completion and answer.
PAIRS = {
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "### Instruction: ..."},
        ("Add.\n2 and 2", "4", "4"),
    ),
    "alpaca without input": ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, ("Add 2 and 2.", "4", "4")),
    "instruction, response": ({"instruction": "Add 2 and 2.", "response": "4"}, ("Add 2 and 2.", "4", "4")),
    "dolly": (
        {"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "x"}, ("Add.\n2 and 2", "4", "4"),
    ),
    "capitals": ({"INSTRUCTION": "Add 2 and 2.", "RESPONSE": "4"}, ("Add 2 and 2.", "4", "4")),
    "Question, Answer": ({"Question": "2 + 2?", "Answer": "4"}, ("2 + 2?", "4", "4")),
    "query, response": ({"query": "2 + 2?", "response": "4", "original_question": "?"}, ("2 + 2?", "4", "4")),
    "prompt, response": ({"prompt": "2 + 2?", "response": "4"}, ("2 + 2?", "4", "4")),
    "question, response": ({"question": "2 + 2?", "response": "4"}, ("2 + 2?", "4", "4")),
    "problem, solution": (
        {"problem": "2 + 2?", "solution": LONG + r"\boxed{4}", "level": 1}, ("2 + 2?", LONG + r"\boxed{4}", "4"),
    ),
    "problem, solution, answer": (
        {"problem": "2 + 2?", "solution": LONG, "answer": "4"}, ("2 + 2?", LONG, "4"),
    ),
    "problem, answer": ({"problem": "2 + 2?", "answer": 4}, ("2 + 2?", "4", "4")),
    "input, output": ({"input": "2 + 2?", "output": "4"}, ("2 + 2?", "4", "4")),
    "inputs, targets": ({"inputs": "2 + 2?", "targets": "4"}, ("2 + 2?", "4", "4")),
    "prompt, generation": ({"prompt": "2 + 2?", "generation": "4"}, ("2 + 2?", "4", "4")),
    "user, assistant": ({"user": "2 + 2?", "assistant": "4"}, ("2 + 2?", "4", "4")),
    "prompt and question": ({"prompt": "2 + 2?", "question": "?", "completion": "4"}, ("2 + 2?", "4", "4")),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_of_columns(case: str, tmp_path: Path):
    row, expected = PAIRS[case]
    for tokenizer in (PLAIN, CHAT):
        loaded = load(tmp_path, row, tokenizer=tokenizer)[0][0]
        prompt, completion = loaded["prompt"], loaded["completion"]
        if tokenizer is CHAT:
            assert [len(prompt), prompt[0]["role"], completion[0]["role"]] == [1, "user", "assistant"]
            prompt, completion = prompt[0]["content"], completion[0]["content"]
        assert (prompt, completion, loaded["answer"]) == expected


def test_what_a_model_is_told_comes_from_a_column_of_sentences_alone(tmp_path: Path):
    row = {"system_prompt": "You are a calculator.", "question": "2 + 2?", "response": "4"}
    assert load(tmp_path, row)[0][0]["prompt"] == [turn("system", "You are a calculator."), QUESTION]
    for label in (1, "1", "System 2", "fast", "2.0"):
        loaded = load(tmp_path, {"system": label, "question": "2 + 2?", "answer": "4"})[0][0]
        assert (loaded["prompt"], loaded["system"]) == ([QUESTION], label)


def test_a_template_puts_the_input_where_it_names_it(tmp_path: Path):
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    loaded = load(tmp_path, row, tokenizer=PLAIN, prompt="{input}: {prompt}")[0][0]
    assert loaded["prompt"] == "2 and 2: Add."
    loaded = load(tmp_path, {"prompt": "Add.", "facts": "2 and 2", "completion": "4"}, columns={"input": "facts"})[0][0]
    assert loaded["prompt"] == [turn("user", "Add.\n2 and 2")]


# Rows, and the mapping that the error says to write.
TO_MAP = {
    "preferences": ([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}], {"completion": "chosen"}),
    "preferences of an instruction": (
        [{"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"}], {"completion": "chosen"},
    ),
    "preferences among chats": (
        [{"chosen": [QUESTION, REPLY], "rejected": [QUESTION, turn("assistant", "5")]}], {"messages": "chosen"},
    ),
    "preferences among answers": (
        [{"prompt": [QUESTION], "chosen": [REPLY], "rejected": [turn("assistant", "5")]}], {"completion": "chosen"},
    ),
    "prompt beside whole chats": (
        [{"prompt": "2 + 2?", "chosen": [QUESTION, REPLY], "rejected": [QUESTION, REPLY], "messages": [QUESTION]}],
        {"messages": "chosen"},
    ),
    "sharegpt preferences": (
        [{"conversations": [said("human", "2 + 2?")], "chosen": said("gpt", "4"), "rejected": said("gpt", "5")}],
        {"prompt": "conversations", "completion": "chosen"},
    ),
    "preferences of an unknown prompt": (
        [{"the question": "2 + 2?", "chosen": "4", "rejected": "5"}],
        {"prompt": "the question", "completion": "chosen"},
    ),
    "verdicts": (
        [{"prompt": "2 + 2?", "completion": "4", "label": True}, {"prompt": "3?", "completion": "5", "label": False}],
        {"prompt": "prompt", "completion": "completion"},
    ),
    "verdicts of a file of text": (
        [{"instruction": "2 + 2?", "input": "Now.", "output": "4", "kto_tag": "false"}],
        {"prompt": "instruction", "input": "input", "completion": "output"},
    ),
    "verdicts on chats": ([{"messages": [QUESTION, REPLY], "label": False}], {"messages": "messages"}),
    "another language": (
        [{"nummer": 1, "frage": "2 + 2?", "antwort": "4"}],
        {"prompt": "frage", "completion": "antwort"},
    ),
    "names with a colon": ([{"q: text": "2 + 2?", "a": LONG}], {"prompt": "q: text", "completion": "a"}),
    "two answers": (
        [{"instruction": "2 + 2?", "output": "4", "response": "four"}],
        {"prompt": "instruction", "completion": "response"},
    ),
    "two questions": (
        [{"query": "2 + 2?", "problem": "sum", "response": "4"}], {"prompt": "query", "completion": "response"},
    ),
    "a chat by another name": (
        [{"dialogue_turns": [said("human", "2 + 2?"), said("gpt", "4")]}],
        {"messages": "dialogue_turns"},
    ),
    "summaries": ([{"article": LONG, "summary": "4", "id": "x"}], {"prompt": "article", "completion": "summary"}),
    "word": ([{"message_1": "2 + 2?", "yes": "4"}], {"prompt": "message_1", "completion": "yes"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TO_MAP)
def test_the_line_that_an_error_says_to_write_works(case: str, tmp_path: Path):
    rows, mapping = TO_MAP[case]
    error = error_of(tmp_path, *rows)
    found = re.search(r"data\.columns: (\{.*?\})", error)
    assert found, error
    written = yaml.safe_load(found[1])
    assert written == mapping, error
    loaded = load(tmp_path, *rows, columns=written)[0][0]
    assert loaded["completion"][-1]["role"] == "assistant"
    assert loaded["prompt"][-1]["role"] == "user"


REFUSED = {
    "text alone": ({"text": "Q: 2 + 2? A: 4"}, "a text alone does not say where its prompt ends: split it into two"),
    "an answer that is an object": (
        {"question": "2 + 2?", "context": "Sums.", "answers": {"text": ["4"]}},
        "it has question, context, answers; a row needs a prompt and a completion",
    ),
    "prompts alone": ({"prompt": "2 + 2?"}, "a row needs a prompt and a completion, or messages"),
    "preferences in one text": (
        {"chosen": "Human: 2? Assistant: 4", "rejected": "Human: 2? Assistant: 5"},
        "pairs of a better and a worse answer (chosen, rejected), each with its prompt in one text",
    ),
    "role": (
        {"conversations": [said("human", "a"), said("narrator", "b"), said("gpt", "c")]},
        "row 1: column 'conversations' has a message of the role 'narrator'; known: user, human, assistant, gpt",
    ),
    "a role that is a call or a result": (
        {"conversations": [said("human", "a"), said("function", "b"), said("gpt", "c")]}, "the role 'function'",
    ),
    "an older call that is none": (
        {"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": "add 2"}]},
        "column 'messages' has a message with a function_call that is no JSON of {name, arguments}",
    ),
    "tool_calls that are none": (
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": ["add"]}]},
        "has a message with tool_calls that are no list of {name, arguments}",
    ),
    "a user's call": (
        {"messages": [{**QUESTION, "function_call": CALL}, REPLY]}, "has a call in a message of the role 'user'",
    ),
    "a call in both forms": (
        {"messages": [QUESTION, {**CALLING, "function_call": CALL}]}, "tool_calls and function_call; keep one of them",
    ),
    "a chat of nothing": ({"messages": []}, "row 1: column 'messages' is empty"),
    "a conversation of nothing": ({"conversations": [], "id": "x"}, "row 1: column 'conversations' is empty"),
    "a call that is none": (
        {"conversations": [said("human", "a"), said("function_call", "add 2"), said("gpt", "c")]},
        "the role 'function_call' that is no JSON of {name, arguments}",
    ),
    "no role": (
        {"messages": [{"speaker": "a", "content": "b"}]},
        "a message without a role; its keys: speaker, content",
    ),
    "image": (
        {"messages": [turn("user", [{"type": "image", "image": "x.png"}]), REPLY]},
        "row 1: column 'messages' has a message with a block of the type 'image', expected text alone",
    ),
    "audio": (
        {"messages": [turn("user", [{"type": "text", "text": "?"}, {"type": "input_audio", "data": "x"}]), REPLY]},
        "a block of the type 'input_audio'",
    ),
    "text for messages": ({"messages": "2 + 2? 4"}, "column 'messages' is text, expected a list of messages"),
    "a chat as Python prints it": ({"messages": str([QUESTION, REPLY])}, "or its JSON, as json.dumps writes it"),
    "a prompt as Python prints it": (
        {"prompt": str([QUESTION]), "completion": "4"}, "column 'prompt' is text, expected a list of messages",
    ),
    "two system turns": (
        {"messages": [turn("system", "Be brief."), QUESTION, REPLY], "system": "Be kind."},
        "column 'system' and the chat's own system turn differ; leave one out",
    ),
    **{f"a prompt of {empty!r}": (
        {"messages": [turn("user", empty), REPLY]}, "message 1 of the prompt, of the role 'user', is empty; fill it in",
    ) for empty in (None, "", [], " \n", [{"type": "text", "text": ""}])},
    "an empty system turn alone": ({"messages": [turn("system", ""), REPLY]}, "of the role 'system', is empty"),
    "an empty question later": (
        {"messages": [QUESTION, REPLY, turn("user", ""), REPLY]}, "message 3 of the prompt, of the role 'user'",
    ),
    "an empty answer before": (
        {"prompt": [QUESTION, turn("assistant", ""), QUESTION], "completion": [REPLY]},
        "message 2 of the prompt, of the role 'assistant', is empty",
    ),
    "an empty answer of the history": (
        {"instruction": "And 3?", "output": "6", "history": [["2 + 2?", None]]},
        "message 2 of the prompt, of the role 'assistant', is empty",
    ),
    "an empty end of a completion": (
        {"prompt": [QUESTION], "completion": [CALLING, turn("tool", "4"), turn("assistant", "")]},
        "the completion is empty",
    ),
    "a last answer of the weight 0": (
        {"messages": [QUESTION, REPLY, QUESTION, {**REPLY, "weight": 0}]},
        "the last answer has the weight 0, and data.loss: last trains on that alone; leave the row out",
    ),
    "a part of a weight": ({"messages": [QUESTION, {**REPLY, "weight": 0.5}]}, "the weight 0.5, allowed: 0"),
    "no answer": ({"conversations": [said("human", "a")]}, "has no assistant's turn after a prompt"),
    "whole chat as a completion": (
        {"prompt": "2 + 2?", "completion": [QUESTION, REPLY]}, "write data.columns: {messages: completion}",
    ),
    "an object for an answer": (
        {"question": "2 + 2?", "answer": {"value": "4"}},
        "a message without a role; its keys: value",
    ),
    "several answers": (
        {"question": "2 + 2?", "completion": "4", "answer": ["4", "four"]},
        "column 'answer' is ['4', 'four'], expected one",
    ),
    "NaN for an answer": ({"question": "q", "answer": float("nan")}, "row 1: column 'answer' is empty"),
    "surrogate": (
        {"question": "q\ud83d", "answer": "1"},
        "row 1: column 'question' has half of a surrogate pair (U+D83D)",
    ),
    "surrogate within": (
        {"messages": [QUESTION, turn("assistant", "a\udc00")]}, "row 1: column 'messages' has half of a surrogate pair",
    ),
    "surrogate in a key": (
        {"question": "q", "answer": "1", "of": {"\ud83d": 1}},
        "row 1: column 'of' has half of a surrogate pair",
    ),
    "surrogate in another column": (
        {"question": "q", "answer": "1", "of": {"a": ["\ud83d"]}},
        "column 'of' has half of",
    ),
    "a list of prompts": ({"prompt": ["a", "b"], "completion": "c"}, "'prompt' is a list of texts, expected one"),
    "a list of answers": ({"input": "a", "output": ["b", "c"]}, "'output' is a list of texts, expected one"),
    "a list that is no chat": ({"prompt": ["a", 1], "completion": "c"}, "column 'prompt' is not a list of messages"),
    "a history that is no pairs": (
        {"instruction": "And 3?", "output": "6", "history": [["a"]]},
        "column 'history' is [['a']], expected pairs: [[question, answer], ...]",
    ),
    "surrogate in a column's name": (
        {"question": "q", "answer": "1", "a\ud83d": 1},
        "row 1: column 'a\\ud83d': its name has half of a surrogate pair (U+D83D) at character 1; remove it",
    ),
    "a number of more than 64 bits": (
        {"prompt": "a", "completion": "c", "n": 10**30},
        "column 'n' is 1000000000000000000000000000000, more than 64 bits hold; make it text",
    ),
    "NUL": ({"question": "q", "answer": "1\0"}, "row 1: column 'answer' has a NUL character at character 1; remove it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused_in_one_line(case: str, tmp_path: Path):
    row, says = REFUSED[case]
    for tokenizer in (CHAT, PLAIN) if "messages" not in row and "conversations" not in row else (CHAT,):
        error = error_of(tmp_path, row, tokenizer=tokenizer)
        assert says in error or (tokenizer is PLAIN and "which data.chat: false does not allow" in error)
        assert "rows.jsonl" in error


@pytest.mark.parametrize("mapped", [
    {"prompt": "prompt", "completion": "prompt"}, {"completion": "prompt"}, {"prompt": "completion"},
    {"prompt": "prompt", "input": "prompt"}, {"prompt": "prompt", "answer": "prompt"},
])  # fmt: skip
def test_one_column_is_not_two_of_ours(mapped: dict, tmp_path: Path):
    error = error_of(tmp_path, {"prompt": "2 + 2?", "completion": "4"}, columns=mapped)
    assert re.match(r"data.columns: \w+ and \w+ are both column '\w+'; name one for each$", error)


def test_a_completion_may_be_its_own_answer_and_a_prompt_may_be_called_so(tmp_path: Path):
    both = {"completion": "completion", "answer": "completion"}
    assert load(tmp_path, {"prompt": "2 + 2?", "completion": "4"}, columns=both)[0][0]["answer"] == "4"
    asked = load(
        tmp_path, {"answer": "4", "question": "2 + 2?"}, columns={"prompt": "answer", "completion": "question"}
    )
    assert (asked[0][0]["prompt"][0]["content"], asked[0][0]["answer"]) == ("4", "2 + 2?")


def test_a_row_of_other_columns_is_named_with_them(tmp_path: Path):
    error = error_of(
        tmp_path, {"messages": [QUESTION, REPLY]}, {"conversations": [said("human", "a"), said("gpt", "b")]}
    )
    assert error.endswith("row 2: no column 'messages', which other rows have; it has conversations; give every "
                          "row the same columns")  # fmt: skip


@pytest.mark.parametrize("first", ["What is 2 + 2?,4", "2 + 2 =,four", f"Add them,{'long ' * 20}"])
def test_a_table_without_a_header_is_named(first: str, tmp_path: Path):
    (tmp_path / "rows.csv").write_text(f"{first}\n3 + 3?,6\n")
    with pytest.raises(InputError, match="rows.csv seems to have no header: its first line is .*; put a line with the"):
        load_rows(DataConfig([SourceConfig(str(tmp_path / "rows.csv"))], held_out=0), PLAIN)


def test_a_pair_of_surrogates_and_one_answer_in_a_list_are_read(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"question": "\\ud83e\\udd16?", "solution": "long", "answer": ["4"]}\n')
    config = DataConfig([SourceConfig(str(tmp_path / "rows.jsonl"))], held_out=0, columns={"completion": "solution"})
    loaded = load_rows(config, PLAIN)[0][0]
    assert (loaded["prompt"], loaded["answer"]) == ("🤖?", "4")


def test_messages_need_a_chat_template(tmp_path: Path):
    for row in (CHATS["sharegpt"][0], CHATS["history"][0], {"prompt": "2 + 2?", "completion": [REPLY]}):
        error = error_of(tmp_path, row, tokenizer=PLAIN)
        assert "holds messages, which data.chat: false does not allow" in error
        assert "model.chat_template gives one" in error


@pytest.fixture
def said_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lorapar"), "propagate", True)
    caplog.set_level(logging.INFO, "lorapar")
    return caplog


def test_what_follows_the_last_answer_is_left_out_and_said(tmp_path: Path, said_in_the_log):
    row = {"conversations": [said("human", "2 + 2?"), said("gpt", "4"), said("human", "Thanks!")]}
    loaded = load(tmp_path, row, CHATS["sharegpt"][0] | {"id": 2})[0][0]
    assert [*loaded["prompt"], *loaded["completion"]] == [QUESTION, REPLY]
    assert "1 of 2 chats go on after the assistant's last turn" in said_in_the_log.text


def test_columns_that_a_question_may_need_are_named(tmp_path: Path, said_in_the_log):
    load(tmp_path, {"question": "Who?", "context": "Anna ran.", "answer": "Anna", "solution": LONG})
    assert "column 'context' is not part of the prompt" in said_in_the_log.text
    assert "'solution' is not used; data.columns: {completion: solution} trains on that" in said_in_the_log.text
    said_in_the_log.clear()
    load(tmp_path, {"question": "Who?", "context": "Anna ran.", "answer": "Anna"}, prompt="{context} {prompt}")
    assert not said_in_the_log.text


# Several completions of one prompt


def ways(prompts: int, each: int) -> list[dict]:
    return [{"question": f"q{i // each}", "answer": f"way {i} to 7"} for i in range(prompts * each)]


def test_several_completions_of_a_prompt_are_kept_on_one_side(tmp_path: Path, said_in_the_log):
    rows = ways(20, 5)
    loaded, report = load(tmp_path, *rows, *rows[:3], tokenizer=PLAIN, held_out=4)
    counts = dict(read=103, duplicates=3, too_long=0, train=80, held_out=4, no_answer=0)
    assert report[str(tmp_path / "rows.jsonl")] == counts | {"further_completions_of_held_out": 16}
    sides = {(row["id"], row["split"]) for row in loaded}
    assert len(sides) == len({row["id"] for row in loaded}) == 20
    assert loaded.filter(lambda row: row["split"] == "held_out", keep_in_memory=True).num_rows == 4
    # Of a held-out prompt it is the first, wherever the others are.
    held = [row for row in loaded if row["split"] == "held_out"]
    assert all(row["completion"] == f"way {5 * int(row['prompt'][1:])} to 7" for row in held)
    assert "16 training prompts have several completions, 80 rows in all" in said_in_the_log.text
    assert "16 further completions of held-out prompts are left out: a model is asked each once" in said_in_the_log.text
    assert "the completions of 16 prompts have different answers" in said_in_the_log.text


def test_a_share_is_of_the_prompts_and_the_split_does_not_depend_on_how_many_rows_they_have(tmp_path: Path):
    def held_out(rows: list[dict]) -> set[str]:
        loaded, _ = load(tmp_path, *rows, tokenizer=PLAIN, held_out=0.25)
        return {row["prompt"] for row in loaded if row["split"] == "held_out"}

    assert len(held_out(ways(20, 5))) == 5
    assert held_out(ways(20, 5)) == held_out(ways(20, 5)[::-1]) == held_out(ways(20, 1))


def test_a_prompt_of_several_sources_is_on_one_side(tmp_path: Path):
    for name, rows in (("a", ways(8, 2)), ("b", ways(10, 3)), ("test", ways(2, 1))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, "of": name}) + "\n" for row in rows))
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    sources.append(SourceConfig(str(tmp_path / "test.jsonl"), held_out=True))
    loaded, report = load_rows(DataConfig(sources, held_out=0.25), PLAIN)
    sides = {(row["id"], row["split"]) for row in loaded}
    assert len(sides) == len({row["id"] for row in loaded}) == 10
    assert {row["of"] for row in loaded if row["prompt"] in ("q0", "q1")} == {"test"}
    of_test = report[str(tmp_path / "test.jsonl")]
    assert (of_test["held_out"], of_test["train"]) == (2, 0)
    # Of the six prompts that test leaves to a, two; of the two that a leaves to b, one at least.
    assert [report[source.name]["held_out"] for source in sources] == [2, 1, 2]
    kept = sum(counts["train"] + counts["held_out"] for counts in report.values())
    left = sum(c["duplicates"] + c.get("further_completions_of_held_out", 0) for c in report.values())
    assert (kept, kept + left) == (len(loaded), 16 + 30 + 2)


# Runs


def test_a_token_beyond_the_embedding_is_refused_by_label(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<other>"])
    tiny_model(vocabulary=259).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1), "kind": 1 + i % 2} for i in range(12)]
    values = {**recipe_values(tmp_path / "model"), "label": {"column": "kind"}}
    beyond = "the token '<other>' (259) is none of the model's 259"
    for i, (text, says) in enumerate((("<new>", None), ("<other>", beyond))):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "prompt": f"{text} 1 + 1 ="}]))
        values["data"] = {"sources": [str(path)], "held_out": 2}
        command = "label", write_recipe(tmp_path / f"{i}.yaml", values), "--output_dir", tmp_path / f"run{i}"
        if says is None:
            succeeds(*command)
        else:
            refused(*command, says=(f"{i}.jsonl: row ", says))


def test_a_run_on_several_completions_asks_each_prompt_once(tiny_folder: Path, tmp_path: Path, no_pictures):
    kinds = [1, 2] * 8
    rows = [{"conversations": [said("human", f"q{i} ="), said("gpt", f"way {way}: {i}")], "kind": kinds[i]}
            for i in range(16) for way in range(3)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe_values(tiny_folder)
    values["model"]["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    values |= {"label": {"column": "kind"}, "data": {"sources": [str(tmp_path / "*.jsonl")], "held_out": 4}}
    for stage in ("sft", "grpo"):
        values[stage] |= {"max_steps": 1, "save_steps": 1}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    log = succeeds("run", recipe, "--output_dir", tmp_path / "run")
    assert "48 read, 0 duplicates, 0 too_long, 36 train, 4 held_out, 0 no_answer, 8 further_completions" in log
    labelled = read_jsonl(tmp_path / "run" / "labels.jsonl")
    of_grpo = {row["id"] for row in labelled if row["split"] == "train" and row["system"] == 2}
    assert f"grpo: {len(of_grpo)} prompts, reference" in log
    assert f"grpo: {2 * len(of_grpo)} further completions of these prompts are not used" in log
    assert records(tmp_path / "run")["sft"]["rows"] == 3 * (12 - len(of_grpo))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n"]["all"] == 4
    plan = lorapar("plan", recipe)[1]
    assert re.search(rf"grpo +{len(of_grpo)} ", plan), plan
    # A file that is added to the pattern changes what is read.
    assert skipped(succeeds("label", recipe, "--output_dir", tmp_path / "run")) == ["label"]
    (tmp_path / "more.jsonl").write_text(json.dumps({**rows[0], "kind": 2}) + "\n")
    assert skipped(succeeds("label", recipe, "--output_dir", tmp_path / "run")) == []


def test_a_prompt_of_both_systems_is_put_aside_whole():
    rows = [{"id": f"{i // 2}", "prompt": "p", "completion": f"{i}", "system": 1 + i % 2, "split": "train"}
            for i in range(8)]  # fmt: skip
    rest, aside = put_aside(Dataset.from_list(rows), [1], 2)
    assert (len(rest), len(aside), set(aside["system"])) == (4, 2, {1})
    assert not set(rest["id"]) & set(aside["id"])
    assert once_a_prompt(rest)["completion"] == [rest[0]["completion"], rest[2]["completion"]]
    assert once_a_prompt(rest.remove_columns("id")).num_rows == 4


def test_a_review_lists_a_prompt_once(tiny_folder: Path, tmp_path: Path):
    works = ["1 + 1 = 2", "1 + 1 = 2. 2 + 0 = 2. Then 2 + 0 = 2", "2"]
    rows = [{"prompt": f"q{i}: 1 + 1 + 1", "completion": f"{work}\n#### {i}"} for i in range(12) for work in works]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    voters = [{"name": "operations", "threshold": 0}, {"name": "steps", "threshold": 1}]
    values = {**recipe_values(tiny_folder), "label": {"voters": voters}}
    values["data"] = {"sources": [str(tmp_path / "rows.jsonl")], "held_out": 2}
    command = "label", write_recipe(tmp_path / "r.yaml", values), "--output_dir", tmp_path / "run"
    succeeds(*command)
    succeeds(*command, "--review")
    path = tmp_path / "run" / "review.csv"
    review = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    assert len({row["id"] for row in review}) == len(review) > 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, review[0])
        writer.writeheader()
        writer.writerows({**row, "corrected": "1"} for row in review[:6])
    succeeds(*command)
    labelled = read_jsonl(tmp_path / "run" / "labels.jsonl")
    corrected = {row["id"] for row in review[:6]}
    assert {row["system"] for row in labelled if row["id"] in corrected} == {1}


# The page

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = r"```\w+ (\S+)\n((?:(?!```).)*)\n```\n\n{}\n\n```\w+\n(.*?)\n```"
READ = re.findall(BLOCK.format("reads as"), PAGE, re.DOTALL)
REFUSED_THERE = re.findall(BLOCK.format("is refused"), PAGE, re.DOTALL)


def written(name: str, text: str, folder: Path, monkeypatch) -> DataConfig:
    """The source of one of the page's examples, with the columns that the text before it maps."""
    (folder / name).write_text(text + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    mapped = re.search(rf"With `data\.columns: (\{{[^`]*\}})`\n\n```\w+ {re.escape(name)}\n", PAGE)
    return DataConfig([SourceConfig(name)], columns=yaml.safe_load(mapped[1]) if mapped else {}, held_out=0)


@pytest.mark.parametrize(("name", "text", "reads"), READ, ids=[name for name, *_ in READ])
def test_the_page_s_examples_read_as_it_says(name: str, text: str, reads: str, tmp_path: Path, monkeypatch):
    expected = yaml.safe_load(reads)
    config = written(name, text, tmp_path, monkeypatch)
    row = load_rows(config, PLAIN if isinstance(expected["prompt"], str) else CHAT)[0][0]
    assert {key: row[key] for key in ("prompt", "completion", "answer")} == expected
    if isinstance(expected["prompt"], str):
        chat = load_rows(config, CHAT)[0][0]
        assert chat["prompt"] == [turn("user", expected["prompt"])]
        assert chat["completion"] == [turn("assistant", expected["completion"])]


@pytest.mark.parametrize(("name", "text", "says"), REFUSED_THERE, ids=[name for name, *_ in REFUSED_THERE])
def test_what_the_page_says_is_refused_is_refused_so(name: str, text: str, says: str, tmp_path: Path, monkeypatch):
    with pytest.raises(InputError) as caught:
        load_rows(written(name, text, tmp_path, monkeypatch), CHAT)
    assert str(caught.value) == says


def test_every_example_of_the_page_is_tried_and_every_form_is_named_there():
    assert len(READ) + len(REFUSED_THERE) == len(re.findall(r"^```\w+ \S+$", PAGE, re.MULTILINE)) >= 14
    names = {*FILE_FORMS, *COMPRESSIONS, *PROMPTS, *COMPLETIONS, *OUR_COLUMNS, *INPUTS, *SYSTEMS, "conversations"}
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE and name not in PAGE] == []
    assert [name for name in ("function", *CALLS, *ROLES) if f"`{name}`" not in PAGE] == []
