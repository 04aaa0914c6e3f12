"""A recipe's YAML as plain values, and back: `extends`, numbers such as 1e-4, keys given twice."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..files import read_text

# YAML 1.1 wants a dot and a signed exponent and reads 1e-4 as text; a recipe means the number.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number and refuses a key given twice, which YAML lets pass in silence."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value: the text "1e-4" in quotes."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"line {key.start_mark.line + 1}: a key must be a word, not a list or a mapping")
        # Several << in one mapping are YAML's own way to merge several anchors.
        if key.value in seen and key.value != "<<":
            raise InputError(f"{key.value}: given twice (again in line {key.start_mark.line + 1})")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; yaml.YAMLError or InputError where it is none."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file over those of the recipe it `extends`, section by section.

    Args:
        below: the recipes that extend this one. Raises InputError for what is no YAML mapping, or extends itself.
    """
    if path.resolve() in below:
        raise InputError(f"extends: {path} extends itself")
    try:
        values = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe must be a mapping of sections, got {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise InputError(f"extends: got {base!r}, expected the path of another recipe")
    return _merge(read_recipe(path.parent / base, (*below, path.resolve())), values)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
