"""A chat as a list of messages {role, content}, whatever names a data set gives to roles and keys.

    {from: human, value: ...}      →  {role: user, content: ...}
    {from: gpt, value: ...}        →  {role: assistant, content: ...}
    {content: [{type: text, ...}]} →  {content: the texts, joined as chat templates write them}

What is not certain is refused by its name, because a role taken for another trains the model on the wrong words.
"""

import json
import re
from typing import Any

from ..errors import InputError

# The columns that hold chats.
CHATS = ("messages", "conversations", "conversation")
# Who speaks, by the names that data sets use. The last three are roles of some chat templates.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "tool_result"), "tool"),
    **{role: role for role in ("developer", "ipython", "environment")},
}
# What a tool is called with, as JSON text.
CALLS = ("function_call", "tool_call")
SPEAKER_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
TEXT_OF_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
TEXT_BLOCKS = ("text", "input_text", "output_text")


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A chat's messages, without the empty keys that a columnar file adds to each; InputError, at `where`, for others.

    value: a list of messages, one message, or the JSON text of these.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{where} is text, expected a list of messages ({{role, content}}) or its JSON"
                             + (", as json.dumps writes it" if is_chat(value) else "")) from None  # fmt: skip
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and value and all(isinstance(message, str) for message in value):
        raise InputError(f"{where} is a list of texts, expected one text a row (or messages: {{role, content}}); write "
                         "a row for each")  # fmt: skip
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{where} is not a list of messages ({{role, content}})")
    return [_message(message, where) for message in value]


def check_weights(prompt: list[dict[str, Any]], completion: list[dict[str, Any]], loss: str, where: str) -> None:
    """InputError where the weight 0 takes the loss from the answer that is trained on, or from all of them.

    loss: `data.loss`. The last answer's weight is the row's own with "last"; with "assistant", each turn has its own.
    """
    if loss == "last" and any(turn.get("weight") == 0 for turn in completion):
        raise InputError(f"{where}: the last answer has the weight 0, and data.loss: last trains on that alone; leave "
                         "the row out, or train on its other turns with data.loss: assistant")  # fmt: skip
    answers = [turn for turn in (*prompt, *completion) if turn.get("role") == "assistant"]
    if all(turn.get("weight") == 0 for turn in answers):
        raise InputError(f"{where}: every turn of the assistant has the weight 0, so there is nothing to train on; "
                         "leave the row out")  # fmt: skip


def tools_of_functions(value: Any) -> list[dict[str, Any]]:
    """The tools that a chat's column `functions`, OpenAI's older name, describes; [] for a column of anything else."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    if not isinstance(given, list) or not all(
        isinstance(item, dict) and {"name", "parameters"} <= set(item) for item in given
    ):
        return []
    return [{"type": "function", "function": item} for item in given]


def is_chat(value: Any) -> bool:
    """Whether a value is messages: objects that say who speaks, or the text of such, as JSON or as Python prints it."""
    if isinstance(value, str):
        if not TEXT_OF_CHAT.match(value):
            return False
        try:
            value = json.loads(value)
        except ValueError:
            return True
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and any(key in item for key in SPEAKER_KEYS) for item in value)


def _message(given: dict[str, Any], where: str) -> dict[str, Any]:
    message = {key: item for key, item in given.items() if item is not None}
    speaker = next((key for key in SPEAKER_KEYS if key in message), None)
    if speaker is None:
        raise InputError(f"{where} has a message without a role; its keys: {', '.join(map(str, message))}")
    said = str(message.pop(speaker))
    text = next((message.pop(key) for key in TEXT_KEYS if key in message), "")
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise InputError(f"{where} has a message of the weight {weight!r:.40}, allowed: 0, no loss, and 1")
    if weight == 0 and (said.casefold() in CALLS or ROLES.get(said.casefold()) == "assistant"):
        message["weight"] = 0
    if said.casefold() in CALLS:
        called = f"a message of the role {said!r}"
        return {**message, "role": "assistant", "content": "", "tool_calls": _calls(text, called, where)}
    # OpenAI's older role of a tool's result; as a speaker it is a call in some data sets and a result in others.
    role = "tool" if (speaker, said.casefold()) == ("role", "function") else ROLES.get(said.casefold())
    if role is None:
        known = ", ".join((*ROLES, *CALLS))
        raise InputError(f"{where} has a message of the role {said!r}; known: {known}; rename it in the data")
    calls = _tool_calls(message, role, where)
    return {"role": role, "content": _content(text, where), **message, **({"tool_calls": calls} if calls else {})}


def _tool_calls(message: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """A message's calls, taken out of it: those of `tool_calls`, or the one of `function_call`, OpenAI's older key."""
    given, older = message.pop("tool_calls", None), message.pop("function_call", None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise InputError(f"{where} has a message with tool_calls that are no JSON") from None
    if isinstance(older, dict):
        older = {key: item for key, item in older.items() if item is not None}
    if given and older:
        raise InputError(f"{where} has a message with tool_calls and function_call; keep one of them")
    if (given or older) and role != "assistant":
        raise InputError(f"{where} has a call in a message of the role {role!r}, expected in the assistant's alone")
    if older:
        return _calls(older, "a message with a function_call", where)
    calls = [given] if isinstance(given, dict) else given or []
    if not isinstance(calls, list) or not all(isinstance(c, dict) and "name" in _function(c) for c in calls):
        raise InputError(f"{where} has a message with tool_calls that are no list of {{name, arguments}} or "
                         "{type: function, function: {name, arguments}}")  # fmt: skip
    return calls


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return call["function"] if isinstance(call.get("function"), dict) else call


def _content(given: Any, where: str) -> str:
    """A message's text: as it is, or the texts of its blocks, one after another."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise InputError(f"{where} has a message whose content is no text but a {type(given).__name__}")
    texts = []
    for block in given:
        kind = block.get("type", "text") if isinstance(block, dict) else "text"
        text = block.get("text") if isinstance(block, dict) else block
        if kind not in TEXT_BLOCKS or not isinstance(text, str):
            raise InputError(f"{where} has a message with a block of the type {kind!r}, expected text alone: "
                             "{type: text, text: ...}; leave such rows out")  # fmt: skip
        texts.append(text)
    return "".join(texts)


def _calls(given: Any, holder: str, where: str) -> list[dict[str, Any]]:
    """Calls as {type, function}, of an object {name, arguments}, a list of such, or its JSON text."""
    try:
        calls = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls or not all(isinstance(c, dict) and "name" in c for c in calls):
        raise InputError(f"{where} has {holder} that is no JSON of {{name, arguments}}")
    return [{"type": "function", "function": call} for call in calls]
