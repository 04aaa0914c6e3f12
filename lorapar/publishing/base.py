"""What a published adapter calls its base: the hub id where one is known, never a path of this machine."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from ..adapter.merging import weight_files
from ..files import read_json, sha256_file
from ..model.locate import ALIAS, ALIAS_WEIGHTS, cache_folder

# Whether the hub has a model or a data set of that name; None where it is not asked.
OnHub = Callable[[str, str], bool | None]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """A base as others get it.

    Attributes:
        name: its hub id, or the name that it has here. on_hub: whether it is a hub id. revision: of the hub id.
        weights: how those that were trained on differ from the hub's. facts: lines for the card, in Markdown, on how to
            get it or how far the hub id is to be trusted. note: the same in a line for whoever pushes.
    """

    name: str
    on_hub: bool
    revision: str | None = None
    weights: str = ""
    facts: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def called(self) -> str:
        """What files call it: a name of this machine's can be taken for none of the hub's, such as `gpt2`."""
        return self.name if self.on_hub else f"./{self.name}"


def published_base(settings: dict[str, Any], given: str, on_hub: OnHub, same_files: bool = True) -> Base:
    """The base of an exported adapter.

    Args:
        settings: its adapter_config.json, which names the base by a hub id, with its revision, or by an absolute path.
        given: the recipe's model.name. on_hub: asks whether the hub has a model of a name.
        same_files: whether a local base's files are those that it was trained on.

    A folder's hub id is what its config.json has as `_name_or_path`, if the hub has it: a relative folder looks the
    same. That is right for a copy; after a full fine-tune it may still be the model from before, so card and note say
    where the name is from.
    """
    called = str(settings["base_model_name_or_path"])
    if not is_absolute(called):
        places = (ALIAS, str(cache_folder() / "models" / ALIAS))
        return Base(called, True, settings.get("revision"), ALIAS_WEIGHTS if given in places else "")
    if given.endswith(".gguf"):
        return _file(Path(given).expanduser(), same_files)
    folder = Path(called)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    known = str(config.get("_name_or_path") or "")
    there = on_hub("model", known) if HUB_ID.fullmatch(known) and not os.path.isdir(known) else False
    if there is not False:
        fact = (
            f"It was trained on a local folder whose `config.json` names `{known}`. Where that folder's weights had "
            "been changed since, its answers on the hub's model differ."
        )
        note = f"base: {called} says in its config.json that it is {known}, and the adapter is published as {known}'s"
        unasked = "; not checked: whether the hub has it, else the base is published as one without a name there"
        return Base(known, True, facts=[fact], note=note if there else note + unasked)
    kind = ", ".join(config.get("architectures") or []) or "of an architecture that is not known here any more"
    weights = weight_files(str(folder))[1] if folder.is_dir() else []
    return _unknown(folder.name, f"a local model ({kind})", weights, same_files)


def _file(file: Path, same_files: bool) -> Base:
    what = "a GGUF file, converted to bfloat16 safetensors by LoRA-PAR"
    return _unknown(file.name, what, [file] if file.is_file() else [], same_files)


def _unknown(name: str, what: str, weights: list[Path], same_files: bool) -> Base:
    facts = [
        f"Its base `{name}` is {what} that this adapter's author has, and has no name on the hub: ask for it, and give "
        "PEFT or vLLM the folder that holds it."
    ]
    if weights and same_files:
        digests = [f"{sha256_file(path)}  {path.name}" for path in weights]
        facts += ["", "Its weights, as `sha256sum` prints them:", "", "```", *digests, "```"]
    note = f"base: {name} has no name on the hub, so others can load the adapter only where they have that model"
    if not same_files:
        note += "; its files have been changed or moved since the training, so the card does not name their sha256"
    return Base(name, False, facts=facts, note=note)


def is_absolute(text: str) -> bool:
    """Whether a text is an absolute path here or on another system."""
    return os.path.isabs(text) or PureWindowsPath(text).is_absolute()


def licence_of(folder: Path) -> str | None:
    """The licence in the card of a model folder, where there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license: *['\"]?([\w.-]+)['\"]? *$", head, re.MULTILINE)
    return found[1] if found else None
