"""How a recipe's keys are declared, and how plain values, as YAML holds them, become dataclasses of such keys."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ..errors import InputError, nearest


def key(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    kind: str = "",
    not_empty: str = "",
    one_of: tuple[Any, ...] = (),
    changes_result: bool = True,
) -> Any:
    """A dataclass field that says all there is to know of a recipe's key.

    Args:
        default: a value, or a function that makes it; none: the recipe must give it. help: one line for a person.
        at_least, more_than, at_most: bounds of a number, or of each number in a mapping. kind: what a number between
            two bounds is, for errors: "a share" in (0, 1].
        not_empty: what a text or list must hold, for errors. one_of: the values allowed.
        changes_result: False: the key changes only how a result is computed, or what is made of it beside the rest, so
            it may change between two commands.
    """
    about = {"help": help, "at_least": at_least, "more_than": more_than, "at_most": at_most, "kind": kind,
             "not_empty": not_empty, "one_of": one_of, "changes_result": changes_result}  # fmt: skip
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Written:
    """A value that YAML has read as no text, with the text that was written: 5e3 is 5000.0, or a revision's name."""

    value: Any
    text: str


def plain(value: Any) -> Any:
    """A value of which no text is asked: every `Written` in it as YAML reads it."""
    if isinstance(value, Written):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def nested_class(hint: Any) -> type | None:
    """The dataclass in a type such as `list[TeacherConfig]` or `PriceConfig | None`; None where there is none."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((found for inner in typing.get_args(hint) if (found := nested_class(inner))), None)


def build(cls: type, values: Any, at: str) -> Any:
    """A `cls` of a mapping of its keys; InputError, which names `at` and the key, for what does not fit."""
    if not isinstance(values, Mapping):
        raise InputError(f"{at.rstrip('.')}: expected a mapping of keys, got {plain(values)!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    check_keys(values, fields, at)
    for name in _required(cls):
        if name not in values:
            raise InputError(f"{at}{name}: missing; the recipe must give it")
    hints = typing.get_type_hints(cls)
    return cls(**{name: convert(hints[name], value, f"{at}{name}") for name, value in values.items()})


def _required(cls: type) -> list[str]:
    """The keys without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def takes_text(hint: Any) -> bool:
    """Whether a type is text, or text among others."""
    return hint is str or (typing.get_origin(hint) in (typing.Union, types.UnionType) and str in typing.get_args(hint))


def convert(hint: Any, value: Any, at: str) -> Any:
    """`value` as the annotated type, or InputError. Integers serve as floats, text such as 1e-4 as a number, and what
    YAML reads as a number, true or a mapping as the text that was written, where text is asked for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Written):
        of_its_type = any(type(value.value) is argument for argument in arguments)
        one_name = dataclasses.is_dataclass(hint) and not isinstance(value.value, Mapping)
        as_text = one_name or value.text in arguments or (takes_text(hint) and not of_its_type)
        return convert(hint, value.text if as_text else value.value, at)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        # A model or a source, of which the recipe must give no more than its name, may be given by it alone.
        if isinstance(value, str) and _required(hint) == ["name"]:
            value = {"name": value}
        return value if isinstance(value, hint) else build(hint, value, f"{at}.")
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{at}: got {plain(value)!r}, allowed: {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        # Exact matches first, so that True stays a bool and 1 an int where both are allowed.
        for argument in arguments:
            if isinstance(argument, type) and type(value) is argument:
                return value
        for argument in arguments:
            try:
                return convert(argument, value, at)
            except InputError:
                continue
    elif origin is list:
        if isinstance(value, list):
            return [convert(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(value)]
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            of = arguments[1] if arguments else Any
            return {key: convert(of, item, f"{at}.{key}") for key, item in value.items()}
    elif hint is float and not isinstance(value, bool):
        with_number = _as_float(value)
        if with_number is not None:
            return with_number
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (bool, str, type(None)):
        if isinstance(value, hint):
            return value
    elif hint is Any or hint not in (float, int):
        return plain(value)
    quoted = "; put text that begins with { or [ in quotes" if hint is str and isinstance(value, Mapping | list) else ""
    raise InputError(f"{at}: got {plain(value)!r}, expected {_type_name(hint)}{quoted}")


def _as_float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in typing.get_args(hint))
    if hint is type(None):
        return "nothing"
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        if typing.get_origin(inner) is Literal:
            return f"list of {', '.join(map(str, typing.get_args(inner)))}"
        if dataclasses.is_dataclass(inner):
            names = "names, or of " if _required(typing.cast(type, inner)) == ["name"] else ""
            return f"list of {names}mappings of keys"
    if typing.get_origin(hint) is None:
        return getattr(hint, "__name__", str(hint))
    return re.sub(r"(\w+\.)+(?=\w)", "", str(hint))  # list[TeacherConfig], without the modules of the names


# Names that other tools or older versions give to a key, where the most similar name is another one.
CALLED = {
    "lora.rank": "r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.modules": "target_modules",
    "grpo.max_prompt_length": "data.max_prompt_length",
    **{
        f"{stage}.{old}": new
        for stage in ("sft", "grpo")
        for old, new in (
            ("group_by_length", "train_sampling_strategy: group_by_length"),
            ("evaluation_strategy", "eval_strategy"),
            ("warmup_ratio", "warmup_steps"),
            ("lr", "learning_rate"),
            ("batch_size", "per_device_train_batch_size"),
            ("epochs", "num_train_epochs"),
        )
    },
    "sft.max_seq_length": "max_length",
    "sft.max_prompt_length": "data.max_prompt_length",
}


def check_keys(given: Iterable[str], allowed: Iterable[str], at: str) -> None:
    """Refuse the first key of `given` that is not in `allowed`, naming the nearest one that is."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            # The reader would rather see all of a few keys than one that is quite unlike his own.
            near = nearest(name, allowed, least=1.4 if at == "" else 1.0 if len(allowed) < 20 else 0.0)
            near = [CALLED[f"{at}{name}"]] if f"{at}{name}" in CALLED else near
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            raise InputError(f"{at}{name}: unknown key; {hint}")
