r"""Where a text states its final answer.

A thought comes first and does not count: what stands after the last </think> is read, and a thought that is never
closed holds no answer. In what remains an <answer> tag wins, else the last of `\boxed{}`, `#### ...` and "answer is
...", else the last line. Only the end of a very long text is looked at, by patterns that take linear time.
"""

import html
import json
import re
from dataclasses import dataclass

from .numbers import COMPARED, DENIED, WORKED

# How much of a text's end is read: some 2,500 tokens, after the thought.
TAIL = 10_000

ANSWER_TAG = re.compile(r"<answer>", re.IGNORECASE)
ANSWER_END = re.compile(r"</answer>", re.IGNORECASE)
HASHES = re.compile(r"####(?!#)[ \t]*(?P<answer>[^\n]*)")
STATED = re.compile(
    r"\b(?:answer|(?:correct|right|best)[ \t]+(?:option|choice))(?:[ \t]+is\b|[ \t]*[:=]|[ \t]+[-–—][ \t])[ \t]*:?"
    # A heading in any depth: "### Final Answer" on a line of its own.
    r"|^[ \t]*(?:#{1,6}[ \t]*)(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*$"
    r"|^[ \t]*(?:the[ \t]+)?final[ \t]+answer[ \t]*$"
    r"|答案(?:是|为|：|:)",
    re.IGNORECASE | re.MULTILINE,
)
# The wrong answer is stated too.
WRONGLY = re.compile(r"\b(?:wrong|incorrect|false|bad)\s+$", re.IGNORECASE)
# A text without any of these states nothing.
STATING = ("nswer", "NSWER", "ption", "hoice", "答案")
BOXED = re.compile(r"\\(?:f?boxed|fbox)\s{0,3}\{")
# LaTeX takes one letter or number without braces.
BARE_BOX = re.compile(r"\\(boxed|fbox)(?:[ \t]+(?=[^\s${}\\])|(?=\d))([^\s${}\\]{1,60})")
# Of a JSON object: what follows is read by a JSON decoder.
KEY = re.compile(r'"(?:final[_ ]?)?answer"\s{0,9}:\s{0,9}', re.IGNORECASE)

# What opens and closes a thought, in lower case.
THOUGHTS = [
    *(
        (f"<{name}>", f"</{name}>")
        for name in ("think", "thinking", "thought", "reasoning", "reflection", "scratchpad")
    ),
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]
# A text without any of these has no thought.
THINKING = ("hink", "HINK", "hought", "HOUGHT", "easoning", "EASONING", "eflection", "cratchpad")


def spoken(text: str) -> str:
    """What a text says once it has thought; "" where its thought is left open."""
    if not any(word in text for word in THINKING):
        return text
    lower = text.lower()
    if len(lower) != len(text):
        # A letter that is two in lower case: the tags are found as they are mostly written.
        lower = text
    # str.rfind takes no time over a million characters, a pattern does.
    closed = max((lower.rfind(end) + len(end) if end in lower else 0) for _, end in THOUGHTS)
    opened = max(lower.rfind(begin) for begin, _ in THOUGHTS)
    if opened < closed or opened < 0:
        return text[closed:]
    # The paper's format: <answer> ends a <reasoning> that nothing else does.
    answer = lower.find("<answer>", opened) if lower.startswith("<reasoning>", opened) else -1
    return "" if answer < 0 else text[answer:]


# Markdown

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
PROSE = {"", "json", "text", "txt", "plaintext", "plain", "md", "markdown", "latex", "tex", "math", "answer", "output"}
CODE = re.compile(r"`([^`\n]+)`")
# ** and * around words: not between the parts of 2**3, 2*x or 3 * 4.
STRONG = re.compile(r"(?<![\w*)\]])\*\*(?=[^\s*])((?:[^*\n]|\*(?!\*))+)(?<!\s)\*\*(?![\w*(])")
BOTH = re.compile(r"(?<![\w*)\]])\*\*\*(?=[^\s*])([^*\n]+)(?<!\s)\*\*\*(?![\w*(])")
BULLET = re.compile(r"^[ \t]*\*[ \t]+", re.MULTILINE)
EMPHASIS = re.compile(r"(?<![\w*)\]])\*(?=[^\s*])([^*\n]+)(?<!\s)\*(?![\w*(])")
UNDERLINED = re.compile(r"(?<![\w\\])(__?)(?=[^\s_])([^_\n]+)(?<!\s)\1(?!\w)")
STRUCK = re.compile(r"~~([^~\n]+)~~")
WHOLLY = re.compile(r"(\*\*|__)(?=[^\s*_])([^\n]+?)(?<![\s*_])\1([.:]?)")


def without_markdown(text: str) -> str:
    """A text without bold, italics and code; what is struck out, and programs, go as a whole."""
    whole = text.strip()
    if "\n" in whole and whole.startswith("**") and whole.endswith("**") and whole.count("**") == 2:
        text = whole[2:-2]
    if "~~" in text:
        text = STRUCK.sub("", text)
    if "`" in text:
        text = FENCE.sub(lambda match: match[2] if match[1].lower() in PROSE else "", text)
        text = CODE.sub(r"\1", text)
    if "*" in text:
        if "**" in text:
            text = "\n".join(_unwrapped(line) if line.lstrip()[:2] == "**" else line for line in text.split("\n"))
        text = BULLET.sub("", text)
        if "***" in text:
            text = BOTH.sub(r"\1", text)
        if "**" in text:
            text = STRONG.sub(r"\1", text)
        text = EMPHASIS.sub(r"\1", text)
    if "_" in text:
        text = UNDERLINED.sub(r"\2", text)
    return text


def _unwrapped(line: str) -> str:
    """A line that is bold as a whole, whatever stars are in it."""
    match = WHOLLY.fullmatch(line.strip())
    # **A** or **B** is two bold words, **2*x**3** one bold power.
    powers = match and match[2].count("**") == len(re.findall(r"(?<=[\w)\]])\*\*(?=[\w(\[-])", match[2]))
    return match[2] + match[3] if match and powers else line


# Characters that mean what ASCII's do

PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
PLAIN |= {ord(dash): "-" for dash in "−‒–﹣－"} | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
PLAIN |= {ord(slash): "/" for slash in "∕⁄"} | {0x3000: " ", ord("∗"): "*", ord("∙"): "·", ord("⋅"): "·"}
PLAIN |= {ord("。"): ". "}
ENTITY = re.compile(r"&(?:[lg][te]|ne|amp|nbsp|minus|plusmn);")


def plain(text: str) -> str:
    """A text with ASCII's digits, signs and minus, and without invisible characters."""
    if "&" in text:
        text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return text if text.isascii() else text.translate(PLAIN)


# The answer

# n! ends no sentence.
SENTENCE = re.compile(r"(?<!\\)(?:[.?;]|(?<!(?<![^\W\d_])[a-z])(?<!\))!)(?=\s|$)")
# What explains an answer and does not belong to it.
EXPLAINS = re.compile(
    r",\s+(?:which|that|because|since|as|so|when|after|where|who|with|not|given|for|meaning|making|the|a|an|thus|hence"
    r"|therefore|i\.e\.)\b|\s(?:because|since)\b"
)
# Between boxes that belong together: \boxed{1} and \boxed{2}, x = \boxed{1}, y = \boxed{2}.
BETWEEN = re.compile(
    r"(?:\\[()\[\],;! ]|[\s$,;.&(){}])*(?:[a-z]{1,12}\s+(?=and\b|or\b|\\text))?"
    r"(?:(?:\\text\s?\{\s*)?(?:for part \(\w\)\s*)?(?:and|or)\b\s*\}?|\\q?quad|\\[()\[\],;! ]|[\s$,;.&(){}]"
    r"|[a-zA-Z](?:_\{?\w{1,3}\}?)?\s*=)*"
)
PERCENT = re.compile(r"\s*+(?:\$\s*+)?(\\?%|percent\b|pct\b)")
# Around a box that is not the whole answer: -\boxed{5}, 2\boxed{5}, not \boxed{5}, \boxed{5} or 6, \boxed{5} million.
NEGATIVE_BOX = re.compile(r"(?:(?:^|(?<=[\s=(:$]))-\$?|=\s*-\s*|\b(?:minus|negative)\s+\$?)$", re.IGNORECASE)
PART_BEFORE = re.compile(
    r"(?:\d\s?\$?|[\d)}]\s*[-+*/×÷]\s*|\\(?:times|cdot|div)\s*|\b(?:not|never|twice)\s+\$?|n['’]t\s+(?:[a-z]+\s+)?\$?|\bor\s+"
    r"|\b(?:more|less|fewer|greater)\s+than\s+)$",
    re.IGNORECASE,
)
PART_AFTER = re.compile(
    r"\$?(?:\d|\s*[-+*/×÷]\s?\d|\s*\\(?:times|cdot|div)\s?\d|\s+or\s+\$?[-\d]|\s+(?:hundred|thousand|million|billion|trillion|dozen)\b"
    r"|\s+(?:is|was)\s+(?:not|wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
HEDGED = re.compile(r"\s*(?:[oO][rR]\b|\(?[A-Z]\)?[.)]?\s*$)")


@dataclass(frozen=True)
class Found:
    """An answer: how it may be read, longest first, and the sign that marks it ("" for a last line).

    `brief` is what a last line may mean where the answer is no number: its one bold word, last formula, or end.
    """

    readings: tuple[str, ...]
    sign: str
    brief: str = ""

    @property
    def shortest(self) -> str:
        return self.readings[-1]


# What stands beside a word in bold, a formula or a box and says that it is not the whole answer, or not the answer.
SPOILED_BEFORE = re.compile(
    r"(?:(?<!\S)-|(?<=[=(:$])-|(?:\d|[)}%]|(?<![A-Za-z'’])[A-Za-z])\s*-\s*|[\w)}]\s*\+\s*|(?<!\*)(?<=[\w)}]\s)\*\s+|[\w)}]\s*[/^×÷·]\s*"
    r"|\\(?:times|cdot|div)\s*|√|[\d)}]|(?<![A-Za-z])[a-z]"
    r"|\b(?:minus|negative|plus|times|twice|or|nor|than|at least|at most|up to|under|over|below|above|except|avoid)\s+"
    r"|\d\s+to\s+)[$€£(]*$",
    re.IGNORECASE,
)
SPOILED_AFTER = re.compile(
    r"\$?(?:\s*[-+/×÷·]\s?[\d(\\$]|\s*\^(?!\s?\{?\s?\\circ)|\s+\*\s+[\d(]|\d|\s+(?:or|minus|plus|times|hundred|thousand|million|billion|trillion|dozen)\b(?!\s+(?:so|more)\b\s*$)"
    r"|!(?=\s*[=)])|\s+(?:is|are|was|were|would be|must be|seems)\s+(?:not|never|wrong|incorrect|false|too)\b"
    r"|\s+(?:isn|wasn|aren|weren|can)['’]?t\b|\s+(?:cannot|can not)\b)",
    re.IGNORECASE,
)


def _is_spoiled(before: str, after: str) -> bool:
    """True where what stands alone is part of more: -**5**, 6 or **5**, 2 * **5**, not **5**, **5** is wrong."""
    before = before.rpartition("\n")[2][-60:]
    return bool(
        SPOILED_BEFORE.search(before)
        or DENIED.search(before)
        or (COMPARED.search(before) and before.strip() != ">")
        or WORKED.search(before)
        or SPOILED_AFTER.match(after[:40])
    )


def _closing(text: str, start: int) -> int:
    """Where the brace closes that was opened before `start`; the text's end where none does."""
    depth = 1
    for match in re.finditer(r"\\?[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return start + match.start()
    return len(text)


def _last_boxes(text: str) -> tuple[int, str] | None:
    r"""(position, content) of the last \boxed{...}, with those before it that belong to the same answer."""
    opened = [match for match in BOXED.finditer(text)][-12:]
    if not opened:
        return None
    contents: list[str] = []
    begun, last_end = opened[-1].start(), len(text)
    for match in reversed(opened):
        end = _closing(text, match.end())
        if contents and not (end < begun <= end + 80 and BETWEEN.fullmatch(text, end + 1, begun)):
            break
        content = text[match.end() : end].strip()
        if not contents:
            last_end = end + 1
        if content not in contents:
            contents.insert(0, content)
        begun = match.start()
    joined = ", ".join(contents) + ("%" if PERCENT.match(text, last_end) else "")
    before, after = text[max(begun - 60, 0) : begun].rpartition("\n")[2], text[last_end : last_end + 40]
    if joined and NEGATIVE_BOX.search(before):
        joined = f"-({joined})"
    if joined and (PART_BEFORE.search(before) or PART_AFTER.match(after)):
        # 2\boxed{5}, not \boxed{5}, \boxed{5} or 6: no answer stands there.
        joined = f"not {joined}"
    return opened[-1].start(), joined


def _last_hashes(text: str) -> tuple[int, str] | None:
    """(position, content) of the last #### that is no heading over what follows it."""
    for match in reversed(list(HASHES.finditer(text))[-12:]):
        content = match["answer"].strip()
        if content and not (text[match.end() :].strip() and _is_heading(content)):
            return match.start(), content
    return None


def _is_heading(content: str) -> bool:
    """True for "Check", "Step 2: the total" and "2. The total" above more text; not for a value."""
    value = re.sub(r"^[a-zA-Z]\s*=\s*", "", content.rstrip("."))
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+", "", value))
    if re.fullmatch(r"\(?[A-Za-z]\)?|yes|no|true|false", value, re.IGNORECASE):
        return False
    begins = re.match(r"[-+(]?\s*[\d.$€£¥\\({\[]", value)
    return not begins or bool(re.match(r"\d+[.):]\s", content)) or len(words) > 3


def _sentences(text: str) -> list[str]:
    """How a statement may end, longest first: with the text, the paragraph, the line, the sentence, the clause."""
    text = re.sub(r"^[-•]\s+(?=\S)", "", text.strip()) if text.lstrip(" \t:")[:1] == "\n" else text.strip()
    text = text.lstrip(":").strip()
    line = text.split("\n", 1)[0].strip()
    readings = [text, re.split(r"\n\s*\n", text, maxsplit=1)[0].strip(), line]
    end = SENTENCE.search(line)
    sentence = line if end is None or HEDGED.match(line, end.end()) else line[: end.start()]
    clause = EXPLAINS.search(sentence)
    readings += [
        sentence.strip(),
        sentence[: clause.start()].strip() if clause and clause.start() else sentence.strip(),
    ]
    return [reading for index, reading in enumerate(readings) if reading and reading not in readings[:index]]


def _marked(text: str) -> tuple[int, Found] | None:
    r"""The last of \boxed{} and ####."""
    found = []
    if "box" in text:
        text = BARE_BOX.sub(r"\\\1{\2}", text)
    box, hashes = _last_boxes(text) if "box" in text else None, _last_hashes(text) if "####" in text else None
    if box and box[1]:
        # Braces that do not pair: all up to the text's last one.
        rest = text[text.index("{", box[0]) + 1 :].rpartition("}")[0].strip()
        found.append(
            (
                box[0],
                Found(
                    (rest, box[1]) if rest != box[1] and rest and not box[1].startswith(("not ", "-(")) else (box[1],),
                    "boxed",
                ),
            )
        )
    # A line in words does not overrule a box.
    if hashes and not (found and not re.search(r"\d", hashes[1])):
        rest = text[hashes[0] + 4 :].strip()
        found.append((hashes[0], Found((rest, hashes[1]) if rest != hashes[1] else (rest,), "####")))
    return max(found, key=lambda mark: mark[0]) if found else None


def _stated(text: str) -> tuple[int, Found] | None:
    """The last "answer is ..." that has something after it, or the last "answer" of a JSON object."""
    if not any(word in text for word in STATING):
        return None
    keys = list(KEY.finditer(text)) if 'nswer"' in text else []
    if keys:
        return _in_json(text, keys[-1])
    for match in reversed(list(STATED.finditer(text))[-12:]):
        readings = _sentences(text[match.end() :])
        if readings and WRONGLY.search(text[max(match.start() - 20, 0) : match.start()]):
            return match.start(), Found((f"not {readings[-1]}",), "stated")
        if readings:
            return match.start(), Found(tuple(readings), "stated", _formula_first(readings[-1]))
    return None


def _in_json(text: str, key: re.Match[str]) -> tuple[int, Found] | None:
    """(position, value) of a key of a JSON object: a text without its quotes, anything else as it stands."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, key.end())
    except (ValueError, RecursionError):
        return None
    return key.start(), Found((value.strip() if isinstance(value, str) else text[key.end() : end],), "stated")


def _in_tag(text: str) -> str | None:
    """What the last <answer> tag holds, closed or not."""
    opened = list(ANSWER_TAG.finditer(text))
    if not opened:
        return None
    end = ANSWER_END.search(text, opened[-1].end())
    return text[opened[-1].end() : end.start() if end else len(text)].strip()


DIGIT = re.compile(r"\d")
ENDED = re.compile(r"(?<=[.!?$])\s+(?=[A-Z])")
# A dollar before a space or a digit closes nothing: $12 + $6.
SAID = re.compile(r"\b(?:is|are|equals?|was|were)\b:?\s")
FORMULA = re.compile(r"\$(?=\S)([^$\n]*[^\s$])\$(?!\d)|\$([^$\n]*\\[^$\n]*)\$|\\\(([^\n]+?)\\\)|\\\[([^\n]+?)\\\]")


def _last_formula(line: str) -> str:
    """The last formula of a line, with those that a comma, "and" or "or" ties to it; "" where there is none."""
    line = line[-600:]
    formulas = list(FORMULA.finditer(line))
    found, begun = list[str](), 0
    for index in range(len(formulas) - 1, -1, -1):
        if found and not re.fullmatch(
            r"\s*(?:,|;|and|or|,\s*(?:and|or))\s*", line[formulas[index].end() : formulas[index + 1].start()]
        ):
            break
        found.insert(0, next(group for group in formulas[index].groups() if group))
        begun = formulas[index].start()
    if found and _is_spoiled(line[:begun], line[formulas[-1].end() :]):
        return ""
    return ", ".join(found)


HEADING = re.compile(r"^[ \t]*#{1,3}[ \t]+(?=\S)", re.MULTILINE)
# What may follow a formula and is no part of it: a unit, or where it holds.
AFTER_FORMULA = re.compile(
    r"\s+(?!(?:or|and|plus|minus|times|not|over|if|is|are|but|hundred|thousand|million|billion|trillion|dozen|squared|cubed|mod|per|of)\b)"
    r"(?:[a-z]+(?:\s(?:units?|meters?|[a-z]{1,2}|inches|feet))?|for\s(?:all|any|every|each)\s[^,;]{1,40})\s*"
)


def _formula_first(statement: str) -> str:
    r"""$4\pi$ of "$4\pi$ cm"; "" where no formula begins a statement, or more than a unit follows."""
    formula = FORMULA.match(statement)
    if formula and AFTER_FORMULA.fullmatch(statement, formula.end()):
        return next(group for group in formula.groups() if group)
    return ""


BECAUSE = re.compile(r",?(?<!\s)\s+(?:because|since)\b")
# Where a model goes on with another turn.
BEGUN = re.compile(
    r"\A(?:<\|begin_of_text\|>|<s>)?\s*+(?:<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>)\s*"
)
TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end|eom_id)\|>|</s>")


def _last_line(text: str, raw: str) -> Found | None:
    """The last line with a digit in it, or the last one; what alone is bold in it, where that may be the answer."""
    text = HEADING.sub("", text)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    line = next((line for line in reversed(lines) if DIGIT.search(line)), lines[-1]).strip()
    whole = [text.strip(), lines[-1].strip(), line]
    if "####" in text:
        # What looked like a heading may be an answer of several lines.
        whole.insert(0, text.rpartition("####")[2].strip())
    if "." in line or "!" in line or "?" in line:
        sentences = [sentence for sentence in ENDED.split(line) if DIGIT.search(sentence)]
        whole += [sentence.strip() for sentence in sentences[-1:]]
    bold = _only_bold(raw) if "**" in raw else ""
    short = _unexplained(bold or whole[-1])
    formula = _last_formula(whole[-1]) if not bold and ("$" in line or "\\" in line) else ""
    said = SAID.split(_unexplained(lines[-1].strip()))[-1].rstrip(" .")
    said = re.sub(r"(?<=[^\W\d_]{2})!+$", "", said)
    readings = [*whole, *([bold] if bold else []), short]
    return Found(
        tuple(reading for index, reading in enumerate(readings) if reading and reading not in readings[:index]),
        "",
        bold or formula or said,
    )


def _unexplained(line: str) -> str:
    """ "5" of "5 because 2 + 3 = 5": what explains a line's one beginning goes."""
    clause = BECAUSE.search(line)
    if clause and 0 < clause.start() <= 60 and line[: clause.start()].count(" ") < 5:
        return line[: clause.start()]
    return line


def _only_bold(raw: str) -> str:
    """What alone is bold in the line that is read: "So it is **18** in 3 days." """
    lines = [line for line in raw.split("\n") if line.strip()]
    line = next((line for line in reversed(lines) if DIGIT.search(line)), lines[-1])
    bold = list(STRONG.finditer(line))
    if len(bold) != 1 or bold[0][1].endswith(":") or bool(DIGIT.search(bold[0][1])) != bool(DIGIT.search(line)):
        return ""
    if _is_spoiled(line[: bold[0].start()], line[bold[0].end() :]):
        return ""
    return without_markdown(bold[0][1]).strip()


def find(text: str) -> Found | None:
    """The answer in what a text says (`spoken`); None where it states none."""
    text = plain(text[-TAIL:])
    if "<" in text:
        text = TURN.split(BEGUN.sub("", text.strip()), maxsplit=1)[0]
    inner = _in_tag(text) if "<" in text else None
    raw = text if inner is None else inner
    text = without_markdown(raw)
    marked, stated = _marked(text), _stated(text)
    # "The answer is reasonable" does not overrule a number in a box.
    if marked and stated and (stated[0] < marked[0] or not re.search(r"\d", stated[1].shortest)):
        stated = None
    if stated or marked:
        found = (stated or marked)[1]  # pyright: ignore[reportOptionalSubscript]
        return found if inner is None else Found((text.strip(), *found.readings), found.sign, found.brief)
    if inner is not None:
        return Found((text.strip(),), "tag") if text.strip() else None
    return _last_line(text, raw)


def marked_answer(text: str) -> str:
    r"""What a sign for it marks as the answer: an <answer> tag, else the last of #### and \boxed{}; or ""."""
    text = plain(spoken(text)[-TAIL:])
    inner = _in_tag(text) if "<" in text else None
    marked = _marked(without_markdown(text if inner is None else inner))
    if marked:
        return marked[1].shortest
    return (inner or "").strip()


def extract_answer(text: str) -> str:
    r"""The final answer that the text states, as shortly as it can be read.

    An <answer> tag wins; else the last of "#### ...", \boxed{...} and "answer is ..." counts; else the last
    line with a digit in it, or the last line. Nothing in <think> counts.
    """
    found = find(spoken(text))
    return found.shortest if found else ""
