"""Reads a teacher's reply as a vote: JSON that follows the schema, or any text that clearly names one system.

Nothing is guessed. A reply that names both systems, that says which one it is *not*, or whose JSON was cut off before
the label, is no vote, and its outcome says why.
"""

import json
import re
from dataclasses import dataclass

SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "description": "one short sentence"},
        "system": {"type": "string", "enum": ["System1", "System2"]},
    },
    "required": ["reason", "system"],
    "additionalProperties": False,
}
# Reasons and raw answers are stored up to this length.
STORED_LETTERS = 2000
LABEL_KEYS = ("system", "label", "vote", "answer", "class", "classification")
REASON_KEYS = ("reason", "explanation", "rationale")
LABEL = re.compile(r"(?:system|s)?[\s_-]*([12])(?:\.0?)?", re.IGNORECASE)
NAMED = re.compile(r"\bsystem[\s_-]*([12])\b", re.IGNORECASE)
# The field with the label, also in JSON that was cut off behind it.
LABEL_FIELD = re.compile(
    rf'"(?:{"|".join(LABEL_KEYS)})"\s*:\s*"?\s*(?:system|s)?[\s_-]*([12])\s*(?:["\',}}\n]|$)', re.IGNORECASE
)
NEGATED = re.compile(
    r"(?:\bnot|n't|\bnever|\bneither|\bnor|\brather than|\binstead of|\bunlike|\bother than|\bthan)"
    r"(?:\s+(?:a|an|the|really|quite|just|simply|purely|in|of|be|is|by|for|fit|need|require|belong|to|use|from))*"
    r"[\s\"'`*_(]*$",
    re.IGNORECASE,
)
REFUSED = re.compile(
    r"\b(?:i(?:'m| am)? (?:sorry|unable|afraid)|i (?:can(?:'t|not)|won't|will not|must decline)|"
    r"as an ai\b|cannot (?:help|assist|comply)|can't (?:help|assist|comply)|against (?:my|the) (?:policy|guidelines))",
    re.IGNORECASE,
)


@dataclass
class Reading:
    """`vote` 1, 2 or None; `outcome` "answered", "refused", "unparseable" or "both"."""

    vote: int | None
    outcome: str
    reason: str = ""


def read_answer(text: str, refusal: str | None = None) -> Reading:
    """The vote in a teacher's reply. `refusal`: the text that the endpoint itself marks as a refusal."""
    if refusal:
        return Reading(None, "refused", refusal[:STORED_LETTERS])
    text = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.DOTALL).strip()
    readings = [reading for reading in map(_of_object, _objects(text)) if reading is not None]
    votes = {reading.vote for reading in readings if reading.vote} | {int(m[1]) for m in LABEL_FIELD.finditer(text)}
    if len(votes) > 1:
        return Reading(None, "both", _short(text))
    if votes:
        whole = next((reading for reading in readings if reading.vote), None)
        return whole or Reading(votes.pop(), "answered")
    if readings or re.match(r"(?:```\w*\s*)?\{", text):
        both = readings and len({match[1] for match in NAMED.finditer(text)}) > 1
        outcome = "both" if both else "refused" if REFUSED.search(text) else "unparseable"
        return Reading(None, outcome, _short(text))
    return _of_prose(text)


def _of_prose(text: str) -> Reading:
    whole = LABEL.fullmatch(text.strip(" \t\r\n\"'`*_."))
    if whole:
        return Reading(int(whole[1]), "answered", "")
    if REFUSED.search(text[:200].replace("’", "'")):
        return Reading(None, "refused", _short(text))
    named = list(NAMED.finditer(text))
    systems = {int(match[1]) for match in named}
    if len(systems) > 1:
        return Reading(None, "both", _short(text))
    if not named or any(NEGATED.search(text[: match.start()].replace("’", "'")) for match in named):
        return Reading(None, "unparseable", _short(text))
    return Reading(systems.pop(), "answered", _short(text))


def _objects(text: str) -> list[dict]:
    """Every JSON object in the text that is not inside another."""
    decoder, objects, at = json.JSONDecoder(strict=False), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        # RecursionError: thousands of open brackets.
        except (ValueError, RecursionError):
            end = at + 1
        else:
            objects.append(value)
        at = text.find("{", end)
    return objects


def _of_object(value: dict) -> Reading | None:
    """The vote of a JSON object; None where it has no key that could hold a label."""
    lower = {str(key).casefold(): item for key, item in value.items()}
    key = next((key for key in LABEL_KEYS if key in lower), None)
    if key is None:
        return None
    match = LABEL.fullmatch(str(lower[key]).strip())
    reason = next((lower[key] for key in REASON_KEYS if isinstance(lower.get(key), str)), "")
    return Reading(int(match[1]) if match else None, "answered" if match else "unparseable", reason[:STORED_LETTERS])


def _short(text: str) -> str:
    return " ".join(text.split())[:STORED_LETTERS]
