"""A recipe and metrics as they may be published: without paths, addresses and keys of whoever ran them.

The recipe's resolved values hold where a model and data lie on one machine, a teacher's address, and, where somebody
wrote it there, a token for the hub. What a reader needs of a path is its last part.
"""

import html
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import InputError
from .base import is_absolute

# Keys that hold a path, or a list of paths; in other keys, such as data.prompt, a text may begin with a slash.
PATHS = re.compile(
    r"name|model|target|template|chat_template|store|corrections|tasks|deepspeed|fsdp_config|.*_(dir|file|path)"
)
SECRETS = re.compile(r".*hub_token|.*api_key|.*password|.*secret|authorization|(extra_)?headers", re.IGNORECASE)
# Machines in somebody's network, and logins in a URL.
ADDRESSES = re.compile(r".*base_url|.*server_host|.*endpoint")
LEFT_OUT = "(left out)"


class Redacted:
    """Values without what is private, and what was replaced in them.

    Attributes: values; replaced: {dotted key: what stood there}.
    """

    def __init__(self, values: Any):
        self.replaced: dict[str, str] = {}
        self.values = self._of(values, "", "")

    def _of(self, value: Any, key: str, at: str) -> Any:
        if value and (SECRETS.fullmatch(key) or (ADDRESSES.fullmatch(key) and isinstance(value, str))):
            self.replaced[at] = str(value)
            return LEFT_OUT
        if isinstance(value, dict):
            return {self._key(k, at): self._of(v, str(k), f"{at}.{k}" if at else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._of(item, key, f"{at}[{i}]") for i, item in enumerate(value)]
        return self._shortened(value, at, PATHS.fullmatch(key) is not None) if isinstance(value, str) else value

    def _key(self, key: Any, at: str) -> Any:
        return self._shortened(key, f"{at}.{key}", False) if isinstance(key, str) else key

    def _shortened(self, text: str, at: str, is_path: bool) -> str:
        """A path's last part; any other text as it is."""
        at_home = text.startswith("~")
        if "\n" in text or not (is_absolute(text) or at_home):
            return text
        if not (is_path or os.path.exists(text)):
            return text
        self.replaced[at] = text
        return last_part(text)


def last_part(path: str) -> str:
    # Of both systems' paths: a run may be pushed from another machine than made it.
    return PureWindowsPath(path).name or LEFT_OUT


def telling(texts: Iterable[str]) -> list[str]:
    """Those that say something wherever they stand (/data is a word of many tokenizers), the longest first."""
    return sorted(
        {text for text in texts if len(text) > 7 and not (is_absolute(text) and len(re.findall(r"[/\\]", text)) < 2)},
        key=lambda text: (-len(text), text),
    )


def shorten_paths(page: str, private: Iterable[str]) -> str:
    """A page of HTML with paths' last parts: labels name a teacher by its model, which may be a folder."""
    for text in telling(private):
        if is_absolute(text):
            page = page.replace(html.escape(text), html.escape(last_part(text)))
    return page


def check_nothing_private(files: Iterable[tuple[str, Path]], private: Iterable[str]) -> None:
    """InputError, which names the file, where one that would be published holds one of the texts of `private`."""
    needles = {text: text.encode() for text in telling(private)}
    for name, path in files:
        content = path.read_bytes()
        for text, needle in needles.items():
            if needle in content:
                raise InputError(f"{name}: holds {text!r}, which is of this machine; nothing was published")
