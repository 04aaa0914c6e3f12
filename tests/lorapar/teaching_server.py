"""A chat endpoint on loopback that fails in every way endpoints do, and remembers all that it was asked and said.

Run as a process of its own, so that it outlives the clients that tests kill: `python -m tests.lorapar.teaching_server
'{"latency": 0.01}'` prints its port. What it says depends on model, question and how often it was asked alone.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

MODELS = ("ada", "bob", "cyd", "dee", "eve")
# Half of what can go wrong is no reply, the other half a reply that is no vote.
BROKEN = ("429", "500", "hang", "cut", "half")
UNREADABLE = ("cut_json", "prose", "refusal", "language", "both")
GOOD = ("json", "fenced", "loose", "spoken")


def share(*parts: object) -> float:
    """A number in [0, 1) that the parts alone decide."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def opinion(model: str, question: int) -> int:
    """What a model thinks of a question: 60 % of the questions have a side that most models take."""
    side = 1 if share("side", question) < 0.5 else 2
    return side if share("opinion", model, question) < 0.75 else 3 - side


def content(kind: str, vote: int) -> str:
    label = f"System{vote}"
    return {
        "json": json.dumps({"reason": "it is so", "system": label}),
        "fenced": f'Here you are:\n```json\n{{"system": "system {vote}", "reason": "a step"}}\n```',
        "loose": f'{{"reason": "cut behind the label", "system": "{label}", "note": "and th',
        "spoken": f"**System {vote}**, since it takes what it takes.",
        "cut_json": f'{{"reason": "System{vote} or System{3 - vote}, let me th',
        "prose": "That is a fine question about apples; many would think for a while.",
        "refusal": "I'm sorry, but I cannot help with that.",
        "language": "Dies ist eine Aufgabe, die in mehreren Schritten zu lösen ist.",
        "both": f"It could be System {vote}, but System {3 - vote} would do as well.",
    }[kind]


class Server:
    def __init__(self, settings: dict[str, Any]):
        self.latency = settings.get("latency", 0.01)
        self.fails = settings.get("fails", 0.0)
        self.hang = settings.get("hang", 1.0)
        self.settings = settings
        self.said: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.asked_at: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.in_flight: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.seen_keys: set[str] = set()
        self.parameters: list[dict[str, Any]] = []

    async def serve(self) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", self.settings.get("port", 0))
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head.splitlines()[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.seen_keys |= {
                    value for name, value in headers.items() if name == "authorization" or "openai" in name
                }
                path = head.split(" ", 2)[1]
                if path == "/tally":
                    self.send(writer, 200, self.tally())
                elif path.endswith("/models"):
                    self.send(writer, *self.models(headers))
                elif not await self.chat(writer, json.loads(body), headers):
                    break
                await writer.drain()
        writer.close()

    def tally(self) -> dict[str, Any]:
        return {"said": self.said, "asked_at": self.asked_at, "most": self.most,
                "keys": sorted(self.seen_keys), "parameters": self.parameters, "now": time.time()}  # fmt: skip

    def models(self, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if self.settings.get("key") and headers.get("authorization") != f"Bearer {self.settings['key']}":
            return 401, {"error": {"message": f"wrong key: {headers.get('authorization')}", "code": "invalid_api_key"}}
        extra = {"max_model_len": self.settings["context"]} if "context" in self.settings else {}
        return 200, {"object": "list", "data": [{"id": m, "object": "model", **extra} for m in MODELS]}

    def send(self, writer: asyncio.StreamWriter, status: int, value: Any, extra: str = "", cut: int = 0) -> None:
        data = json.dumps(value).encode()
        length = cut if cut else len(data)
        writer.write(f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n{extra}"
                     f"content-length: {length}\r\n\r\n".encode() + data[: cut or None])  # fmt: skip

    async def chat(self, writer: asyncio.StreamWriter, body: dict[str, Any], headers: dict[str, str]) -> bool:
        """One reply; False where the connection is to be cut."""
        model, prompt = body["model"], body["messages"][-1]["content"]
        others = {key: value for key, value in body.items() if key not in ("model", "messages", "response_format")}
        if others not in self.parameters:
            self.parameters.append(others)
        if self.settings.get("no_schema") and "response_format" in body:
            self.send(writer, 400, {"error": {"message": "response_format is not supported here"}})
            return True
        if self.settings.get("status"):
            echo = f"no: {headers.get('authorization')}" if self.settings.get("echo") else "no"
            self.send(writer, self.settings["status"], {"error": {"message": echo}})
            return True
        question = int(re.search(r"no\. (\d+)", prompt)[1])  # type: ignore[index]
        before = self.said[model][question]
        kind, which = "ok", share("kind", model, question, len(before))
        if which < self.fails:
            kinds = BROKEN + UNREADABLE
            kind = kinds[int(which / self.fails * len(kinds))]
        elif "first" in self.settings and not before:
            kind = self.settings["first"]
        else:
            kind = GOOD[int(share("form", model, question, len(before)) * len(GOOD))]
        before.append(kind)
        self.asked_at[model][question].append(time.time())
        # A client that has stopped listening has no call in flight.
        self.in_flight[model] += kind != "hang"
        self.most[model] = max(self.most[model], self.in_flight[model])
        try:
            await asyncio.sleep(self.hang if kind == "hang" else self.latency)
        finally:
            self.in_flight[model] -= kind != "hang"
        if kind == "429":
            pause = self.settings.get("pause", 0.05)
            self.send(writer, 429, {"error": {"message": "slow down"}}, f"retry-after: {pause}\r\n")
        elif kind == "500":
            self.send(writer, 500, {"error": {"message": "out of order"}})
        elif kind == "cut":
            return False
        else:
            form = "json" if kind in BROKEN else kind
            text = content(form, opinion(model, question))
            if self.settings.get("echo"):
                text = json.dumps({"reason": f"your key is {headers.get('authorization')}", "system": "System1"})
            usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 20, "total_tokens": len(prompt) // 4 + 20}
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice],
                     "usage": usage}  # fmt: skip
            self.send(writer, 200, reply, cut=60 if kind == "half" else 0)
        return True


@contextlib.contextmanager
def running(**settings: Any):
    """The base URL of a server in a process of its own, which ends with the block."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.lorapar.teaching_server", json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def tally(base_url: str) -> dict[str, Any]:
    """What the server was asked and said: said[model][question] lists the kinds of its replies."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/tally", timeout=60) as reply:
        found = json.loads(reply.read())
    for key in ("said", "asked_at"):
        found[key] = {model: {int(q): kinds for q, kinds in asked.items()} for model, asked in found[key].items()}
    return found


def requests_of(found: dict[str, Any]) -> int:
    """How many calls a tally holds."""
    return sum(len(kinds) for asked in found["said"].values() for kinds in asked.values())


def final_vote(kinds: list[str], model: str, question: int) -> int | None:
    """The vote in the last reply of several, None where it is none."""
    return opinion(model, question) if kinds[-1] in GOOD else None


if __name__ == "__main__":
    asyncio.run(Server(json.loads(sys.argv[1])).serve())
