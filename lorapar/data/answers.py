r"""Whether a completion's answer is right: when two answers are the same.

`finding.py` says where the answer stands. Two numbers are the same where their values are, exactly; two lists where
their members are; two expressions where `algebra.py` finds them equal; all else is compared as text. A wrong answer
that is called right teaches a model the mistake, so what offers several answers, leaves a sum to the reader or cannot
be read is wrong.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from . import algebra
from .finding import TAIL, Found, extract_answer, find, marked_answer, plain, spoken, without_markdown
from .numbers import (
    EQUATION,
    SEVERAL,
    Number,
    contradicts_itself,
    equal,
    is_rounding,
    read_number,
    whole_number,
    with_decimal_comma,
    without_latex,
)

__all__ = ["extract_answer", "is_correct", "last_number", "marked_answer", "text_of", "without_latex"]

# Longer answers are compared as text alone.
LONGEST = 400

# Text


# Names of functions and of LaTeX's commands; any other two letters are a word.
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|abs|and|or)(?![a-z]))[^\W\d_]{2,}")


def _is_formula(text: str) -> bool:
    """True for f'(x), n!, 2X, P(A) and V = IR, where case, primes and ! count; not for words, nor for one capital."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s{0,3}\{([^{}]*)\}", r"\1", text).strip(" $")
    words = [word for word in WORD.findall(text) if len(word) > (2 if re.search(r"[=^+*/<>\\_]", text) else 1)]
    return not words and CHOICE.fullmatch(text) is None and re.search(r"[\w\\]", text) is not None


def _normalised(text: str, formula: bool = False) -> str:
    r"""Text for comparing words: no case, no \text{}, quotes, articles, dollars around it or closing full stop.

    A formula keeps its case, its primes and its !.
    """
    if "\\" in text:
        text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s{0,3}\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"^\\[(\[]\s*(.*?)\s*\\[)\]]$", r"\1", text.strip())
    if formula:
        text = re.sub(r"[\"“”]", "", text).strip(" \t\n$").rstrip(" \t\n.,;:$")
        text = re.sub(r"^['‘](.*)['’]$", r"\1", text)
    else:
        text = re.sub(r"[\"'“”‘’]", "", text).casefold().strip(" \t\n$").rstrip(" \t\n.,;:!?$")
    text = re.sub(r"^(?:the|a|an)\s+(?=\S)", "", text)
    if "\n" in text:
        # A grid's lines count, a column of spaces does not.
        return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
    return " ".join(text.split())


def _tight(text: str) -> str:
    r"""LaTeX for comparing letter by letter: one way to write \frac, \left, spaces and single braces."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox|textrm|mathbf|operatorname)\s{0,3}\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
    text = re.sub(
        r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-z])|(?<!\\)\\[,!;: ]|\\q?quad(?![a-z])|[\s$]|\\\$", "", text
    )
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text).replace("\\dots", "\\ldots")
    text = re.sub(r"\\(le|ge|ne)q(?![a-z])", r"\\\1", text)
    text = re.sub(r"\{[bp]matrix\}", "{matrix}", text).replace("\\varnothing", "\\emptyset").replace("∅", "\\emptyset")
    return re.sub(r"^\\[(\[]|\\[)\]]$", "", text).rstrip(".")


# Choices: (B), B., B) Paris, option B

CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
LABELLED = re.compile(r"\(?([A-Z])(?:\)|[.:])[.:]?\s+(\S.*)", re.DOTALL)
# A capital that stands alone, in brackets or not; "I" and "a" in a sentence, and the C of 100 °C, are no choices.
LETTER_ALONE = re.compile(
    r"(?<![\w'’°.\-])(?<!\d\s)(?:\((?P<round>[A-Za-z])\)|\[(?P<square>[A-Z])\]"
    r"|(?P<bare>(?!I(?:['’]|\s[a-z]))(?!A\s(?!is\b|was\b|would\b|because\b|since\b|as\b|which\b|and\b|or\b|not\b|but\b|rather\b)[a-z])[A-Z]))(?![\w'’])"
)
# What may stand before a choice: nothing, or words that end in a verb of choosing.
CHOOSES = re.compile(
    r"(?:(?:so|thus|therefore|hence|then),?\s+)?(?:(?:[\w'’]+\s+){0,7}?(?:[\w'’]*['’]s|is|be|with|choose|chose|pick|select|say|option|choice|answer"
    r"|letter)\s*:?\s+(?:(?:option|choice|letter|answer)\s+)?(?:is\s+)?)?",
    re.IGNORECASE,
)
BECAUSE = re.compile(r"\b(?:because|since|as(?!\s+well))\b")
NOT_THE_OTHER = re.compile(
    r",?\s*\(?(?:and\s+|but\s+)?(?:not|rather than|instead of)\s+(?:option\s+|choice\s+)?"
    r"\(?[A-Z]\)?(?:(?:,|\s+or|\s+and|\s+nor)\s+\(?[A-Z]\)?)*\)?(?=[\s.,;]|$)"
)
DENIAL = re.compile(
    r"\b(?:not|never|neither|nor|wrong|incorrect|false|rather than|or|cannot|except|avoid\w*|eliminat\w*|exclud\w*"
    r"|rul\w+\s+out|reject\w*|unlikely|opposite|unless|other than|too)\b|n['’]t\b",
    re.IGNORECASE,
)
TRUTH = ("yes", "no", "true", "false")


def _choice(given: str, letter: str) -> bool:
    """True where a text chooses this letter, denies nothing and names no other one but to deny it."""
    given = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s{0,3}\{([^{}]*)\}", r"\1", given).strip(" $\n\"'")
    whole = CHOICE.fullmatch(given)
    if whole:
        # b is B; x and X are two letters of mathematics.
        return whole[1] == letter or (letter.upper() in "ABCDEFGH" and whole[1].upper() == letter.upper())
    if len(given) > LONGEST or "\n" in given:
        return False
    because = BECAUSE.search(given)
    claimed, reason = (given[: because.start()], given[because.end() :]) if because else (given, "")
    claimed = NOT_THE_OTHER.sub(" ", claimed)
    found = list(LETTER_ALONE.finditer(claimed))
    if len(found) != 1 or not CHOOSES.fullmatch(claimed, 0, found[0].start()):
        return False
    if LETTER_ALONE.search(reason) and not DENIAL.search(reason):
        # "A since it is B"
        return False
    rest = claimed[found[0].end() :]
    # "B. It does not melt" is what B says, "B is not it" and "A. Paris is not it" are denials.
    label = (
        re.match(r"(?:[.:)]|\s*[-–—]\s)?\s*[^a-z\s]", rest) if found[0]["bare"] is None or rest[:1] in ".:)" else None
    )
    denied = (
        re.search(r"\b(?:is|are|was|were)\s+(?:not|wrong|incorrect|false|too)\b|n['’]t\b.{0,20}$", rest)
        if label
        else DENIAL.search(rest)
    )
    if denied or DENIAL.search(claimed[: found[0].start()]):
        return False
    return next(filter(None, found[0].groups())).upper() == letter.upper()


SAYS = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence)\b,?\s*)?(?:(?:it|that|this)(?:['’]s|\s+is)\s+)?(yes|no|true|false)\b"
    r"(?=\W*$|\s*[.,;:!—–]|\s-\s|\s(?:because|since|as)\b)",
    re.IGNORECASE,
)
ONE_WORD_LINE = re.compile(r"\W*(?:yes|no|true|false)\W*\n", re.IGNORECASE)
VERDICT = re.compile(r"\b(?:not\s+(?:true|false)|yes|no|true|false|or)\b", re.IGNORECASE)


def _with_reason(found: Found) -> str:
    """The shortest reading, with the "because ..." that was cut off: it may name another choice."""
    short = found.shortest
    for reading in found.readings:
        if "\n" not in reading and reading.startswith(short) and BECAUSE.match(reading[len(short) :].lstrip(", ")):
            return reading
    return short


def _truth(found: Found, gold: str) -> bool:
    """True where an answer begins or ends with this of yes, no, true, false, and takes it back nowhere."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s{0,3}\{([^{}]*)\}", r"\1", found.readings[0])
    if found.sign in ("", "tag") and ONE_WORD_LINE.match(text):
        says, line = SAYS.match(text.partition("\n")[0]), text
    else:
        line = text.split("\n", 1)[0] if found.sign else text.rpartition("\n")[2]
        says = SAYS.match(line) or (SAYS.match(found.brief) if found.brief else None)
    if says is None or says[1].casefold() != gold:
        return False
    opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
    # "not true" says false.
    said = [word.casefold() for word in VERDICT.findall(line)]
    said = [opposite[word.split()[1]] if word.startswith("not") else word for word in said]
    return not {"or", *(("yes", "true") if gold in ("no", "false") else ("no", "false"))} & set(said)


# Lists, sets, tuples, intervals

PAIRS = {"(": ")", "[": "]", "{": "}"}


def _mathematics(text: str) -> str:
    r"""A text with the signs that delimit formulas gone, \left( as (, \{ as {, ∞, π, √ and ≤ as commands."""
    text = text.strip()
    if not text.isascii():
        for sign, command in (("∞", "\\infty"), ("π", "\\pi "), ("√", "\\sqrt"), ("≤", "\\le "), ("≥", "\\ge "),
                              ("≠", "\\ne "), ("∪", "\\cup "), ("∈", "\\in "), ("±", "\\pm "), ("²", "^2"),
                              ("³", "^3"), ("−", "-"), ("–", "-"), ("θ", "\\theta "), ("°", "^\\circ ")):  # fmt: skip
            text = text.replace(sign, command)
    if "matrix" not in text and "array" not in text:
        # Doubled by someone's escaping.
        text = re.sub(r"\\\\(?=[a-zA-Z({[])", r"\\", text)
    text = re.sub(
        r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-z])|(?<!\\)\\[,!;: ]|\\q?quad(?![a-z])|~", " ", text
    )
    text = re.sub(r"(?<!\\)\\[()\[\]]|\$|\\\$", " ", text)
    text = re.sub(r"(?<=\d)\s?x\s?(?=10\s?\^)", r"\\times ", text)
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text).replace("\\{", "{").replace("\\}", "}").replace("{,}", "")
    text = re.sub(r"\\(?:leq|leqslant|le)(?![a-z])", r"\\le", text)
    text = re.sub(r"\\(?:geq|geqslant|ge)(?![a-z])", r"\\ge", text)
    text = re.sub(r"\\neq(?![a-z])", r"\\ne", text)
    text = re.sub(r"\\(?:lt)(?![a-z])", "<", re.sub(r"\\gt(?![a-z])", ">", text))
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox|textrm)\s{0,3}\{\s*(and|or)\s*\}", r" \1 ", text)
    # A unit behind a value: 5 \text{ cm}^2.
    text = re.sub(r"(?<=\S)\s*\\(?:text|mathrm|mbox|textrm)\s{0,3}\{[^{}]*\}(?:\^\{?\d\}?)?\s*\.?$", "", text)
    text = re.sub(r"\s?\^\s?\{?\s?\\(?:circ|degree)\s?\}?", "", text)
    return text.strip().rstrip(".").strip()


def _split(text: str, words: bool) -> list[str]:
    """The members of a list at its outermost commas; at "and" and "or" too."""
    members, depth, start = [], 0, 0
    for match in re.finditer(r"\\?[({\[\])}]|[,;]|\b(?:and|or)\b", text):
        token = match[0][-1] if match[0].startswith("\\") else match[0]
        if token in PAIRS:
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif depth == 0 and (token in ",;" or words):
            members.append(text[start : match.start()])
            start = match.end()
    members.append(text[start:])
    return [member.strip() for member in members if member.strip()]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening bracket, inside, closing bracket) where one pair, or an interval's, encloses a whole text."""
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return None
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and index < len(text) - 1:
            return None
    return text[0], text[1:-1].strip(), text[-1]


@dataclass(frozen=True)
class Members:
    """Several values: "{" for a set or a bare list, which have no order, "(" for a tuple, "[)" for an interval."""

    kind: str
    values: tuple[str, ...]


MATRIX = re.compile(r"[(\[]?\s*\\begin\s?\{([bp]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\s?\{\1\}\s*[)\]]?", re.DOTALL)
# What a value is the value of: x, x_1, f(x), (p, q), \angle A is left out; AB, |AB| and AB : CD are lengths.
NAME = re.compile(
    r"(?:[A-Za-z](?:_\{?\w{1,3}\}?)?|\\[a-z]+(?:_\{?\w\}?)?|[A-Za-z]\([a-z]\)|\([a-z](?:,\s*[a-z]){1,4}\)|\|?[A-Z]{2}\|?"
    r"|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}|[A-Z](?:_\{?\w{1,5}\}?)?\s*:\s*[A-Z](?:_\{?\w{1,5}\}?)?)\s*(?:=|\\in(?![a-z]))(?!=)\s*"
)


def _named(text: str) -> tuple[str, str]:
    """(name, value) of x = 5, (p, q) = (3, 2), x \\in [1, 2]; name "" where there is none."""
    match = NAME.match(text)
    if match is None:
        return "", text
    # z = 1 + 1 = 2 is z = 2; x = 1, y = 2 are two.
    parts = re.split(r"=", text[match.end() :])
    if re.search(r"[,;<>!]|\\(?:in|le|ge|ne|and|or)(?![a-z])|\b(?:and|or)\b", text[match.end() :]) and len(parts) > 1:
        return "", text
    return re.sub(r"[\s{}]|=|\\in$", "", match[0].strip()), parts[-1].strip()


def _members(text: str) -> Members | None:
    """What a text lists; None for a single value."""
    matrix = MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix("\\\\"))]
        shape = f"matrix {len(rows)} by {', '.join(str(len(row)) for row in rows)}"
        return Members(shape, tuple(cell.strip() for row in rows for cell in row))
    enclosed = _enclosed(text)
    if enclosed:
        left, inside, right = enclosed
        values = _split(inside, words=False)
        if left == "{" and right == "}":
            # A set's member may be said twice.
            return Members("{", tuple({_tight(value): value for value in _signs(values)}.values()))
        if len(values) >= 2:
            return Members(left + right, tuple(values))
        return _members(inside) if left == "(" and right == ")" and _enclosed(inside) else None
    unions = re.split(r"\\cup(?![a-z])", text)
    if len(unions) > 1:
        return Members("{", tuple(part.strip() for part in unions))
    values = _signs(_split(text, words=True))
    return Members("{", tuple(values)) if len(values) >= 2 else None


def _signs(values: Sequence[str]) -> list[str]:
    r"""1 \pm 2 as 1 + 2 and 1 - 2."""
    spread = []
    for value in values:
        if value.count("\\pm") == 1:
            spread += [re.sub(r"^\s*\+\s*", "", value.replace("\\pm", sign)) for sign in "+-"]
        else:
            spread.append(value)
    return spread


RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|!=|[<>=]")
PLAINER = {"\\le": "<=", "\\ge": ">=", "\\ne": "!="}
TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _sides(text: str) -> tuple[list[str], list[str]]:
    """(what stands around the relation signs of a text, the signs in ASCII)."""
    sides = [str(side) for side in RELATION.split(text)]
    return sides, [PLAINER.get(sign[0], sign[0]) for sign in RELATION.finditer(text)]


def _interval(text: str) -> str | None:
    r"""x \ge 2, -2 \le x < 7 and 0 < f(x) < 1 as the interval that they are."""
    parts, signs = _sides(text)
    name = re.compile(r"\s*(?:[a-zA-Z](?:_\w)?|[a-zA-Z]\([a-z]\)|\\[a-z]+)\s*")
    if (
        len(parts) == 3
        and name.fullmatch(parts[1])
        and all(sign[0] == signs[0][0] and sign[0] in "<>" for sign in signs)
    ):
        if signs[0][0] == ">":
            parts, signs = parts[::-1], [TURNED[sign] for sign in signs[::-1]]
        left, right = "[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")"
        return f"{left}{parts[0].strip()}, {parts[2].strip()}{right}"
    if len(parts) == 2 and signs[0][0] in "<>":
        if name.fullmatch(parts[1]) and not name.fullmatch(parts[0]):
            parts, signs = parts[::-1], [TURNED[signs[0]]]
        if name.fullmatch(parts[0]) and not re.search(r"[a-z](?![a-z]*\{)", re.sub(r"\\[a-z]+", "", parts[1])):
            end = parts[1].strip()
            close = "=" in signs[0]
            return (
                f"(-\\infty, {end}{']' if close else ')'}"
                if signs[0][0] == "<"
                else f"{'[' if close else '('}{end}, \\infty)"
            )
    return None


def _variable(text: str) -> str:
    """x of x > 2, 1 < x < 2 and x \\in (1, 2); "" where there is none."""
    parts = [part.strip() for part in re.split(RELATION.pattern + r"|\\in(?![a-z])", text)]
    names = [part for part in parts if re.fullmatch(r"[a-zA-Z](?:_\{?\w\}?)?(?:\([a-z]\))?|\\[a-z]+", part)]
    return next((name for name in names if name not in ("e", "i", "\\pi", "\\infty")), "")


# The same value

# 79 - 17 + 60 and 2 × 3 × 7 as golds are about how they are written, not about their value.
ARITHMETIC = re.compile(r"(?:\s|[\d.()/]|[-+*×÷]|\\times(?![a-z])|\\cdot(?![a-z]))+")


def _read(text: str) -> algebra.Node | None:
    try:
        return algebra.read(text)
    except algebra.Unreadable:
        return None


def _same_number(given: str, gold: str) -> bool | None:
    """Whether two texts are the same number; None where either is none."""
    wanted = whole_number(gold)
    if wanted is None:
        return None
    found = whole_number(given)
    return None if found is None else equal(found, wanted)


FORMULA = re.compile(r"\b(?:and|or)\b|[\\^=+*/<>|(){}\[\],;:!_-]|\d\s?[a-zA-Z]")


def _same(given: str, gold: str, depth: int = 0) -> bool:
    """True where two texts, as `_mathematics` leaves them, have the same value: numbers, lists, relations, algebra."""
    if depth > 4:
        return False
    if not FORMULA.search(gold):
        # Words and rows of numbers: their spaces count.
        return bool(_same_number(given, gold))
    if _tight(given) == _tight(gold) != "":
        return True
    (name, value), (gold_name, gold_value) = _named(given), _named(gold)
    if not (name and gold_name and name != gold_name):
        numbers = _same_number(given, gold)
        if numbers is not None:
            return numbers
        if (name and not _relation(gold)) or gold_name:
            return _same(value, gold_value, depth + 1)
    if re.search(r"[<>]|\\[lg]e(?![a-z])", gold) and _joins(given) and _joins(gold) and _joins(given) != _joins(gold):
        # x < 1 or x > 2, x < 1 and x > 2
        return False
    members, gold_members = _members(given), _members(gold)
    if gold_members is None and _relation(gold):
        return _same_relation(given, gold, depth)
    if members is None and gold_members is not None and _relation(given):
        interval = _interval(given)
        return interval is not None and _same(interval, gold, depth + 1)
    if (members is None) != (gold_members is None):
        return False
    if members is not None and gold_members is not None:
        return _same_members(members, gold_members, depth)
    return _same_expression(given, gold)


def _joins(text: str) -> set[str]:
    return set(re.findall(r"\b(?:and|or)\b", text))


def _relation(text: str) -> bool:
    return RELATION.search(text) is not None


def _same_members(given: Members, gold: Members, depth: int) -> bool:
    if given.kind == "{" and all(_enclosed(value) for value in given.values):
        # A point may be said twice; 1, 2, 2 is another list than 1, 2.
        given = Members("{", tuple({_tight(value): value for value in given.values}.values()))
    if len(given.values) != len(gold.values) or len(gold.values) > 40:
        return False
    if gold.kind != "{" or given.kind != "{":
        # (1, 2) may be a list in brackets where the gold is bare only if a tuple was asked for: kinds must agree.
        if given.kind != gold.kind:
            return False
        return all(_same_member(one, other, depth) for one, other in zip(given.values, gold.values))
    if not all(_is_mathematical(value) for value in gold.values):
        # Words have an order: word_sorting's answer is one.
        return all(_same_member(one, other, depth) for one, other in zip(given.values, gold.values))
    left = list(given.values)
    for value in gold.values:
        match = next((one for one in left if _same_member(one, value, depth)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is_mathematical(text: str) -> bool:
    text = _named(text)[1]
    if len(text) == 1 and text.isalpha():
        return False
    return whole_number(text) is not None or _enclosed(text) is not None or _read(text) is not None or _relation(text)


def _same_member(given: str, gold: str, depth: int) -> bool:
    formula = WORD.search(gold) is None
    return _normalised(given, formula) == _normalised(gold, formula) != "" or _same(given, gold, depth + 1)


def _same_relation(given: str, gold: str, depth: int) -> bool:
    """True for two equations, inequalities or intervals that say the same."""
    interval = _interval(gold)
    if interval is not None:
        if not {_variable(given), _variable(gold), ""} <= {_variable(gold), ""}:
            return False
        given = _named(given)[1]
        other = given if _enclosed(given) or "\\cup" in given else _interval(given)
        if other is not None:
            return _same(other, interval, depth + 1)
    (sides, signs), (given_sides, given_signs) = _sides(gold), _sides(given)
    if len(sides) != 2:
        return False
    if len(given_sides) == 1:
        # f(x) = 2x + 3 and 2x + 3.
        short = re.fullmatch(r"\s*(?:[a-zA-Z]|[a-zA-Z]\([a-z]\))\s*", sides[0])
        return signs[0] == "=" and short is not None and _same_expression(given, sides[1])
    sign, given_sign = signs[0], given_signs[0]
    if len(given_sides) != 2 or sign not in (given_sign, TURNED[given_sign]):
        return False
    readings = [_read(side.strip()) for side in (*given_sides, *sides)]
    if any(reading is None for reading in readings):
        return False
    minus = ("number", Fraction(-1))
    ones, others = (("+", readings[at], ("*", minus, readings[at + 1])) for at in (0, 2))
    ratio = algebra.proportional(ones, others)
    return ratio != 0 and (sign in ("=", "!=") or (ratio > 0) == (sign == given_sign))


def _same_expression(given: str, gold: str) -> bool:
    if ARITHMETIC.fullmatch(gold) and re.search(r"[-+*×÷]|\\times|\\cdot", gold.lstrip("-")):
        return re.sub(r"\s", "", given) == re.sub(r"\s", "", gold)
    wanted = _read(gold)
    if wanted is None:
        return False
    if not algebra.letters(wanted) and given.count("\\approx") == 1:
        given, _, about = given.partition("\\approx")
        rounded, exact = whole_number(about), _real(_read(given.strip()))
        if rounded is None or exact is None or not is_rounding(rounded, exact, cut=False):
            return False
    found = _read(given)
    if found is None and given.count("=") and not _relation(gold):
        # The value of a chain: (x + 1)^2 = x^2 + 2x + 1.
        *_, before, given = given.split("=")
        found, before = _read(given.strip()), _read(before.strip())
        if found and before and algebra.letters(before) == algebra.letters(found) and not algebra.same(before, found):
            return False
    if found is None:
        return False
    if algebra.same(found, wanted):
        return True
    return _is_rounded(given, wanted)


def _is_rounded(given: str, wanted: algebra.Node) -> bool:
    """True for six or more digits of an irrational number."""
    number = whole_number(given)
    if number is None or number.digits < 6 or not number.decimals or algebra.letters(wanted):
        return False
    exact = _real(wanted)
    return exact is not None and exact.denominator != 1 and is_rounding(number, exact)


def _real(node: algebra.Node | None) -> Fraction | None:
    """The value of an expression without letters, where it is real; a float's where it is irrational."""
    if node is None or algebra.letters(node):
        return None
    try:
        value = algebra.evaluate(node).number
    except algebra.Unreadable:
        return None
    if isinstance(value, Fraction):
        return value
    return Fraction(value.real) if value.imag == 0 else None


# Right or wrong


@dataclass(frozen=True)
class Gold:
    """A right answer, read once."""

    text: str
    formula: bool
    normal: str
    number: Number | None
    mathematics: str
    hexadecimal: int | None
    choice: str
    labelled: str


@functools.lru_cache(maxsize=8192)
def _gold(answer: str) -> Gold:
    text = (marked_answer(answer) or without_markdown(plain(answer[-TAIL:]))).strip()
    short = text if len(text) <= LONGEST else ""
    choice = CHOICE.fullmatch(re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s{0,3}\{([^{}]*)\}", r"\1", short).strip(" $"))
    # x is a letter of mathematics, X and (x) are choices.
    choice = choice if (choice and not short.strip(" $").islower()) or "(" in short else None
    formula = _is_formula(text) or (len(text.strip(" $.")) == 1 and choice is None)
    labelled = LABELLED.fullmatch(short)
    return Gold(
        text=text,
        formula=formula,
        normal=_normalised(text, formula),
        number=whole_number(short) if short else None,
        mathematics=_mathematics(short),
        hexadecimal=_hexadecimal(short),
        choice=choice[1] if choice else "",
        labelled=labelled[1] if labelled else "",
    )


def _hexadecimal(text: str) -> int | None:
    match = re.fullmatch(r"([-+]?)0([xXbB])([0-9a-fA-F]{1,300})\.?", text.strip())
    if match is None:
        return None
    try:
        return int(match[1] + match[3], 16 if match[2] in "xX" else 2)
    except ValueError:
        return None


DENIED = re.compile(r"(?:not|never|neither|no longer|unknown|none of)\b", re.IGNORECASE)


def is_correct(completion: str, answer: str) -> bool:
    """True if the last answer that `completion` states has the value of `answer`.

    Numbers are equal in any usual form (1,000, $5, 5.0, 50 %, 1/2, 2 1/2, 1e3, seven, with a unit, in LaTeX);
    50 % is both 50 and 0.5. A sum that has not been worked out is no answer, and neither is a choice of several.
    Other answers are compared as values where they are mathematical (docs/rewards.md says which), else as text,
    without case and punctuation. An empty answer is never right. Texts of any length are decided in milliseconds.
    """
    gold = _gold(answer)
    if not gold.text:
        return False
    said = spoken(completion)[-TAIL:]
    found = find(said)
    if found is None:
        return False
    if found.sign in ("", "tag") and _is_gold_whole(said.strip(), gold):
        return True
    if gold.number is not None:
        return _is_number_right(found.readings, found.sign, gold)
    if gold.choice:
        return _choice(_with_reason(found), gold.choice)
    if gold.normal in TRUTH:
        return _truth(found, gold.normal)
    readings = (*found.readings, found.brief) if found.brief else found.readings
    return any(_is_reading_right(reading, gold) for reading in readings)


def _is_gold_whole(text: str, gold: Gold) -> bool:
    """True where a completion is the right answer and nothing else, or its lines after a colon or an empty line."""
    if text == gold.text:
        return True
    lines, given = gold.text.split("\n"), text.split("\n")
    if len(lines) < 2 or len(given) <= len(lines) or not re.search(r":\W*$|^\W*$", given[-len(lines) - 1]):
        return False
    return [line.strip() for line in given[-len(lines) :]] == [line.strip() for line in lines]


def _is_reading_right(reading: str, gold: Gold) -> bool:
    """True where an answer, read in one way, is the right one, which is no number."""
    normal = _normalised(reading, gold.formula)
    if not reading or (DENIED.match(reading) and normal != gold.normal):
        return False
    if reading == gold.text or normal == gold.normal != "":
        return True
    if gold.labelled and CHOICE.fullmatch(reading) and _choice(reading, gold.labelled):
        return True
    labelled = LABELLED.fullmatch(reading)
    if labelled and not gold.labelled and _normalised(labelled[2]) == gold.normal != "":
        return True
    if len(reading) > LONGEST or not gold.mathematics:
        return False
    if gold.hexadecimal is not None:
        return _hexadecimal(reading) == gold.hexadecimal
    return _same(_mathematics(reading), gold.mathematics)


EQUALS = re.compile(r"[=≈]|\\approx")


def _is_number_right(readings: tuple[str, ...], sign: str, gold: Gold) -> bool:
    """True where the shortest reading that has a number has the right one."""
    wanted, name = gold.number, _named(gold.mathematics)[0]
    assert wanted is not None
    if sign in ("", "tag") and _is_grid(readings[0]):
        return False
    for reading in reversed(readings):
        if DENIED.match(reading) or (EQUALS.search(reading) and contradicts_itself(reading)):
            return False
        number = _number_of(reading, sign, wanted)
        if name and _named(_mathematics(reading[:LONGEST]))[0] not in ("", name):
            return False
        if number is not None:
            return equal(number, wanted)
        if re.search(r"\d", reading):
            return _is_other_form_right(reading, gold)
    return False


def _is_grid(text: str) -> bool:
    """True for several lines of numbers alone: a matrix or a list."""
    lines = [line for line in text[-LONGEST:].split("\n") if line.strip()]
    return len(lines) > 1 and all(re.fullmatch(r"[-+\d.,\s\[\]]*\d[-+\d.,\s\[\]]*", line) for line in lines)


# A word in any script: two letters of an alphabet, one sign of others.
PROSE = re.compile(r"[^\W\d_]{2,}|[\u3040-\u9fff]")
# Quotes, arrows and pictures around a number.
AROUND = " \t\n\"'“”‘’`,;:→⇒∴✅✓🎉•"
COMPARING = re.compile(r"[<>≤≥≠≢±]|!=|\\(?:leq?|geq?|neq?|lt|gt|pm)(?![a-z])")
LETTER = re.compile(r"\d(?:[A-Za-z]|\s[a-fi-kn-rt-zA-Z])(?![A-Za-z\d]|\s[a-z]{2})")


def _number_of(reading: str, sign: str, wanted: Number) -> Number | None:
    if (sign == "boxed" or reading.count("$") > 1 or "\\" in reading) and LETTER.search(reading):
        # In a formula 3s and 5 m are products.
        return None
    whole = whole_number(reading.strip(AROUND))
    if whole is not None:
        return whole
    if COMPARING.search(reading) and not PROSE.search(re.sub(r"\\[a-zA-Z]+", " ", reading)):
        return None
    prose = PROSE.search(re.sub(r"\\[a-zA-Z]+", " ", reading))
    comma = with_decimal_comma(reading) or (with_decimal_comma(reading, within=True) if prose and not sign else None)
    if comma is not None:
        # 3,14 is 3.14 only where that is the answer: else it is a list, or a slip.
        return comma if comma.value == wanted.value else None
    if len(reading) <= LONGEST and "≈" in without_latex(reading):
        # 10/3 ≈ 3.33; 5 ft ≈ 1.52 m is the second. What is no rounding contradicts itself.
        left, right = (whole_number(side.strip(" $")) for side in re.split(r"[=≈]", without_latex(reading))[-2:])
        if left and (right is None or left.unit == right.unit):
            named = re.match(r"[\s$]*[A-Za-z]\s*=", reading)
            if equal(left, wanted) or (named and right and not is_rounding(right, left.value, cut=False)):
                return left
    if not prose:
        # A formula is its value as a whole: 3x^2 - 7x + 4 is not 4. 3 + 4 = 7 is 7.
        left, _, right = without_latex(reading).replace("≈", "=").rpartition("=")
        if EQUATION.search(left[-60:]) or SEVERAL.search(left[-60:]):
            return None
        # "A: 18", and 1500 (1.5 × 10^3), which says the same twice.
        value, _, again = re.sub(r"^\s*[A-Za-z]\s*:", "", right).partition(" (")
        number = whole_number(value.strip(AROUND))
        if number is None or not again:
            return number
        repeated = _read(_mathematics(again.removesuffix(")")))
        return number if repeated and algebra.same(repeated, ("number", number.value)) else None
    return read_number(reading, first=bool(sign))


def _is_other_form_right(reading: str, gold: Gold) -> bool:
    """True for a value that is no plain number but has been worked out: LaTeX, a power of ten, an equation."""
    wanted = gold.number
    if len(reading) > LONGEST or wanted is None:
        return False
    mathematics = _mathematics(reading).rstrip("%").strip()
    if wanted.decimals and wanted.digits >= 6:
        exact = _read(mathematics)
        if exact is not None and _is_rounded(gold.text, exact):
            return True
    if _members(mathematics) is not None or COMPARING.search(mathematics):
        return False
    left, _, right = mathematics.rpartition("=")
    if EQUATION.search(left[-60:]) or re.search(r"\\div(?![a-z])|[÷!|+]|\d\s*-", right):
        return False
    found = _read(right.strip())
    if found is None or not _is_worked_out(found):
        return False
    return algebra.same(found, ("number", wanted.value))


def _is_worked_out(node: algebra.Node) -> bool:
    """True for a number, a fraction that is not whole, a mixed number, a power of ten, and the negative of such."""
    kind, *parts = node
    if kind == "number":
        return True
    if kind == "*":
        return (parts[0] == ("number", -1) and _is_worked_out(parts[1])) or (
            parts[0][0] == "number" and _is_power_of_ten(parts[1])
        )
    if kind == "+":
        return parts[0][0] == "number" and parts[1][0] == "/" and _is_worked_out(parts[1])
    if kind == "/":
        value = _real(node)
        return value is not None and value.denominator != 1 and all(_is_signed(part) for part in parts)
    return _is_power_of_ten(node)


def _is_signed(node: algebra.Node) -> bool:
    return node[0] == "number" or (node[0] == "*" and node[1] == ("number", -1) and node[2][0] == "number")


def _is_power_of_ten(node: algebra.Node) -> bool:
    return node[0] == "^" and node[1] == ("number", 10) and _is_signed(node[2])


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """(the last number in the text, whether it is a percentage); what follows the last "=" if a number does.

    None where there is none, where the last is part of a sum that has not been worked out (5 + 2, 12/2), or one of
    several (5 or 6).
    """
    number = read_number(text)
    return None if number is None else (number.value, number.percent)


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """A completion's text, be it a string or a list of messages, whose content may be a list of text blocks."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    return "\n".join(
        content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)
        for content in contents
    )
