r"""One number in any usual form: 1,000, 1 000, $5, 5.0, 50 %, 1/2, 2 1/2, ½, 1e3, 3 × 10^5, seven, \frac{1}{2}.

A number is a `Fraction`, so equal means equal. Nothing is worked out: 5 + 2 and 12/2 are no numbers.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# What is read of a line, and the longest number: Python refuses to read 4,300 digits.
LONGEST_LINE, LONGEST_NUMBER = 600, 500

CURRENCY = r"(?:(?:US|R|C|A|HK)?\$|[€£¥₹]|(?:USD|EUR|GBP|CHF|JPY|INR|Rs\.?|RM)\s?)"
DIGITS = r"(?:\d+(?:,\d+)*(?:\.\d+)*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
NUMBER = re.compile(
    # A minus is a sign unless something stands before it that it could be taken from (10-3, 10 -3, (2)-3),
    # and a digit of a name or a unit (H2O, m2, m^2, x_1) is no number.
    rf"(?:(?:(?<![\d)\]%}}]\s)(?<![\w)\]%}}]))[-+]\s?)?(?:(?<![A-Za-z]){CURRENCY}\s?)?(?:(?<=[€£¥₹$\s(])-)?"
    rf"(?<![A-Za-z0-9_.])(?<![A-Za-z]\^)(?<!\d,)(?<!Rs\.){DIGITS}"
    rf"|(?:(?<![\w)\]%}}])[-+]\s?)?(?:USD|EUR|GBP|CHF|JPY|INR|Rs\.?|RM){DIGITS}"
)
# 1/2 and 2 1/2 are one number.
FRACTION = re.compile(
    rf"(?:(?P<whole>{NUMBER.pattern})(?:\s+|\s+and\s+))?(?P<over>{NUMBER.pattern})\s?/\s?(?P<under>\d+(?:,\d+)*(?![\d.,]*[\w(/]))"
)
GROUPED = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}")
SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?:(?:\\[,; !]|[\u00a0\u2009\u202f\u2007'’_]|\{,\}|,\\!\s?)\d{3})+)(?!\d)")
LOOSE = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d.,]*\d)")
SPACES = re.compile(r"\s{2,}")
VULGAR = {sign: unicodedata.normalize("NFKC", sign).replace("⁄", "/") for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"}
SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
          "lakh": 10**5, "crore": 10**7, "bn": 10**9, "mn": 10**6}  # fmt: skip

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
TENS = ("thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: value for value, word in enumerate(ONES)} | {word: 10 * tens for tens, word in enumerate(TENS, start=3)}
PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
         "eighth": 8, "ninth": 9, "tenth": 10}  # fmt: skip
# Units that are glued to their number: 5km is a number, 5x is not.
GLUED = re.compile(
    r"(?:[kcmdn]?m[lgs]?|[kKMGT]?(?:B|Hz|Wh)|km/h|mph|kph|[kcm]?[glL]|h|s|hrs?|mins?|secs?|days?|ft|in|yd|mi|lbs?|oz|kcal|cal|"
    r"k?Pa|k[JNWV]|st|nd|rd|th|AM|PM|am|pm|ha|kg|deg|dollars?|cents?|x (?:as|more|faster))(?![\w(^])"
    r"|(?:[kcmd]?m|ft|in|yd|mi)\^\{?[23]\}?(?!\w)"
)
# Units of measure: two that differ make two numbers differ.
MEASURES = {
    name: kind
    for kind, names in {
        "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
        "km": "km kilometer kilometre", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
        "nm": "nm nanometer", "mg": "mg milligram", "g": "g gram", "kg": "kg kilogram kilo", "oz": "oz ounce",
        "lb": "lb lbs pound", "ton": "ton tonne", "ml": "ml mL milliliter millilitre", "l": "l L liter litre",
        "ms": "ms millisecond", "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day",
        "week": "week", "month": "month", "year": "year yr", "cent": "cent", "dollar": "dollar usd USD", "yen": "yen",
        "euro": "euro eur EUR", "am": "AM am", "pm": "PM pm", "degree C": "C celsius", "degree F": "F fahrenheit",
        "B": "B byte", "kB": "kB KB", "MB": "MB", "GB": "GB", "TB": "TB", "mV": "mV", "V": "V volt", "kV": "kV",
        "mA": "mA", "A": "A ampere amp", "W": "W watt", "kW": "kW", "MW": "MW", "Hz": "Hz hertz", "kHz": "kHz",
        "MHz": "MHz", "GHz": "GHz", "J": "J joule", "kJ": "kJ", "N": "N newton", "kN": "kN", "Pa": "Pa", "kPa": "kPa",
        "K": "K kelvin",
    }.items()
    for name in names.split()
}  # fmt: skip
SIGNS = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "¢": "cent"}
# What makes another number of the one before it: 7 tenths, 18 dozen, 7万.
SCALED = re.compile(
    r"[\s-]?(?:(?:half|halves|halved|thirds?|fourths|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?"
    r"|millionths?|billionths?|dozens?|gross|score|quadrillions?|quintillions?|myriads?|mio|mrd|mln|millones|millionen|milliarden|tausend|mil"
    r"|ppm|ppb|bps|basis\s+points?|per\s+(?:mille?|thousand)|permille|pi|squared|cubed|factorial|doubled|tripled"
    r"|point\s+(?:\d|zero|one|two|three|four|five|six|seven|eight|nine)|тыс\w*|млн|млрд|миллион\w*)(?![^\W_])|[‰‱₀-₉万億亿百千兆萬만억천백π])",
    re.IGNORECASE,
)


class Number(NamedTuple):
    """A value; whether a percent sign follows; its unit of measure or ""; its digits after the point, and in all."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    decimals: int = 0
    digits: int = 0


def without_latex(text: str) -> str:
    r"""A text without the LaTeX that only dresses a number: \$, \%, {,}, \text{}, \frac12, ^\circ, \( and \)."""
    if "\\" in text:
        text = re.sub(r"\\(?:text|mathrm|mbox)\s?\{([^{}]*[A-Za-z])\s?\}\s?\^\s?(?:(\d)|\{(\d)\})", r" \1^\2\3 ", text)
        text = re.sub(
            r"\\(?:text|mathrm|textbf|mbox|textrm|mathbf|textit|operatorname)\s{0,3}\{([^{}]*)\}", r" \1 ", text
        )
        text = SPACED.sub(lambda match: re.sub(r"[^\d]", "", match[1]), text)
        text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:| |quad|qquad|big|Big)(?![a-zA-Z])", " ", text)
        text = REPEATING.sub(_as_fraction, text) if "\\overline" in text else text
        text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
        text = re.sub(r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}", text)
        text = re.sub(r"\\frac\s?(?:\{(-?[\d.]+)\}|(\d))\s?(?:\{([\d.]+)\}|(\d))", _as_slash, text)
        text = re.sub(r"\s?\^\s?\{?\s?\\(?:circ|degree)\s?\}?|\\degree", "", text)
        text = re.sub(r"\\(?:times|cdot)(?![a-zA-Z])", "×", text).replace("\\approx", "≈")
        text = text.replace("\\$", "$").replace("\\%", "%")
        text = re.sub(r"\\[()\[\]]", " ", text)
    if not text.isascii():
        text = SPACED.sub(lambda match: re.sub(r"[^\d]", "", match[1]), text)
        if any(sign in text for sign in VULGAR):
            text = "".join(f" {VULGAR[sign]}" if sign in VULGAR else sign for sign in text)
        text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match[0].translate(SUPERSCRIPT), text)
        text = text.replace("−", "-").replace("–", "-").replace("°", "").replace("\u00a0", " ").replace("\u202f", " ")
    elif "'" in text or "_" in text:
        text = SPACED.sub(lambda match: re.sub(r"[^\d]", "", match[1]), text)
    text = text.replace("{,}", ",").strip()
    # One space where there are several: patterns that try each of many places take for ever.
    return SPACES.sub(lambda match: "\n" if "\n" in match[0] else " ", text) if SPACES.search(text) else text


REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\s?\{(\d{1,20})\}")


def _as_fraction(match: re.Match) -> str:
    r"""0.1\overline{6} as 1/6."""
    whole, once, again = match.groups()
    value = Fraction(f"{whole or 0}.{once or 0}") + Fraction(int(again), 10 ** len(once) * (10 ** len(again) - 1))
    return f" {value.numerator}/{value.denominator}"


def _as_slash(match: re.Match) -> str:
    return f" {match[1] or match[2]}/{match[3] or match[4]}"


def _value(token: str) -> Fraction | None:
    """The value of one number as NUMBER finds it; None where its commas or points are no thousands' separators."""
    if len(token) > LONGEST_NUMBER:
        return None
    begin = re.search(r"\.?\d", token)
    assert begin is not None
    sign = -1 if "-" in token[: begin.start()] else 1
    token = token[begin.start() :]
    mantissa = re.split(r"[eE]", token)[0]
    whole = mantissa.split(".")[0]
    if "," in whole and not GROUPED.fullmatch(whole):
        return None
    if mantissa.count(".") > 1:
        if not re.fullmatch(r"\d{1,3}(?:\.\d{3})+", mantissa):
            return None
        token = token.replace(".", "")
    try:
        return sign * Fraction(token.replace(",", ""))
    except ValueError:
        return None


def in_words(text: str) -> Fraction | None:
    """The number that a text begins with in words (twenty-one apples, two thirds, a dozen), with at most two more."""
    words = re.findall(r"[a-z]+", text[:200].casefold())
    if not words or re.search(r"\d", text):
        return None
    sign = 1
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    total, part, at, known = Fraction(0), 0, 0, False
    while at < len(words):
        word = words[at]
        if word in WORDS:
            value = WORDS[word]
            # "two three" is a list, "twenty three" one number.
            if known and part % 100 and not (part % 100 >= 20 and part % 10 == 0 and 0 < value < 10):
                return None
            part, known = part + value, True
        elif word in ("a", "an") and not known and at + 1 < len(words) and words[at + 1] in (*SCALES, *PARTS, "dozen"):
            part, known = 1, True
        elif word == "dozen" and known:
            part = part * 12
        elif word in SCALES and known and word.isalpha() and len(word) > 2:
            scale = SCALES[word]
            part = part * scale if scale == 100 else part
            total, part = (total, part) if scale == 100 else (total + part * scale, 0)
        elif (
            word == "and"
            and known
            and at + 1 < len(words)
            and (words[at + 1] in WORDS or words[at + 1] in ("a", "half"))
        ):
            pass
        else:
            break
        at += 1
    rest = words[at:]
    single = rest[0].removesuffix("s") if rest else ""
    if rest and (rest[0] == "point" or (single not in PARTS and rest[0] not in PARTS and SCALED.match(" ".join(rest)))):
        return None
    if not known:
        return Fraction(sign, 2) if rest[:1] == ["half"] and len(rest) <= 3 else None
    if len(rest) in (2, 3, 4) and words[at - 1] == "and" and rest[0] == "a" and rest[1] in PARTS:
        return sign * (total + part + Fraction(1, PARTS[rest[1]]))
    single = rest[0].removesuffix("s") if rest else ""
    if single in PARTS or (rest and rest[0] in PARTS):
        over = PARTS.get(rest[0]) or PARTS[single]
        return sign * Fraction(total + part, over) if len(rest) <= 4 and (total + part) else None
    if len(rest) > 2 or any(word in WORDS or word in ("or", "and", "not") for word in rest):
        return None
    return sign * (total + part)


class _Match(NamedTuple):
    number: Number
    start: int
    end: int
    joined: bool


# 3 times 5, log 5 and COVID-19 are no 5 and no 19.
WORKED = re.compile(
    r"\b(?:log|ln|sin|cos|tan|sqrt|mod|choose|times|plus|divided by|twice|double|triple|half|"
    r"(?:log|percent|half|thirds?|quarters?|square|cube|root|sum|product|power|multiple) of)\s*$|%\s?of\s*$"
    r"|(?:\d|\bone)(?:\s[a-z]+)?\sof\s(?:the\s)?$|[A-Za-z]-$",
    re.IGNORECASE,
)


def _at(text: str, match: re.Match) -> _Match | None:
    """The number at a match of NUMBER or FRACTION with what belongs to it: × 10^n, a scale, a percent sign, a unit."""
    groups = match.groupdict()
    if "under" in groups:
        whole, over, under = (_value(groups[name] or "0") for name in ("whole", "over", "under"))
        if whole is None or over is None or not under:
            return None
        negative = (groups["whole"] or "").strip().startswith("-")
        # 12/2 has not been worked out, and 2 1/2 has a whole number before it.
        if (over / under).denominator == 1 or (groups["whole"] and (whole.denominator != 1 or over < 0)):
            return None
        value, decimals, digits = whole + (-over if negative else over) / under, 0, 0
    else:
        read = _value(match[0])
        if read is None:
            return None
        value = read
        mantissa = re.split(r"[eE](?=[-+\d])", match[0])[0]
        decimals = len(mantissa.split(".")[1]) if mantissa.count(".") == 1 else 0
        # Those of the value: 8.1e-18 has nineteen.
        exponent = int(match[0][len(mantissa) + 1 :] or 0)
        decimals = max(decimals - exponent, 0)
        digits = len(re.sub(r"\D", "", mantissa).lstrip("0"))
    start, end = match.start(), match.end()
    power = re.match(r"\s?(?:×|x|\*|·)\s?10\s?(?:\^|\*\*)\s?[{(]?\s?([-+]?\d{1,3})\s?[})]?(?!\d)", text[end : end + 30])
    ten = re.match(r"\s?\^\s?[{(]?\s?([-+]?\d{1,3})\s?[})]?(?![\d.])", text[end : end + 20])
    if power:
        value, end = value * Fraction(10) ** int(power[1]), end + power.end()
        decimals = max(decimals - int(power[1]), 0)
    elif ten and value == 10:
        value, end = Fraction(10) ** int(ten[1]), end + ten.end()
    scale = re.match(r"\s?(hundred|thousand|million|billion|trillion|lakh|crore|bn|mn)s?\b", text[end : end + 12], re.I)
    if scale:
        value, end = value * SCALES[scale[1].lower()], end + scale.end()
    elif (
        text[end : end + 1] in ("k", "K", "M", "m", "B", "b")
        and re.search(r"[$€£]", match[0])
        and not text[end + 1 : end + 2].isalnum()
    ):
        value, end = value * {"k": 10**3, "m": 10**6, "b": 10**9}[text[end].lower()], end + 1
    before, after = text[:start], text[end : end + 40]
    glued = re.match(r"[A-Za-z_]", after) and not GLUED.match(after)
    joined = (
        re.search(
            r"(?:[\d)}]|(?<![A-Za-z])[A-Za-z]|\\[a-zA-Z]{2,20})\s*(?:[-+*/×÷^·]|\*\*)\s*[$€£({]*\s*$", before[-40:]
        )
        or re.match(r"\s*(?:[/×÷^·]\s*[\d(]|\*+\s*[\w(]|[+-]\s*[$€£]?[\d(\\]|[-+]\s*[a-zA-Z](?![a-zA-Z']))", after)
        or WORKED.search(before[-20:])
        or re.match(
            r"\s(?:mod|choose|times|plus|minus|over|divided by|(?:more|less|fewer|greater) than)\s+[$€£]?[\d(]"
            r"|\s(?:squared|cubed|factorial)\b",
            after,
        )
        # 3:30, 2020-01-05, f(5), 0x12, 5_2 and 1.2.3 are no numbers either.
        or re.search(r"\d\s*[:,]$|[\w]\($|\\[a-zA-Z]+\s*[({]?$|\{\s*$|[_^][{(]?$", before[-12:])
        or re.match(r":\d|,\d|_\{?\w|\.\d|!(?=\s*[=)])|\s?\\(?:sqrt|pi|frac|log|sin|cos|tan|ln)|\s?[πi√](?!\w)", after)
        or glued
        or SCALED.match(after)
        # 7(x + 3), (a, 0), (0, a)
        or after.startswith("(")
        or re.search(r"\([^()]{0,30},\s*$", before[-40:])
        or (re.search(r"\(\s*$", before[-4:]) and re.match(r"\s*,[^()]{1,30}\)", after))
    )
    percent = re.match(r"\s*(?:%|percent|pct\b)", after, re.I)
    return _Match(Number(value, bool(percent), _unit(match[0], after), decimals, digits), start, end, bool(joined))


def _unit(token: str, after: str) -> str:
    """The unit of measure that stands behind a number, with its power, or its currency; "" for none that is known."""
    if "$" in token and after.startswith("$"):
        # A formula's dollars: $5$ cm.
        token, after = "", after[1:]
    word = re.match(r"\s?(square\s|cubic\s|sq\.?\s)?\s?([A-Za-z]+|[$€£¥¢])(?:\^\{?([23])\}?)?", after)
    if word is None:
        return next((SIGNS[sign] for sign in token if sign in SIGNS), "")
    name = word[2]
    unit = SIGNS.get(name) or MEASURES.get(name) or MEASURES.get(name.lower() if len(name) > 3 else "") or ""
    unit = unit or (MEASURES.get(name.lower().removesuffix("s"), "") if len(name) > 2 else "")
    power = word[3] or {"s": "2", "c": "3"}.get((word[1] or "")[:1], "")
    if not unit:
        return next((SIGNS[sign] for sign in token if sign in SIGNS), "")
    return f"{unit}^{power}" if power else unit


# Between numbers of which neither is the answer: 5 or 6, 5 and 6, 5, 6, 5 to 7, 5 apples and 3 pears.
LINKED = re.compile(
    r"\s*(?:[$%€£]|\\?%)?\s*(?:[a-zA-Z]+(?:\s+|(?=[,;])))?(?:,|;|\band\b|\bor\b|\bto\b|&|\|\||~|\bvs\.?)\s*"
    r"(?:(?:and|or|maybe|perhaps|possibly|even)\s+){0,2}[$€£(]*\s*",
    re.IGNORECASE,
)
OR = re.compile(r"\bor\b|/", re.IGNORECASE)
# 5 or more, 5 or so
OPEN = re.compile(
    r"\s*(?:[a-zA-Z]+\s+)?or\s+(?:more|less|fewer|so|higher|lower|above|below|over|under)\b", re.IGNORECASE
)
HALVES = re.compile(r"(?<=\d)\s+and\s+(a|one|two|three)[\s-](half|third|quarter|fourth)s?\b", re.IGNORECASE)


def _spelled(text: str) -> str:
    """5 and a half as 5 1/2."""
    counts, parts = {"a": 1, "one": 1, "two": 2, "three": 3}, PARTS
    return (
        HALVES.sub(lambda match: f" {counts[match[1].lower()]}/{parts[match[2].lower()]}", text)
        if " and " in text
        else text
    )


DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\bno longer|\bcannot be|\bneither|\bnor|\bbut|\bexcept"
    r"|\b(?:other|more|less|fewer|greater) than)\s+(?:[a-z]+\s+){0,3}[$€£]?\s?$",
    re.IGNORECASE,
)
COMPARED = re.compile(r"(?:[<>≤≥≠±≢]|!=|\\(?:leq?|geq?|neq?|pm|mp|lt|gt)(?![a-z])|\+/-)\s*=?\s*[$€£(]*\s*$")
# At least 18 is a bound, and what stands after "the wrong answer" is none.
BOUND = re.compile(
    r"(?:\b(?:at least|at most|at minimum|at maximum|up to|under|over|below|above|beyond|(?:maximum|minimum) of"
    r"|(?:more|less|fewer|greater|higher|lower|larger|smaller|bigger) than)\s+(?:[a-z]+\s+)?[$€£(]*"
    r"|\b(?:wrong|incorrect)(?:[ _]answer)?\W{0,5}(?:is\s+)?)$",
    re.IGNORECASE,
)
REFUTED = re.compile(
    r"\s*(?:[a-z]+\s+)?(?:(?:is|are|was|were)\s+(?:not|wrong|incorrect|false)\b|(?:isn|wasn|aren|weren)['’]t\b)",
    re.IGNORECASE,
)
COMPARED_AFTER = re.compile(r"\s*(?:[<>≤≥≠±]|\\(?:leq?|geq?|neq?|pm|mp|lt|gt)(?![a-z])|\+/-)")
LABEL = re.compile(r"(?:[A-Za-z](?:_\{?\w{1,3}\}?)?|[A-Za-z]\([a-z0-9]\))\s*=\s*")


# 2x + 3 and x + y are the sides of an equation; x and 5*4 have been worked out.
EQUATION = re.compile(
    r"(?:\d\s?[a-zA-Z]|\b[a-zA-Z]\s?\^\s?\{?\d+\}?|[-+*/]\s*[a-zA-Z]|(?<![A-Za-z])[a-zA-Z]\s*[-+*/]\s*\(?\w+\)?)\s*$"
    r"|(?<![A-Za-z])[a-zA-Z]\s*[-+*/]\s*[\w\s+*/().^-]{1,40}$|\d[a-zA-Z]\s*[-+][\w\s+*/().^-]{1,40}$"
)


# x = 5, y = 6
SEVERAL = re.compile(r"\d[^\d]{0,20}(?:,|;|\band\b)\s*[A-Za-z]\s*$")


def numbers_in(text: str) -> list[_Match]:
    """The numbers in a line, from left to right."""
    found: list[_Match] = []
    at = 0
    while at < len(text):
        match = NUMBER.search(text, at)
        if match is None:
            break
        # A fraction with a whole number before it begins where that does.
        longer = FRACTION.match(text, match.start())
        read = _at(text, longer) if longer else None
        read = read or _at(text, match)
        if longer and read and read.end < longer.end():
            read = read._replace(joined=True)
        if read is None:
            read = _Match(Number(Fraction(0)), match.start(), match.end(), True)
        found.append(read)
        at = max(read.end, match.end())
    return found


def read_number(text: str, first: bool = False) -> Number | None:
    """The number that a line ends in, or where `first` begins with; what follows the last "=" if a number does.

    None where there is none, where it is part of a sum that has not been worked out (5 + 2, 12/2), one of several that
    are offered (5 or 6), denied (not 5) or a bound (x > 5).
    """
    if len(text) > LONGEST_LINE:
        text = text[-LONGEST_LINE:].partition(" ")[2]
    text = _spelled(without_latex(text))
    if "\\begin" in text or "\\infty" in text or "∞" in text:
        return None
    # 18 eggs (9 * 2): how it was worked out.
    worked = SHOWN.search(text)
    if worked and re.search(r"\d", text[: worked.start()]):
        text = text[: worked.start()]
    loose = LOOSE.search(text)
    if loose and len(text) - len(loose[0]) < 30 and not re.search(r"\d", text[: loose.start()] + text[loose.end() :]):
        text = text[: loose.start()] + loose[0].replace(" ", "") + text[loose.end() :]
    text = re.sub(r"\b(?:minus|negative) (?=[$€£]?[\d.])", "-", text)
    *left, after = re.split(r"(?<![<>!])[=≈]", text)
    if left and re.search(r"\d", after):
        if EQUATION.search(left[-1][-60:]) or (len(left) > 1 and SEVERAL.search(left[-1][-60:])):
            return None
        # 3 + 4 = 7: the left side is not part of what is found.
        text, first = after, True
    numbers = numbers_in(text)
    if not numbers:
        value = in_words(text)
        return Number(value) if value is not None else None
    begins = re.match(r"[\s$€£(+-]*(?:(?:only|about|exactly|approximately|just|around|roughly|a total of)\s+)?", text)
    leading = first and numbers[0].start <= (begins.end() if begins else 0)
    index = 0 if leading else len(numbers) - 1
    chosen = numbers[index]
    before, behind = text[: chosen.start], text[chosen.end :]
    if (
        chosen.joined
        or DENIED.search(before[-60:])
        or COMPARED.search(before[-12:])
        or COMPARED_AFTER.match(behind[:8])
        or BOUND.search(before[-40:])
        or OPEN.match(behind[:40])
        or REFUTED.match(behind[:40])
    ):
        return None
    units = index and numbers[index - 1].number.unit
    beside = [(numbers[index - 1], chosen)] if index else []
    beside += [(chosen, numbers[index + 1])] if index + 1 < len(numbers) else []
    for one, other in beside:
        between = text[one.end : other.start]
        # 3/4, or 0.75: the same twice is one answer.
        if one.number.value == other.number.value and not one.joined and not other.joined:
            continue
        # 5 ft 6 in: one length in two numbers.
        if units and between.strip().isalpha():
            return None
        if len(between) <= 40 and (LINKED.fullmatch(between) or not between.strip() or OR.search(between)):
            return None
    if WORD_BEFORE.search(before[-30:]) or WORD_AFTER.match(behind[:40]):
        return None
    return chosen.number


SHOWN = re.compile(r"(?<=[a-zA-Z])\s\((?:\s|[\d.,$+*/×÷-]){3,40}\)\s*\.?$")
# five or 6, 5 or six
NAMES = "|".join(WORDS)
WORD_BEFORE = re.compile(rf"\b(?:{NAMES})\s+(?:or|to)\s*$", re.IGNORECASE)
WORD_AFTER = re.compile(rf"\s*(?:[a-z]+\s+)?(?:or|to)\s+(?:{NAMES})\b", re.IGNORECASE)


# A word of two letters or more, one letter that stands for a unit, or a letter of another alphabet; x is no unit.
UNIT = (
    r"(?:°?(?:(?!(?:and|or|to|plus|minus|than|not|but|half|mod|choose|squared|cubed|factorial|of)\b)[^\W\d_]{2,}+(?:[-/'’][^\W\d_]++)*+|[mghslLCFKNJWVA](?:/[a-z]{1,3})?(?![^\W\d_])|an?\s(?=[^\W\d_]{2})"
    r"|[^\W\d_a-zA-Z])(?:\^\{?-?\d\}?|[²³])?\.?|°)"
)
WHOLE = re.compile(
    rf"(?:{LABEL.pattern})?[(]?(?:{CURRENCY})?\s*(?:{FRACTION.pattern}|{NUMBER.pattern})"
    r"(?:\s?(?:×|x|\*)\s?10\s?(?:\^|\*\*)\s?[{(]?-?\d{1,3}[})]?|\^\{?-?\d{1,3}\}?)?[)]?"
    rf"\s*[$€£¥₹%¢]?\s*(?:{UNIT}\s*){{0,3}}"
)


def whole_number(text: str) -> Number | None:
    """The number that the whole of a text is, with at most a name, a currency, a percent sign and a unit around it."""
    text = _spelled(without_latex(text[: LONGEST_LINE + 1])).strip().rstrip(" .").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip().rstrip(" .")
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text)
    text = re.sub(r"^(?:minus|negative) (?=[$€£]?[\d.])", "-", text, flags=re.IGNORECASE)
    if len(text) > LONGEST_LINE:
        return None
    if LOOSE.fullmatch(text):
        text = text.replace(" ", "")
    if WHOLE.fullmatch(text) is None:
        value = in_words(text) if len(text) < 60 else None
        return None if value is None else Number(value)
    return read_number(text, first=True)


DECIMAL_COMMA = re.compile(
    r"[$€£]?\s?((?<![\w,.])[-+]?)\s?((?<![\w,.])\d{1,3}(?:[. ]\d{3})+|(?<![\w,.])\d+),(\d+)(?!,?\d)"
    r"\s*(?:[$€£%]|[a-zA-Z°]{1,12})?\.?"
)


def with_decimal_comma(text: str, within: bool = False) -> Number | None:
    """The number that a text is, or `within` ends in, where its comma is the decimal sign (3,14; 1.234,50); None for
    1,234."""
    text = without_latex(text[-100:]).strip()
    match = DECIMAL_COMMA.fullmatch(text)
    if within:
        match = next(
            (one for one in DECIMAL_COMMA.finditer(text) if re.fullmatch(r"(?:\s[^\d]*)?", text[one.end() :])), None
        )
    if match is None or (len(match[3]) == 3 and len(match[2]) <= 3 and match[2] != "0"):
        return None
    whole = re.sub(r"\D", "", match[2])
    return Number(Fraction(f"{match[1]}{whole}.{match[3]}"), "%" in match[0], "", len(match[3]), len(whole + match[3]))


SIDE = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?")
SIDE_BEFORE = re.compile(rf"(?:^|\b(?:is|so|thus|hence|therefore|get|have),?:?\s)\s?({SIDE.pattern})$", re.IGNORECASE)


def contradicts_itself(text: str) -> bool:
    """True for 17 = 18, and for 17 ≈ 18: a number that is another's rounding in neither direction."""
    text = without_latex(text[-LONGEST_LINE:])
    if re.match(r"[\s$]*[A-Za-z]\s*=", text):
        # x = 7 = 11: the value of a name is what its chain ends in.
        return False
    parts = re.split(r"(?<![<>!=])([=≈])", text)
    for at in range(1, len(parts) - 1, 2):
        before, right = parts[at - 1].strip(" $"), parts[at + 1].strip(" $.")
        left = SIDE_BEFORE.search(before)
        if parts[at] == "≈":
            one, other = whole_number(left[1] if left else before), whole_number(right)
        else:
            # With units or signs 2 hours = 120 minutes.
            plain = left and SIDE.fullmatch(right)
            one, other = (read_number(left[1]), read_number(right)) if left and plain else (None, None)
        if one is None or other is None or one.value == other.value or one.unit != other.unit:
            continue
        if not any(
            (rounded.value * 10**rounded.decimals).denominator == 1
            and is_rounding(rounded, exact.value, cut=parts[at] == "=")
            for rounded, exact in ((one, other), (other, one))
        ):
            return True
    return False


def equal(given: Number, gold: Number) -> bool:
    """True where two numbers have the same value; 50 % is both 50 and 0.5."""
    if given.unit and gold.unit and given.unit != gold.unit:
        return False
    values = [gold.value]
    if gold.percent != given.percent:
        values.append(gold.value / 100 if gold.percent else gold.value * 100)
    return any(value == given.value or _rounded(value, gold, given) for value in values)


def is_rounding(rounded: Number, exact: Fraction, cut: bool = True) -> bool:
    """True where a number is an exact one to as many decimals as it has, rounded or, with `cut`, cut off."""
    short, unit = abs(exact) - abs(rounded.value), Fraction(1, 10**rounded.decimals)
    # What a float of the exact value may be wrong by.
    bit = abs(exact) / 10**15
    return exact * rounded.value >= 0 and (-unit / 2 - bit <= short <= unit / 2 + bit or (cut and 0 <= short < unit))


def _rounded(value: Fraction, gold: Number, given: Number) -> bool:
    """True for a fraction whose decimals do not end and six or more of its digits, and for two floats' last bits."""
    if not gold.decimals and not given.decimals:
        return False
    size = max(abs(value), abs(given.value))
    distance = abs(value - given.value)
    if (
        size
        and distance <= size / 10**14
        and min(gold.decimals, given.decimals)
        and max(gold.digits, given.digits) >= 15
    ):
        return True
    for exact, rounded in ((value, given), (given.value, gold)):
        endless = 10**20 % exact.denominator != 0 if exact.denominator < 10**20 else False
        if endless and rounded.decimals and rounded.digits >= 6 and is_rounding(rounded, exact):
            return True
    return False
