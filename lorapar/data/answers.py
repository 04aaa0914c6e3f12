"""Whether a completion's answer is right: how the answer is found in a text, and when two answers are the same.

It is decided in two steps: plain numbers and plain text by value, exactly and at once; LaTeX and algebra by
math-verify. The paper's script compares by regular expression and misses right answers in another form.
"""

import functools
import logging
import re
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..errors import InputError, not_installed

# How the final answer is found

ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
HASHES = re.compile(r"####[ \t]*([^\n]*)")
# "answer is 18 dollars, which ...": up to the end of the line, sentence or clause.
STATED = re.compile(
    r"\banswer(?:\s+is\b|\s*[:=])\s*:?\s*(?P<answer>[^\n]+?)"
    r"(?=\s*(?:\n|\Z|[.!?;]\s|[.!?;]\Z|,\s+[a-z]|\s(?:because|since|which|when|after|as|so)\b))",
    re.IGNORECASE,
)
BOXED = re.compile(r"\\f?boxed\s*\{")


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""(position, content) of each \boxed{...}, braces balanced; one that is never closed holds the rest."""
    found = []
    for match in BOXED.finditer(text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append((match.start(), text[match.end() : end - (depth == 0)]))
    return found


def marked_answer(text: str) -> str:
    r"""What a sign for it marks as the answer: an <answer> tag, else the last of #### and \boxed{}; or ""."""
    tags = ANSWER_TAG.findall(text)
    if tags:
        return marked_answer(tags[-1]) or tags[-1].strip()
    found = _boxed(text) + [(match.start(), match[1]) for match in HASHES.finditer(text)]
    return max(found)[1].strip() if found else ""


def extract_answer(text: str) -> str:
    r"""The final answer that the text states.

    An <answer> tag wins; else the last of "#### ...", \boxed{...} and "answer is ..." counts; else the last
    line with a digit in it, or the last line.
    """
    tags = ANSWER_TAG.findall(text)
    if tags:
        return extract_answer(tags[-1])
    found = _boxed(text) + [(match.start(), match[1]) for match in HASHES.finditer(text)]
    found += [(match.start(), match["answer"]) for match in STATED.finditer(text)]
    if found:
        return max(found)[1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.search(r"\d", line)), lines[-1] if lines else "")


# Numbers

NUMBER = re.compile(
    # A minus is a sign unless something stands before it that it could be taken from (10-3, 10 -3, (2)-3),
    # and a digit of a unit (m2, m^2) is no number.
    r"(?:(?<![\d)\]%]\s)(?<![\w)\]%])[-+](?:[$€£]\s?)?)?"
    r"(?<![a-z])(?<![a-z]\^)(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\w))?"
)
# 1/2 and 2 1/2 are one number; longer sums of numbers are not, math-verify sees to those.
FRACTION = re.compile(rf"(?:(?P<whole>{NUMBER.pattern})\s+)?(?P<over>{NUMBER.pattern})\s*/\s*(?P<under>\d[\d,]*)")
GROUPED = re.compile(r"\d{1,3}(,\d{2,3})*,\d{3}")
UNITS = (
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
TENS = ("thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: value for value, word in enumerate(UNITS)} | {word: 10 * tens for tens, word in enumerate(TENS, start=3)}


def without_latex(text: str) -> str:
    r"""A text without the LaTeX that only dresses a number: \$, \%, {,}, \text{}, ^\circ, \( and \)."""
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    for dress, plain in (
        ("\\$", "$"),
        ("\\%", "%"),
        ("{,}", ","),
        ("^\\circ", ""),
        ("^{\\circ}", ""),
        ("−", "-"),
        ("–", "-"),
    ):
        text = text.replace(dress, plain)
    return re.sub(r"\\[()\[\],!; ]", " ", text).strip()


def _value(token: str) -> Fraction | None:
    """The value of one number as NUMBER finds it; None where commas are no thousands' separators (1,5)."""
    token = re.sub(r"[$€£\s]", "", token)
    whole = re.split(r"[.eE]", token)[0].lstrip("+-")
    if "," in whole and not GROUPED.fullmatch(whole):
        return None
    return Fraction(token.replace(",", ""))


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """(the last number in the text, whether it is a percentage); what follows the last "=" if a number does.

    None where there is none, or where the last is part of a sum that has not been worked out (5 + 2, 12/2).
    """
    after = re.split(r"[=≈]", text)[-1]
    text = after if re.search(r"\d", after) else text
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        word = re.sub(r"[^a-z ]", "", text.casefold()).split()
        return (Fraction(WORDS[word[0]]), False) if word and len(word) <= 2 and word[0] in WORDS else None
    last = numbers[-1]
    fraction = next((match for match in FRACTION.finditer(text) if match.end() >= last.end()), None)
    if fraction is not None:
        whole, over, under = (_value(fraction[name] or "0") for name in ("whole", "over", "under"))
        if whole is None or over is None or not under or (over / under).denominator == 1:
            return None
        value = whole + (-over if (fraction["whole"] or "").strip().startswith("-") else over) / under
        start, end = fraction.start(), fraction.end()
    else:
        value = _value(last[0])
        start, end = last.start(), last.end()
    joined = re.search(r"[\d)]\s*(?:[-+*/×÷^]|\*\*)\s*[$€£({]*$", text[:start]) or re.match(
        r"\s*(?:[*/×÷^]|[-+]\s*[a-zA-Z](?![a-zA-Z']))", text[end:]
    )
    # 3:30 and 2020-01-05 are no numbers either.
    if value is None or joined or re.search(r"\d\s*[:,]$", text[:start]) or re.match(r":\d", text[end:]):
        return None
    return value, bool(re.match(r"\s*(?:%|percent)", text[end:]))


def _is_number(text: str) -> bool:
    """True where the whole of a text is one number with at most a currency, a percent sign and a unit around
    it."""
    number = rf"(?:{FRACTION.pattern}|{NUMBER.pattern})"
    return re.fullmatch(rf"[$€£]?\s*{number}\s*[$€£%]?\s*(?:[^\W\d]+\.?\s*){{0,3}}", text.rstrip(" .")) is not None


# Right or wrong

# Powers that math-verify would spend minutes on: 10^99999, 9^9^9.
HUGE_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\s*\d{4,}|(?:\^|\*\*)[^+=]*(?:\^|\*\*)|\d!")
LONGEST_EXPRESSION = 300


def _is_expression(text: str) -> bool:
    """True for digits, operators and single letters, with at least one operator; not for a date."""
    return (
        re.fullmatch(r"[\da-zA-Z\s(){}^*/×÷+\-.,=]+", text) is not None
        and re.search(r"[A-Za-z]{2}|\d-\d+-\d", text) is None
        and re.search(r"[\^*/×÷+\-=]", text) is not None
    )


# A sum left to the reader: a number, an operator (but × 10^n) and a number; a root; a power of anything but
# 10.
UNWORKED = re.compile(
    r"[\d)}]\s*(?:[-+*×÷]|\\(?:times|cdot|div)\b)\s*+(?!10\s*\^)[-({$]*\s*\d|\\sqrt|(?<!10)(?<=\d)\s*\^"
)


def _is_unworked(text: str, whole: bool) -> bool:
    """True where a text ends in a sum in place of its result; a fraction is one where the result is whole.

    A model that is rewarded for "7 + 9 = 7 + 9" learns to repeat the question.
    """
    last = re.split(r"[=≈]", text)[-1]
    return bool(UNWORKED.search(last)) or (whole and bool(re.search(r"\\[dt]?frac|\d\s*/\s*\d", last)))


def _is_algebra(text: str) -> bool:
    """True for what math-verify should decide where gold is no number: LaTeX, or an expression in single
    letters."""
    return re.search(r"\\[a-zA-Z]+|\$", text) is not None or (
        _is_expression(text) and re.search(r"[A-Za-z]", text) is not None
    )


@functools.lru_cache(maxsize=8192)
def _math_verify(answer: str, gold: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError(f"rewards: {not_installed('math-verify', 'train')}") from None
    if max(len(answer), len(gold)) > LONGEST_EXPRESSION or HUGE_POWER.search(answer) or HUGE_POWER.search(gold):
        return False
    # math-verify's time limit is a signal, which only the main thread may set; without one it warns at each call. On
    # Windows it is a process, and its way of starting that one fails.
    limited = threading.current_thread() is threading.main_thread() and sys.platform != "win32"
    seconds = 5 if limited else None
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> list:
        # It takes LaTeX and letters for such only between dollars.
        wrapped = text if re.search(r"\$|\\[(\[]", text) else f"${text}$"
        return parse(wrapped, parsing_timeout=seconds)  # pyright: ignore[reportArgumentType]

    # Gold first: the order matters.
    return verify(parsed(gold), parsed(answer), timeout_seconds=seconds)


def _normalised(text: str) -> str:
    r"""Text for comparing words: no case, no \text{}, quotes, articles or closing full stop."""
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*_`\"'“”‘’]", "", text).casefold()
    text = re.sub(r"^(?:the|a|an)\s+", "", text.strip(" \t\n.,;:!?$"))
    return " ".join(text.split())


def is_correct(completion: str, answer: str) -> bool:
    """True if the last answer that `completion` states has the value of `answer`.

    Numbers are equal in any usual form (1,000, $5, 5.0, 50 %, 1/2, 2 1/2, 1e3, seven, with a unit, in LaTeX);
    50 % is both 50 and 0.5. A sum that has not been worked out is no answer. Other answers are compared as
    text, without case and punctuation. An empty answer is never right.
    """
    given, gold = extract_answer(completion), (marked_answer(answer) or answer).strip()
    if not given or not gold or re.match(r"not\b", given, re.IGNORECASE):
        return False
    if _normalised(given) == _normalised(gold) != "":
        return True
    plain, plain_gold = without_latex(given), without_latex(gold)
    if not _is_number(plain_gold):
        return _is_algebra(gold) and _math_verify(given, gold)
    wanted, found = last_number(plain_gold), last_number(plain)
    if "\\" in plain or (found is None and _is_expression(plain)):
        whole = wanted is not None and wanted[0].denominator == 1
        return not _is_unworked(plain, whole) and _math_verify(given, plain_gold)
    if wanted is None or found is None:
        return False
    # 50 % may stand for 50 and for 0.5, whichever of the two has the sign.
    factor = {(True, False): Fraction(1, 100), (False, True): Fraction(100)}.get((wanted[1], found[1]), 1)
    return any(value == found[0] or _nearly(value, found[0]) for value in (wanted[0], wanted[0] * factor))


def _nearly(one: Fraction, other: Fraction) -> bool:
    """True for a fraction whose decimals do not end (1/3) and six or more of them."""
    endless = any(10**20 % value.denominator for value in (one, other))
    return endless and abs(one - other) < Fraction(1, 10**6)


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """A completion's text, be it a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)
