"""A teacher: a model that is asked in words. `await ask(prompt)` returns its reply or raises `CallFailed`.

endpoint.py has the one behind a `base_url`, local.py the one that runs here; `panel.make_teacher` chooses.
"""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class Reply:
    """A teacher's reply; token counts are None where the endpoint does not report them."""

    text: str
    refusal: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass
class CallFailed(Exception):
    """A call without a reply, and why.

    `retry`: another try may help, after `retry_after` seconds where the server says so; `fatal`: no call of this
    teacher will succeed; `too_long`: this example exceeds its context; `again`: not a failure, call again immediately
    (the teacher has changed how it asks).
    """

    what: str
    retry: bool = True
    retry_after: float | None = None
    fatal: bool = False
    too_long: bool = False
    again: bool = False
    seconds: float = 0.0  # that the call took

    def __str__(self) -> str:
        return self.what


class Teacher(Protocol):
    """`identity` is what its votes are stored under, `max_tokens` the longest reply, `context` None where unknown.

    `check` refuses a teacher that cannot work before any call is paid for; `hide` removes its key from a text.
    """

    name: str
    identity: dict[str, Any]
    max_tokens: int
    context: int | None

    async def ask(self, prompt: str) -> Reply: ...
    async def check(self) -> None: ...
    async def close(self) -> None: ...
    def hide(self, text: str) -> str: ...
