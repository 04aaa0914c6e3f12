"""A recipe and metrics as they may be published: without paths, addresses and keys of whoever ran them.

The recipe's resolved values hold where a model and data lie on one machine, a teacher's address, and, where somebody
wrote it there, a token for the hub. What a reader needs of a path is its last part.
"""

import html
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from ..data.tables import form_of
from ..errors import InputError
from .base import is_absolute

# Keys that hold a path and nothing else, and those that hold a name too: of the hub, a library or an endpoint. In other
# keys, such as data.prompt, a text may begin with a slash.
PATHS = re.compile(r"template|chat_template|store|corrections|deepspeed|fsdp_config|.*_(dir|file|path)")
NAMES = re.compile(r"name|model|target|tasks")
# What others must have word for word, whatever it looks like; only what is a key by its form is taken out.
WORDS = re.compile(r"prompt|system_prompt|completion|habits|chat_template|template")
SECRETS = re.compile(
    r"(.*[_-])?(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token|.*(hub|api|access|auth|refresh|session)[_-]?tokens?"
    r"|(.*[_-])?key|.*(api|access)[_-]?keys?|.*password|passwd|.*secret.*|.*credentials?|auth|authorization|cookies?"
    r"|sig|signature|(extra_)?headers",
    re.IGNORECASE,
)
# Machines in somebody's network, and logins in a URL.
ADDRESSES = re.compile(r"(.*base_url|.*server_host|.*endpoint)s?", re.IGNORECASE)
# Keys by their form: of the Hugging Face hub, OpenAI and its like, GitHub, AWS, Slack, and signed tokens (JWT).
KEY = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|xox[a-z]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
)
URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
SIGNED = re.compile(r"[?&;](\w|-)*(sig|signature|token|key|credential|password|secret|auth)=", re.IGNORECASE)
OF_A_NETWORK = re.compile(r"localhost|[^.:]+|.*\.(local|localdomain|internal|intranet|lan|corp|home|private|test)")
LEFT_OUT = "(left out)"


class Redacted:
    """Values without what is private, and what was replaced in them.

    Attributes: values; replaced: the dotted keys where something was; private: the texts that stood there.
    """

    def __init__(self, values: Any):
        self.replaced: list[str] = []
        self.private: set[str] = set()
        self.values = self._of(values, "", "")

    def _of(self, value: Any, key: str, at: str) -> Any:
        if value and not isinstance(value, bool | int | float) and SECRETS.fullmatch(key):
            return self.replace(at, str(value), LEFT_OUT)
        if isinstance(value, dict):
            return {self._text(k, key, f"{at}.{k}") if isinstance(k, str) else k:
                    self._of(v, str(k), f"{at}.{k}" if at else str(k)) for k, v in value.items()}  # fmt: skip
        if isinstance(value, list):
            return [self._of(item, key, f"{at}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if value and ADDRESSES.fullmatch(key):
            return self.replace(at, value, LEFT_OUT)
        return self._text(value, key, at)

    def replace(self, at: str, text: str, shown: str) -> str:
        """`shown`, after noting that it stands for `text`."""
        if at not in self.replaced:
            self.replaced.append(at)
        self.private.add(text)
        return shown

    def _text(self, text: str, key: str, at: str) -> str:
        """A path's last part; any other text without keys and, unless it is of `WORDS`, private addresses."""
        if self._is_path(text, key):
            return self.replace(at, text, last_part(text))

        def left_out(found: re.Match[str]) -> str:
            return self.replace(at, found[0], LEFT_OUT)

        text = KEY.sub(left_out, text)
        if WORDS.fullmatch(key):
            return text
        return URL.sub(lambda found: left_out(found) if is_private(found[0]) else found[0], text)

    def _is_path(self, text: str, key: str) -> bool:
        if "\n" in text:
            return False
        path, name = PATHS.fullmatch(key) is not None, NAMES.fullmatch(key) is not None
        if is_absolute(text) or text.startswith("~"):
            return path or name or os.path.exists(text)
        slashes = len(re.findall(r"[/\\]", text))
        if not slashes or "{" in text or "://" in text:
            return False
        # An endpoint's name of a model may have several slashes, the hub's names have one.
        return path or (name and (text.startswith(".") or bool(form_of(Path(text))) or Path(text).suffix in SUFFIXES
                                  or (key == "name" and slashes > 1) or os.path.exists(text)))  # fmt: skip


# Of files that a recipe names, beside data's.
SUFFIXES = (".gguf", ".safetensors", ".yaml", ".yml", ".json", ".jinja", ".txt", ".py", ".db", ".sqlite")


def is_private(url: str) -> bool:
    """Whether a URL holds a login or a signature, or is of a machine in somebody's own network."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return True
    if parts.scheme == "file" or parts.username or parts.password or SIGNED.search(url):
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return parts.scheme in ("http", "https", "ws", "wss") and OF_A_NETWORK.fullmatch(host.casefold()) is not None


def last_part(path: str) -> str:
    # Of both systems' paths: a run may be pushed from another machine than made it.
    return PureWindowsPath(path).name or LEFT_OUT


def telling(texts: Iterable[str]) -> list[str]:
    """Those that say something wherever they stand (/data is a word of many tokenizers, question of any text), the
    longest first."""
    return sorted(
        {text for text in texts
         if len(text) > 7 and not text.isalpha() and not (is_absolute(text) and len(re.findall(r"[/\\]", text)) < 2)},
        key=lambda text: (-len(text), text),
    )  # fmt: skip


def is_relative(text: str) -> bool:
    """Whether a replaced text may be a relative path: another file, such as a tokenizer's, may hold it by chance."""
    return not is_absolute(text) and "://" not in text and re.search(r"[/\\]", text) is not None


def shorten_paths(page: str, private: Iterable[str]) -> str:
    """A page of HTML with paths' last parts: labels name a teacher by its model, which may be a folder."""
    for text in telling(private):
        if is_absolute(text) or is_relative(text):
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
