"""Tokens of several `generate` calls of one model, in turn, as they are made.

The base and each stage's result are one model with other adapters switched on. A batch of them would have to tell every
layer which of its rows has which adapter, and layers inside experts see tokens without rows. So each has a `generate`
call of its own, the one that evaluation makes, in a thread that waits between two tokens: only one runs at a time, and
the adapter is switched in between. That serves every architecture.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class _Ended(Exception):
    """Nobody asks for more tokens."""


class _Streamer:
    """What `generate` hands its tokens, the prompt's first: it is held up until the next token is asked for."""

    def __init__(self) -> None:
        # A token, None at the end, or what generate has raised.
        self.made: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.asked = threading.Semaphore(0)
        self.is_over = False
        self._seen_prompt = False

    def put(self, tokens: Any) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.made.put(int(tokens.reshape(-1)[-1]))
        self.wait()

    def wait(self) -> None:
        self.asked.acquire()
        if self.is_over:
            raise _Ended

    def end(self) -> None:
        """`generate` says so before it returns; what it returned tells it as well."""


def tokens_of(generate: Callable[[Any], Any]) -> Iterator[int]:
    """The tokens that `generate(streamer)` makes, a batch of one prompt; it runs only while the next one is waited for.

    What `generate` raises is raised here. Closing the iterator ends the call after the token that it is at.
    """
    streamer = _Streamer()

    def run() -> None:
        try:
            streamer.wait()
            generate(streamer)
            streamer.made.put(None)
        except _Ended:
            pass
        except BaseException as error:
            streamer.made.put(error)

    thread = threading.Thread(target=run, name="lorapar-chat")
    try:
        thread.start()
        while True:
            streamer.asked.release()
            token = streamer.made.get()
            if isinstance(token, BaseException):
                raise token
            if token is None:
                return
            yield token
    finally:
        streamer.is_over = True
        streamer.asked.release()
        # Ctrl-C may come before it has started.
        if thread.is_alive():
            thread.join()
