"""A wheel from the package index that pip or uv is set up with, by Python's own means: uv's environments have no pip.

The index is asked as PEP 691 (JSON) and PEP 503 (HTML) say. Proxies are those of the environment, as urllib reads them;
a login comes from the index's URL or from ~/.netrc. Not read: extra indexes, find-links, trusted hosts, keyrings.
"""

import configparser
import html.parser
import http.client
import json
import netrc
import os
import re
import ssl
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import (
    HTTPBasicAuthHandler,
    HTTPPasswordMgrWithPriorAuth,
    HTTPSHandler,
    OpenerDirector,
    Request,
    build_opener,
)

import certifi

from ..errors import InputError
from ..progress import Progress

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
SECONDS_WITHOUT_A_BYTE = 60
TRIES = 3  # where the server or the connection fails; a second and two seconds apart


def fetch_wheel(project: str, wheel: str, folder: Path) -> Path:
    """The file `wheel` of a project, downloaded into `folder`; InputError, with what was tried, where it is not had."""
    index, login = _without_login(index_url())
    target = folder / wheel
    for tries in range(1, TRIES + 1):
        try:
            opener = _opener(index, login)
            _download(opener, find_file(opener, index, project, wheel), target)
            break
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, http.client.InvalidURL):
            # What Python says of an unusable URL or page may hold parts of it, a password's too.
            raise InputError(
                f"{wheel} from {index}: not a package index (PEP 503 or 691), or one that wants another login"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if tries == TRIES or getattr(error, "code", 500) < 500:
                raise InputError(f"{wheel} from {index}: {getattr(error, 'reason', None) or error}") from None
            time.sleep(tries)
    return target


# Which index


def index_url() -> str:
    """The index that the environment, pip's files or uv's files name, in that order; else PyPI."""
    named = [os.environ.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")]
    found = next((url for url in (*named, _of_pip("index-url"), _of_uv()) if url), PYPI)
    # uv allows a name before it: internal=https://...
    return re.sub(r"^[\w.-]+=", "", found)


def _of_pip(option: str) -> str | None:
    """An option of pip's configuration files, of which the first below that has it counts."""
    own = os.environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return None
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    places = [Path(own)] if own else []
    places += [Path(sys.prefix, name), *(folder / "pip" / name for folder in _users_settings())]
    places += [Path("~/pip" if sys.platform == "win32" else "~/.pip").expanduser() / name]
    places += [*(folder / "pip" / name for folder in _everybodys_settings()), Path("/etc", name)]
    for place in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(place, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue
        for section in ("install", "global"):
            if value := parser.get(section, option, fallback=None):
                return value
    return None


def _of_uv() -> str | None:
    own = os.environ.get("UV_CONFIG_FILE")
    above = [folder / "uv.toml" for folder in (Path.cwd(), *Path.cwd().parents)]
    folders = (*_users_settings(), *_everybodys_settings(), Path("/etc"))
    for place in [Path(own)] if own else [*above, *(folder / "uv" / "uv.toml" for folder in folders)]:
        try:
            settings = tomllib.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        default = [index.get("url") for index in settings.get("index", []) if index.get("default")]
        if url := next(iter(default), None) or settings.get("index-url") or settings.get("pip", {}).get("index-url"):
            return url
    return None


def _users_settings() -> list[Path]:
    """Where programs keep one user's settings."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    if sys.platform == "win32":
        return [Path(os.environ["APPDATA"])] if "APPDATA" in os.environ else []
    return [Path("~/Library/Application Support").expanduser(), home] if sys.platform == "darwin" else [home]


def _everybodys_settings() -> list[Path]:
    """Where programs keep a machine's settings."""
    if sys.platform == "win32":
        return [Path(os.environ["PROGRAMDATA"])] if "PROGRAMDATA" in os.environ else []
    shared = [Path(folder) for folder in (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)]
    return [Path("/Library/Application Support"), *shared] if sys.platform == "darwin" else shared


# Asking it


def _without_login(url: str) -> tuple[str, str]:
    """(the URL without user and password, "user:password"); InputError, without the URL, where a password spoils it."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    try:
        assert parts.port is None or parts.port >= 0
    except ValueError:
        # https://user:pass/word@host: what stands before the first / is no host.
        raise InputError(
            "the package index's URL cannot be used: a / in its user or password must be written %2F"
        ) from None
    return parts._replace(netloc=host).geturl(), login


def _opener(index: str, login: str) -> OpenerDirector:
    """What opens URLs, and sends user and password to the index's host alone."""
    passwords = HTTPPasswordMgrWithPriorAuth()
    login = login or _of_netrc(urlsplit(index).hostname or "")
    if login:
        user, _, password = login.partition(":")
        root = urljoin(index, "/")
        passwords.add_password(None, root, unquote(user), unquote(password), is_authenticated=True)
    context = ssl.create_default_context()
    # Some Pythons on macOS come without certificates; companies have their own.
    given = os.environ.get("PIP_CERT") or _of_pip("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()
    context.load_verify_locations(**{"capath" if Path(given).is_dir() else "cafile": given})
    return build_opener(HTTPBasicAuthHandler(passwords), HTTPSHandler(context=context))


def _of_netrc(host: str) -> str:
    """ "user:password" for a host, as a URL holds them, out of $NETRC or ~/.netrc; empty where there is none."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return f"{quote(found[0], safe='')}:{quote(found[2], safe='')}" if found else ""


def find_file(opener: OpenerDirector, index: str, project: str, wheel: str) -> str:
    """The URL of a project's file, as the index's page of the project says."""
    page = f"{index.rstrip('/')}/{project}/" + ("index.html" if index.startswith("file:") else "")
    with opener.open(Request(page, headers={"Accept": ACCEPT}), timeout=SECONDS_WITHOUT_A_BYTE) as reply:
        text, at = reply.read().decode("utf-8"), reply.url
        if "json" in reply.headers.get_content_type():
            files = {file["filename"]: file["url"] for file in json.loads(text)["files"]}
        else:
            links = _Links()
            links.feed(text)
            files = links.files
    if wheel not in files:
        raise InputError(f"{wheel} from {index}: the index lists no such file among the {len(files)} of {project}")
    return urljoin(at, files[wheel])


class _Links(html.parser.HTMLParser):
    """{file name: URL} of a PEP 503 page."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        href = dict(attrs).get("href") if tag == "a" else None
        if href:
            self.files[unquote(urlsplit(href).path).rpartition("/")[2]] = href.partition("#")[0]


def _download(opener: OpenerDirector, url: str, target: Path) -> None:
    with opener.open(url, timeout=SECONDS_WITHOUT_A_BYTE) as reply, open(target, "wb") as file:
        size, read = int(reply.headers.get("Content-Length") or 0), 0
        with Progress(f"fetching {target.name}", max(size >> 20, 1), "MiB") as progress:
            while block := reply.read(1 << 20):
                file.write(block)
                read += len(block)
                if read >> 20 > progress.done:
                    progress.update((read >> 20) - progress.done)
    if read < size:
        raise OSError(f"the connection ended after {read} of {size} bytes")
