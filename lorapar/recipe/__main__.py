"""`python -m lorapar.recipe` prints docs/recipe.md: every key of a recipe, from its declaration."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from .checks import any_of, range_of
from .sections import SAME_RESULT, Recipe, changes_result
from .values import nested_class

WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
INTRODUCTION = """\
# The recipe

Written by `python -m lorapar.recipe` from the declarations in `lorapar/recipe/sections.py`.

A recipe is one YAML file that describes a whole run. `extends: other.yaml` starts from another recipe, and
`--section.key VALUE` on the command line wins over both. An unknown key, a wrong type or a value that is not allowed is
refused before any work is done. The sections `lora`, `sft` and `grpo` also take the keys of `peft.LoraConfig`,
`trl.SFTConfig` and `trl.GRPOConfig`.

Keys marked ↻ change only how a result is computed, so they may change between two commands of one run without
`--update`; so may TRL's {trls}.
"""


def reference() -> str:
    """Every key as Markdown, a table for each section."""
    parts = [INTRODUCTION.format(trls=" and ".join(f"`{name}`" for name in SAME_RESULT))]
    for at, section in sections(Recipe):
        hints = typing.get_type_hints(section)
        parts.append(f"## `{at}`\n\n{inspect.cleandoc(section.__doc__ or '')}\n" if at else "## Top level\n")
        rows = [row(at, field, hints[field.name]) for field in dataclasses.fields(section) if field.name != "trainer"]
        parts.append("\n".join(["| key | type | default | allowed | |", "|---|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def sections(section: type, at: str = "") -> Iterator[tuple[str, Any]]:
    """A section and those within it, by where they stand: `label.teachers[]`."""
    yield at, section
    for name, hint in typing.get_type_hints(section).items():
        inner = nested_class(hint)
        if inner is not None:
            place = f"{name}[]" if typing.get_origin(hint) is list else name
            yield from sections(inner, f"{at}.{place}" if at else place)


def row(at: str, field: dataclasses.Field, hint: Any) -> str:
    """A key's line in the table of the section that stands at `at`."""
    about = field.metadata
    changes = changes_result(f"{at}.{field.name}".lstrip(".").replace("[]", "[0]"))
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else about["one_of"]
    allowed = any_of(choices) if choices else range_of(about) or about["not_empty"]
    name = f"`{field.name}`" + ("" if changes else " ↻")
    cells = [name, type_of(hint), default_of(field), allowed, about["help"]]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def type_of(hint: Any) -> str:
    """A type in the words of a reader of YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any_of([_choices(one) or type_of(one) for one in arguments])
    if origin is list:
        inner = _choices(arguments[0]) or type_of(arguments[0])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return "text" if origin is Literal else WORDS[hint]


def _choices(hint: Any) -> str:
    return any_of(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ""


def default_of(field: dataclasses.Field) -> str:
    """A default as YAML; nothing where the recipe must give the key, or where it is a section's own defaults."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


if __name__ == "__main__":
    print(reference(), end="")
