r"""Mathematical expressions, in LaTeX or in plain text, and whether two have the same value.

An expression is read into numbers, letters and operators, and worked out at a few fixed values of its letters: exactly
where it is rational, in floating point with a bound on the rounding error elsewhere. Two expressions are equal where
they agree at all of these points. That is decided in about a millisecond, in any thread and alike on any machine;
sympy's simplification knows more, takes from milliseconds to minutes, and would have to be stopped by the clock.

What is not read (sums, integrals, matrices, words) raises `Unreadable`.
"""

import cmath
import functools
import math
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

LONGEST, DEEPEST, MOST_OPERATORS = 400, 40, 150
# A rational number of more bits than this is not worked out: 9**9**9 would never end.
LARGEST_BITS = 6_000
# A float that is smaller has lost digits, or all of them.
SMALLEST = 1e-290
# The values of letters: both signs, above and below 1, without a common factor.
SAMPLES = 8
# At which samples a letter is negative: at four of the eight. Any two of these differ and share a 0 and a 1, so two
# letters have all four pairs of signs (|ab| is not ab).
SIGNS = [bits for bits in range(128) if bits.bit_count() == 4]
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "exp": cmath.exp, "ln": cmath.log,
    "log": cmath.log, "asin": cmath.asin, "acos": cmath.acos, "atan": cmath.atan, "arcsin": cmath.asin,
    "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "sqrt": cmath.sqrt, "abs": abs,
}  # fmt: skip
# Letters that name a function where a bracket follows: f(x) is no product.
UNKNOWN_FUNCTIONS = set("fghFGHPQW")
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi",
         "varphi", "omega", "psi", "xi", "eta", "zeta", "kappa", "Delta", "Omega", "Phi", "Theta"}  # fmt: skip
# Letters stand apart from digits that follow: H2O, x2 and 0x12 are names, not products.
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?)|(?P<command>\\[a-zA-Z]+)"
    r"|(?P<word>[a-zA-Zα-ω]+)|(?P<sign>\*\*|[-+*/^(){}\[\]|!_×·÷=]))"
)


class Unreadable(ValueError):
    """A text that is no expression of the kind that is read here."""


class Value(NamedTuple):
    """A number and a bound on its rounding error; exact where it is a Fraction."""

    number: Fraction | complex
    error: float = 0.0


Node = tuple  # ("number", Fraction) | ("letter", name) | ("constant", name) | (operator, *nodes)


def _tokens(text: str) -> list[tuple[str, str]]:
    if len(text) > LONGEST:
        raise Unreadable("too long")
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise Unreadable(text[at : at + 10])
        kind = match.lastgroup or ""
        found.append((kind, match[kind]))
        # A letter before a digit, and a number that begins with 0 or is glued to a word: a name, a date, hex.
        after = text[match.end() : match.end() + 1]
        if kind == "number" and re.match(r"0\d", match[kind]):
            raise Unreadable("leading zero")
        if kind == "word" and after.isdigit():
            raise Unreadable("name")
        at = match.end()
    return found


class _Reader:
    """Recursive descent over the tokens: sum, product, power, atom."""

    def __init__(self, text: str):
        self.tokens, self.at, self.depth, self.operators = _tokens(text), 0, 0, 0
        latex = any(kind == "command" for kind, _ in self.tokens)
        # Two or three letters are a product (3xy) beside digits, operators or LaTeX; alone they are a word.
        self.bare = not latex and not any(kind in ("number", "sign") for kind, _ in self.tokens)

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place][1] if place < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise Unreadable(f"{expected or 'more'} expected")
        self.at += 1
        return token

    def count(self) -> None:
        """A long row of operators is a deep tree, and Python's stack is not."""
        self.operators += 1
        if self.operators > MOST_OPERATORS:
            raise Unreadable("too many operators")

    def whole(self) -> Node:
        node = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(self.peek())
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        node = self.product()
        while self.peek() in ("+", "-"):
            self.count()
            operator, right = self.take(), self.product()
            node = ("+", node, right if operator == "+" else ("*", ("number", Fraction(-1)), right))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            self.count()
            token = self.peek()
            if token in ("*", "×", "·", "\\cdot", "\\times"):
                self.take()
                node = ("*", node, self.signed())
            elif token in ("/", "÷", "\\div"):
                self.take()
                node = ("/", node, self.signed())
            elif (
                token
                and (token[0] in "({[|\\" or self.tokens[self.at][0] in ("word", "number"))
                and token not in ("|", "\\right", "\\rvert")
            ):
                # 2x, 2\sqrt{3}, x(x + 1); two numbers side by side are no product.
                if self.tokens[self.at][0] == "number" and self.tokens[self.at - 1][0] == "number":
                    raise Unreadable("numbers side by side")
                node = self.mixed(node) or ("*", node, self.power())
            else:
                return node

    def mixed(self, node: Node) -> Node | None:
        r"""3\frac{1}{2} is 3 and a half where both are whole numbers in digits."""
        if self.peek() != "\\frac" or self.tokens[self.at - 1][0] != "number" or node[0] not in ("number", "*"):
            return None
        start, fraction = self.at, self.power()
        sign, whole = (-1, node[2]) if node[0] == "*" and node[1] == ("number", -1) else (1, node)
        parts = [part for part in fraction[1:] if isinstance(part, tuple)]
        if whole[0] == "number" and fraction[0] == "/" and all(part[0] == "number" for part in parts):
            total = ("+", whole, fraction)
            return total if sign > 0 else ("*", ("number", Fraction(-1)), total)
        self.at = start
        return None

    def signed(self) -> Node:
        if self.peek() in ("+", "-"):
            sign = self.take()
            node = self.signed()
            return node if sign == "+" else ("*", ("number", Fraction(-1)), node)
        return self.power()

    def power(self) -> Node:
        node = self.atom()
        while self.peek() == "!":
            self.count()
            self.take()
            node = ("!", node)
        if self.peek() in ("^", "**"):
            self.take()
            return ("^", node, self.signed())
        return node

    def group(self) -> Node:
        """{...}, or the one digit, letter or command that LaTeX takes for it."""
        if self.peek() == "{":
            return self.bracketed("{", "}")
        kind, token = self.tokens[self.at] if self.at < len(self.tokens) else ("", "")
        if kind == "number" and len(token) > 1 and token.isdigit():
            self.tokens[self.at : self.at + 1] = [("number", token[0]), ("number", token[1:])]
        if kind == "word" and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [("word", token[0]), ("word", token[1:])]
        return self.atom()

    def bracketed(self, left: str, right: str) -> Node:
        self.take(left)
        node = self.sum()
        self.take(right)
        return node

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST or self.at >= len(self.tokens):
            raise Unreadable("too deep, or nothing there")
        try:
            return self._atom()
        finally:
            self.depth -= 1

    def _atom(self) -> Node:
        kind, token = self.tokens[self.at]
        if kind == "number":
            self.take()
            return ("number", Fraction(token))
        if token in ("(", "{", "["):
            return self.bracketed(token, {"(": ")", "{": "}", "[": "]"}[token])
        if token == "|":
            return ("call", "abs", self.bracketed("|", "|"))
        if kind == "command":
            return self.command(self.take()[1:])
        if kind == "word":
            return self.word()
        raise Unreadable(token)

    def command(self, name: str) -> Node:
        if name in ("left", "right"):
            raise Unreadable(name)
        if name == "frac":
            return ("/", self.group(), self.group())
        if name == "sqrt":
            root = self.bracketed("[", "]") if self.peek() == "[" else ("number", Fraction(2))
            return ("^", self.group(), ("/", ("number", Fraction(1)), root))
        if name == "pi":
            return ("constant", "pi")
        if name in GREEK:
            return self.letter("\\" + name)
        return self.function(name)

    def function(self, name: str) -> Node:
        if name not in FUNCTIONS:
            raise Unreadable(name)
        base = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.group()
        power = None
        if self.peek() == "^":
            self.take()
            power = self.group()
            if power == ("*", ("number", -1), ("number", 1)):
                raise Unreadable("inverse function")
        node = ("call", name, self.bracketed("(", ")") if self.peek() == "(" else self.argument())
        node = ("/", node, ("call", "log", base)) if base else node
        return ("^", node, power) if power else node

    def argument(self) -> Node:
        r"""What stands after \sin without brackets: 2x of \sin 2x + 1."""
        node = self.power()
        while (self.peek() and self.tokens[self.at][0] in ("word", "number")) or self.peek() == "\\pi":
            node = ("*", node, self.power())
        return node

    def word(self) -> Node:
        word = self.tokens[self.at][1]
        if word in FUNCTIONS and self.peek(1) in ("(", "{"):
            self.take()
            if self.peek() == "{":
                return ("call", word, self.bracketed("{", "}"))
            return self.function(word)
        if word in ("pi", "π"):
            self.take()
            return ("constant", "pi")
        if len(word) > 3 or (len(word) > 1 and self.bare):
            raise Unreadable(word)
        if len(word) > 1:
            self.tokens[self.at : self.at + 1] = [("word", letter) for letter in word]
        name = self.take()
        if name in UNKNOWN_FUNCTIONS and self.peek() == "(":
            return ("unknown", name, self.bracketed("(", ")"))
        return self.letter(name)

    def letter(self, name: str) -> Node:
        if self.peek() == "_":
            self.take()
            start = self.at
            self.group()
            name += "_" + "".join(token for _, token in self.tokens[start : self.at]).strip("{}")
            if name in ("e_", "i_"):
                raise Unreadable("subscript")
        return ("constant", name) if name in ("e", "i") else ("letter", name)


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Node:
    """The expression that the whole of a text is."""
    return _Reader(text).whole()


@functools.lru_cache(maxsize=4096)
def letters(node: Node) -> frozenset[str]:
    """The letters that an expression's value depends on."""
    if node[0] == "letter":
        return frozenset([node[1]])
    return frozenset().union(*(letters(part) for part in node[1:] if isinstance(part, tuple)))


def _point(name: str, sample: int) -> Fraction:
    """The value of a letter: by its name and the sample's number alone."""
    seed = zlib.crc32(f"{name} {sample}".encode())
    which = ord(name) if len(name) == 1 else zlib.crc32(name.encode())
    negative = SIGNS[which % len(SIGNS)] >> sample & 1
    # Odd over even: no whole number, where denominators of exercises vanish.
    size = Fraction(7 + 2 * (seed % 97), 32 + 32 * (seed // 97 % 2))
    return -size if negative else size


EPSILON = 2.0**-52


def _float(value: Value) -> Value:
    if isinstance(value.number, Fraction):
        try:
            number = complex(value.number)
        except OverflowError:
            raise Unreadable("too large") from None
        return Value(number, EPSILON * abs(number))
    return value


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > LARGEST_BITS:
        raise Unreadable("too large")
    return number


def _power(base: Value, exponent: Value) -> Value:
    one, other = base.number, exponent.number
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        if one == 0 and other <= 0:
            raise Unreadable("0 to the 0")
        if other.denominator == 1:
            bits = max(one.numerator.bit_length(), one.denominator.bit_length())
            if one not in (0, 1, -1) and bits * abs(other) > LARGEST_BITS:
                raise Unreadable("too large")
            return Value(one**other.numerator)
        if one < 0 and other.denominator % 2:
            # The cube root of -8 is -2.
            root = _power(Value(-one), exponent)
            return Value(-root.number if other.numerator % 2 else root.number, root.error)
        root = _exact_root(one, other)
        if root is not None:
            return Value(root)
    base, exponent = _float(base), _float(exponent)
    if base.number == 0:
        return Value(Fraction(0))
    number = _large_enough(base.number**exponent.number)
    relative = abs(exponent.number) * base.error / abs(base.number)
    relative += abs(cmath.log(base.number)) * exponent.error
    return Value(number, abs(number) * (relative + 4 * EPSILON))


def _large_enough(number: complex) -> complex:
    """A power that is not 0: e^{-1000} is too small for a float to tell it from that."""
    if abs(number) < SMALLEST:
        raise Unreadable("too small")
    return number


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    """The square root of a square: the only root that is taken exactly."""
    if exponent.denominator != 2 or base <= 0 or abs(exponent.numerator) > 64:
        return None
    over, under = math.isqrt(base.numerator), math.isqrt(base.denominator)
    if over * over != base.numerator or under * under != base.denominator:
        return None
    return _bounded(Fraction(over, under) ** exponent.numerator)


def _evaluate(node: Node, sample: int) -> Value:
    kind = node[0]
    if kind == "number":
        return Value(_bounded(node[1]))
    if kind == "letter":
        return Value(_point(node[1], sample))
    if kind == "constant":
        return Value(complex(CONSTANTS[node[1]]), EPSILON * 4)
    if kind == "unknown":
        # A function nobody knows: something that tells its arguments and its name apart.
        argument = _float(_evaluate(node[2], sample))
        number = cmath.atan(argument.number / 3 + (ord(node[1]) % 13) / 7) + argument.number * ord(node[1]) / 50
        return Value(number, 4 * argument.error + EPSILON * abs(number))
    if kind == "call":
        argument = _evaluate(node[2], sample)
        if node[1] == "abs" and isinstance(argument.number, Fraction):
            return Value(abs(argument.number))
        if node[1] == "sqrt":
            return _power(argument, Value(Fraction(1, 2)))
        argument = _float(argument)
        number = complex(FUNCTIONS[node[1]](argument.number))
        if node[1] == "exp":
            number = _large_enough(number)
        # How far the function moves where its argument does: its slope, measured.
        step = max(abs(argument.number), 1.0) * 1e-7
        slope = abs(complex(FUNCTIONS[node[1]](argument.number + step)) - number) / step
        return Value(number, 2 * slope * argument.error + 4 * EPSILON * max(1.0, abs(number)))
    if kind == "!":
        argument = _evaluate(node[1], sample).number
        if not isinstance(argument, Fraction) or argument.denominator != 1 or not 0 <= argument <= 500:
            raise Unreadable("factorial")
        return Value(_bounded(Fraction(math.factorial(argument.numerator))))
    one, other = _evaluate(node[1], sample), _evaluate(node[2], sample)
    if kind == "^":
        return _power(one, other)
    if isinstance(one.number, Fraction) and isinstance(other.number, Fraction):
        if kind == "/":
            return Value(_bounded(one.number / other.number))
        return Value(_bounded(one.number + other.number if kind == "+" else one.number * other.number))
    one, other = _float(one), _float(other)
    if kind == "+":
        number = one.number + other.number
        if 0 < min(abs(one.number), abs(other.number)) < EPSILON * max(abs(one.number), abs(other.number)):
            raise Unreadable("lost in rounding")
        return Value(number, one.error + other.error + EPSILON * abs(number))
    if kind == "*":
        number = one.number * other.number
        error = abs(one.number) * other.error + abs(other.number) * one.error
        return Value(number, error + 2 * EPSILON * abs(number))
    number = one.number / other.number
    error = (one.error + abs(number) * other.error) / abs(other.number)
    return Value(number, error + 2 * EPSILON * abs(number))


@functools.lru_cache(maxsize=4096)
def evaluate(node: Node, sample: int = 0) -> Value:
    """The value of an expression at one of the points; Unreadable where it has none or is too large."""
    try:
        value = _evaluate(node, sample)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise Unreadable(str(error)) from None
    if not isinstance(value.number, Fraction) and not (cmath.isfinite(value.number) and math.isfinite(value.error)):
        raise Unreadable("not finite")
    return value


def agree(one: Value, other: Value) -> bool:
    """True where two values are the same within their rounding errors; never where those hide everything."""
    if isinstance(one.number, Fraction) and isinstance(other.number, Fraction):
        return one.number == other.number
    one, other = _float(one), _float(other)
    error = 8 * (one.error + other.error)
    size = max(abs(one.number), abs(other.number))
    # What is within its error of 0 may be 0 or not (sin pi, sin pi + 10^-17): it is equal to nothing.
    return abs(one.number - other.number) <= error < 1e-6 * size


def same(one: Node, other: Node) -> bool:
    """True where two expressions have the same value wherever they are worked out."""
    if letters(one) != letters(other) and not (letters(one) | letters(other)):
        return False
    samples = SAMPLES if letters(one) | letters(other) else 1
    decided = 0
    for sample in range(samples):
        try:
            first = evaluate(one, sample)
        except Unreadable:
            first = None
        try:
            second = evaluate(other, sample)
        except Unreadable:
            second = None
        if (first is None) != (second is None):
            return False
        if first is not None and second is not None:
            try:
                if not agree(first, second):
                    return False
            except Unreadable:
                return False
            decided += 1
    return decided == samples


def proportional(one: Node, other: Node) -> float:
    """The number c with one = c · other everywhere (2x − 4 is 2 · (x − 2)); 0 where there is none."""
    first = None
    for sample in range(SAMPLES):
        try:
            ratio = evaluate(("/", one, other), sample)
            if ratio.number == 0 or (first is not None and not agree(ratio, first)):
                return 0.0
        except Unreadable:
            return 0.0
        first = first or ratio
    number = complex(first.number) if first else 0j
    return number.real if abs(number.imag) <= 1e-9 * abs(number) else 0.0
