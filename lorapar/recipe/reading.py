"""A recipe from its YAML, and back: `extends`, overrides, numbers such as 1e-4, keys given twice."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..files import read_text
from .checks import check_trainer_keys, check_values
from .sections import GRPOStageConfig, Recipe, SFTStageConfig, StageConfig
from .values import build, check_keys, convert

# YAML 1.1 wants a dot and a signed exponent and reads 1e-4 as text; a recipe means the number.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

# Set by the pipeline itself, so a recipe that sets them would be overruled in silence.
RESERVED_TRAINER_KEYS = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "do_train", "seed",
                         "data_seed", "optim", "optim_args")  # fmt: skip


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


def load_recipe(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, apply `("section.key", "yaml text")` overrides, check everything.

    Raises InputError, one line, for an unknown key (with the nearest right one), a wrong type or a value out of range.
    """
    values = read_recipe(Path(path))
    for dotted, text in overrides:
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise InputError(f"--{dotted}: {text!r} is not a YAML value") from None
        _set(values, dotted, value)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Recipe:
    """A checked Recipe from plain values (what the YAML holds)."""
    # A section whose keys are all commented out reads as nothing, and means its defaults.
    sections = {f.name for f in dataclasses.fields(Recipe) if f.default_factory is not dataclasses.MISSING} - {"stages"}
    values = {key: {} if value is None and key in sections else value for key, value in values.items()}
    for stage, section in (("sft", SFTStageConfig), ("grpo", GRPOStageConfig)):
        if isinstance(values.get(stage), Mapping):
            values[stage] = _split_trainer_keys(stage, values[stage], section)
    recipe = build(Recipe, values, at="")
    check_values(recipe)
    return recipe


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for at, section in enumerate(sections):
        inner = values.get(section)
        if at == 0 and section == "model" and isinstance(inner, str):
            inner = {"name": inner}
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
        values[section] = dict(inner)
        values = values[section]
    values[key] = value


def _split_trainer_keys(stage: str, values: Mapping[str, Any], section: type[StageConfig]) -> dict[str, Any]:
    """Sort a stage's keys into ours and the trainer's, checking the trainer's against TRL's dataclass."""
    import trl

    config_class = getattr(trl, section.config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    own = [f.name for f in dataclasses.fields(section) if f.name != "trainer"]
    check_keys(values, [*own, *fields], f"{stage}.")
    for key in RESERVED_TRAINER_KEYS:
        if key in values:
            raise InputError(f"{stage}.{key}: set by the run itself; the optimizer is PartitionedAdamW, "
                             "output_dir and seed are top-level keys")  # fmt: skip
    # YAML reads the word no as false.
    strategies = ("eval_strategy", "save_strategy", "logging_strategy")
    values = {key: "no" if key in strategies and value is False else value for key, value in values.items()}
    check_trainer_keys(stage, values)
    hints = typing.get_type_hints(config_class)
    trainer = {key: convert(hints[key], value, f"{stage}.{key}") for key, value in values.items() if key not in own}
    return {key: values[key] for key in own if key in values} | {"trainer": trainer}
