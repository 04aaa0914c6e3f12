"""What every teacher is: a model that is asked in words, with a reply or a failed call as the outcome."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class Reply:
    """What a teacher said; token counts are None where the endpoint does not give them."""

    text: str
    refusal: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass
class CallFailed(Exception):
    """A call without a reply, and why.

    `retry`: another try may help, after `retry_after` seconds where the server says so; `fatal`: no call of this
    teacher will; `too_long`: this example exceeds its context; `again`: no failure, ask at once in the teacher's way.
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
    """A teacher: its `name`, the `identity` that its votes are stored under, and `max_tokens` it may answer with."""

    name: str
    identity: dict[str, Any]
    max_tokens: int
    context: int | None

    async def ask(self, prompt: str) -> Reply: ...
    async def check(self) -> None: ...
    async def close(self) -> None: ...
    def hide(self, text: str) -> str: ...
