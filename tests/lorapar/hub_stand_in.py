"""A stand-in for the hub on this machine: repositories, large files, commits and downloads, over its HTTP interface.

As huggingface_hub speaks it (create, preupload, LFS batch and upload, commit, resolve); Xet is not offered.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What is there, and what was asked. fails: {method and path, as a pattern: (status, message)}."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    fails: dict[str, tuple[int, str]] = field(default_factory=dict)
    url: str = ""
    server: ThreadingHTTPServer | None = None

    def start(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def answer(self, method: str) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.seen.append(f"{method} {path}")
        for pattern, (status, message) in hub.fails.items():
            if re.match(pattern, f"{method} {path}"):
                return self.reply(status, {"error": message})
        # An upload's address is its own pass; the rest needs the token.
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self.modes(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if method == "PUT":
                hub.large[found[1]] = body
            return self.reply(200, {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path)) and found[
            1
        ] in hub.repositories:
            held = hub.repositories[found[1]]
            head = yaml.safe_load([*held.get("README.md", b"").decode().split("---"), ""][1]) or {}
            return self.reply(
                200,
                {"id": found[1], "private": hub.private.get(found[1], False), "sha": "0" * 40,
                 "tags": head.get("tags", []), "siblings": [{"rfilename": name} for name in held]},
            )  # fmt: skip
        if (found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path)) and found[1] in hub.datasets:
            return self.reply(200, {"id": found[1], "private": False, "sha": "0" * 40})
        if re.fullmatch(r"/api/(models|datasets)/[^/]+/[^/]+", path):
            return self.reply(404, {"error": "Repository not found"}, code="RepoNotFound")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(method, hub.repositories.get(found[1], {}).get(found[2]))
        return self.reply(404, {"error": "Not found"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = {}
        self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.reply(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def modes(self, asked: dict[str, Any]) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False}
            for file in asked["files"]
        ]  # fmt: skip
        return self.reply(200, {"files": modes})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            actions = {name: {"href": f"{self.hub.url}/lfs/{one['oid']}"} for name in ("upload", "verify")}
            objects.append({**one, "actions": actions})
        return self.reply(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        named = []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del self.hub.repositories[name][value["path"]]
                named.append(f"-{value['path']}")
                continue
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            else:
                content = self.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.hub.repositories[name][value["path"]] = content
            named.append(value["path"])
        self.hub.commits.append((lines[0]["value"]["summary"], named))
        url = f"{self.hub.url}/{name}/commit/{'0' * 40}"
        return self.reply(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def file(self, method: str, content: bytes | None) -> None:
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(content)

    def reply(self, status: int, value: dict[str, Any], kind: str = "application/json", code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
