"""A recipe from its YAML, and back: `extends`, overrides, numbers such as 1e-4, keys given twice."""

import dataclasses
import enum
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, require
from ..files import read_text
from .checks import any_of, check_trainer_keys, check_values
from .sections import GRPOStageConfig, Recipe, SFTStageConfig, StageConfig
from .values import Written, build, check_keys, convert, nested_class, plain, takes_text

# YAML 1.1 wants a dot and a signed exponent and reads 1e-4 as text, 012 as ten, 12:30 as 750 and 2024-01-01 as a day.
# A recipe means numbers as YAML 1.2 does, to the last character; anything else is text.
INTEGER = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

# Set by the pipeline itself, so a recipe that sets them would be overruled in silence, or change what it rests on.
RESERVED_TRAINER_KEYS = (
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "do_train", "do_predict", "seed", "data_seed",
    "optim", "optim_args", "hub_strategy", "fsdp_config", "accelerator_config", "logging_nan_inf_filter",
    "activation_checkpointing", "activation_checkpointing_kwargs", "local_rank",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number, keeps the text of what it reads as no text (`Written`), and refuses a
    key given twice, which YAML lets pass in silence."""


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
    # Every key is a name, also one such as 1 or yes.
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> Written:
    text = loader.construct_scalar(node).replace("_", "")
    return Written(int(text, 16 if text.startswith("0x") else 10), node.value)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> Written:
    return Written(loader.construct_yaml_float(node), node.value)


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> Written:
    return Written(loader.construct_yaml_bool(node), node.value)


_TAG = "tag:yaml.org,2002:"
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor(f"{_TAG}int", _construct_integer)
_Loader.add_constructor(f"{_TAG}float", _construct_float)
_Loader.add_constructor(f"{_TAG}bool", _construct_bool)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", FLOAT, list("-+.0123456789"))
    _class.add_implicit_resolver(f"{_TAG}int", INTEGER, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; yaml.YAMLError or InputError where it is none."""
    return plain(_load(text))


def _load(text: str) -> Any:
    """The same with what YAML reads as no text `Written`, as `parse` takes it."""
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
        values = _load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe must be a mapping of sections, got {type(plain(values)).__name__}")
    base = values.pop("extends", None)
    base = base.text if isinstance(base, Written) else base
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
        _set(values, dotted, _given(dotted, text))
    return parse(values)


def _given(dotted: str, text: str) -> Any:
    """The value of `--dotted text`. A key of texts gets the words as they stand, though YAML reads a template such as
    "{prompt}" or "# {prompt}" as something else; the word null, and what is in quotes, is YAML's there too."""
    try:
        value = _load(text)
    except (yaml.YAMLError, InputError):
        if _takes_text(dotted):
            return text
        raise InputError(f"--{dotted}: {text!r} is not a YAML value") from None
    words = isinstance(value, dict | list) or (value is None and text.strip() not in ("", "~", "null"))
    return Written(value, text) if words and _takes_text(dotted) else value


def _takes_text(dotted: str) -> bool:
    """Whether a key of ours holds a text."""
    section: Any = Recipe
    *sections, last = dotted.split(".")
    for name in sections:
        section = nested_class(typing.get_type_hints(section).get(name)) if section else None
    return section is not None and takes_text(typing.get_type_hints(section).get(last))


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
        if at == 0 and section == "model" and isinstance(inner, str | Written):
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
            raise InputError(f"{stage}.{key}: set by the run itself; the optimizer is PartitionedAdamW, output_dir and "
                             "seed are top-level keys, gradient_checkpointing is TRL's name")  # fmt: skip
    for key in values:
        if key.startswith("ddp_"):
            raise InputError(f"{stage}.{key}: nothing is wrapped in DDP, as active elements' gradients are exchanged "
                             "once a step; leave it out")  # fmt: skip
    # YAML reads the word no as false.
    strategies = ("eval_strategy", "save_strategy", "logging_strategy")
    values = {key: "no" if key in strategies and plain(value) is False else value for key, value in values.items()}
    hints = typing.get_type_hints(config_class)
    given = {key: value for key, value in values.items() if key not in own}
    # TRL's types leave open what is within a dict, which `convert` then hands on as it came.
    trainer = {key: plain(convert(hints[key], value, f"{stage}.{key}")) for key, value in given.items()}
    for key, value in trainer.items():
        for words in typing.get_args(hints[key]):
            # Declared as an enum or text, so any text has passed.
            if isinstance(words, type) and issubclass(words, enum.Enum):
                allowed = [word.value for word in words]
                require(value in allowed, f"{stage}.{key}", value, any_of(allowed))
    check_trainer_keys(stage, trainer)
    return {key: values[key] for key in own if key in values} | {"trainer": trainer}
