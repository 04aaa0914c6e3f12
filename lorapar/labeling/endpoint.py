"""A teacher behind an OpenAI-compatible endpoint.

Its key comes from an environment variable and goes to the client alone; every text that comes back passes `hide`,
because servers repeat keys in their errors.
"""

import asyncio
import email.utils
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import InputError, nearest, not_installed
from .parsing import SCHEMA
from .teacher import CallFailed, Reply

if TYPE_CHECKING:
    from ..recipe.sections import TeacherConfig

log = logging.getLogger("lorapar")

# How long reading an endpoint's list of models, which is free, may take, in seconds.
CHECK_SECONDS = 10.0
# What endpoints call a model's context in their list of models: vLLM, OpenRouter, Groq, llama.cpp's proxy.
CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length")
DEFAULT_MAX_TOKENS = 256
TOO_LONG = re.compile(
    r"context.{0,12}(?:length|window|size)|maximum context|too many tokens|(?:prompt|input) is too long"
)


class EndpointTeacher:
    """A chat model behind `base_url`: hosted, or vLLM, llama.cpp, Ollama, `transformers serve`, ..."""

    def __init__(self, config: "TeacherConfig", at: str):
        self.config, self.at = config, at
        self.name = config.name or config.model
        self.key = _key_of(config, at)
        try:
            import openai
        except ModuleNotFoundError:
            raise InputError(f"{at}: an endpoint needs {not_installed('openai, which', 'teachers')}") from None
        self.openai = openai
        self.client: Any = None
        self.structured = config.structured != "none"
        self.context = config.context
        limits = [config.parameters.get(key) for key in ("max_completion_tokens", "max_tokens")]
        self.max_tokens = next((limit for limit in limits if isinstance(limit, int)), DEFAULT_MAX_TOKENS)
        self.identity = {
            "base_url": (config.base_url or "").rstrip("/"),
            "model": config.model,
            "parameters": config.parameters,
            "structured": config.structured,
        }

    def _client(self) -> Any:
        if self.client is None:
            # The client's own retries are off: ours apply Retry-After to all calls of the teacher.
            self.client = self.openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.config.base_url,
                max_retries=0,
                timeout=self.config.timeout,
            )
            if not (urlsplit(self.config.base_url or "").hostname or "").endswith("openai.com"):
                # What the client reads from OPENAI_ORG_ID and its like is not for other hosts.
                self.client.organization = self.client.project = self.client.admin_api_key = None
        return self.client

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()
            self.client = None

    def hide(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text

    async def check(self) -> None:
        """Read the endpoint's list of models, which is free. InputError for a key or model that it does not accept,
        CallFailed where it cannot be reached; an endpoint without a list passes."""
        openai = self.openai
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                page = await self._client().models.list()
        except openai.AuthenticationError as error:
            raise InputError(
                f"{self._key_place()} is refused by {self.config.base_url}: {self._message(error)}"
            ) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            raise CallFailed(self._connection(error)) from None
        except (openai.OpenAIError, ValueError):
            return
        listed = [model for model in getattr(page, "data", None) or [] if getattr(model, "id", None)]
        names = [str(model.id) for model in listed]
        wanted = self.config.model
        mine = next((m for m, name in zip(listed, names) if name in (wanted, f"{wanted}:latest")), None)
        if names and mine is None and self.config.check_model:
            near = nearest(wanted, names, count=3) or names[:5]
            raise InputError(f"{self.at}.model: {self.config.base_url} lists no model {wanted!r}, but "
                             f"{', '.join(near)}; check_model: false asks it all the same")  # fmt: skip
        if mine is not None and self.context is None:
            known = [(getattr(mine, "model_extra", None) or {}).get(key) for key in CONTEXT_KEYS]
            self.context = next((size for size in known if isinstance(size, int) and size > 0), None)

    async def ask(self, prompt: str) -> Reply:
        openai, structured = self.openai, self.structured
        body = {"model": self.config.model, "messages": [{"role": "user", "content": prompt}], **self.config.parameters}
        if structured:
            schema = {"name": "vote", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            # The client's own timeout is for each read, this one for the whole call. `post` in place of
            # `chat.completions.create`, which spends half of a call's CPU time on converting a body that is plain
            # already, and on turning the reply into objects.
            async with asyncio.timeout(self.config.timeout):
                reply = await self._client().post("/chat/completions", cast_to=object, body=body)
        except openai.APIStatusError as error:
            return self._outcome_of(error, structured)
        except (openai.APIConnectionError, TimeoutError) as error:
            raise CallFailed(self._connection(error)) from None
        # ValueError: a body that is no JSON, or JSON cut short.
        except (openai.OpenAIError, ValueError) as error:
            raise CallFailed(f"a reply that is not JSON ({type(error).__name__})") from None
        try:
            choice = reply["choices"][0]
            content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            usage = reply.get("usage") or {}
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        except (LookupError, TypeError, AttributeError):
            raise CallFailed("a reply without a message") from None
        if not isinstance(content, str | None) or not isinstance(refusal, str | None):
            raise CallFailed("a reply without a message")
        if not refusal and choice.get("finish_reason") == "content_filter":
            refusal = "content filter"
        tokens_in, tokens_out = (count if isinstance(count, int) else None for count in counts)
        return Reply(self.hide(content or ""), self.hide(refusal) if refusal else None, tokens_in, tokens_out)

    def _outcome_of(self, error: Any, structured: bool) -> Reply:
        """Raise whether an HTTP error allows another try, and how; a content filter's error is a reply, a refusal."""
        status, message = error.status_code, self._message(error)
        code, lower = str(error.code or ""), f"{error.code} {error.message}".casefold()
        what = f"HTTP {status}: {message}"
        if status in (400, 404, 413, 422):
            if code == "content_filter" or "content_filter" in lower:
                return Reply("", refusal=message)
            if "context_length" in code or TOO_LONG.search(lower):
                raise CallFailed(what, retry=False, too_long=True) from None
            if structured and self.config.structured == "auto" and re.search(r"response_format|json_schema", lower):
                if self.structured:
                    log.warning("label: %s: takes no JSON schema (%s); asking without one", self.name, what)
                self.structured = False
                raise CallFailed(what, again=True) from None
            missing = status == 404 or "model_not_found" in code
            raise CallFailed(what, retry=False, fatal=missing) from None
        if status in (401, 402, 403) or "insufficient_quota" in code:
            raise CallFailed(what, retry=False, fatal=True) from None
        retry = status in (408, 409, 425, 429) or status >= 500
        raise CallFailed(what, retry=retry, retry_after=retry_after(error.response.headers)) from None

    def _message(self, error: Any) -> str:
        return self.hide(" ".join(str(error.message).split()))[:300]

    def _connection(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError | self.openai.APITimeoutError):
            return "timed out"
        cause = error.__cause__ or error
        return self.hide(" ".join(f"no connection: {cause or type(cause).__name__}".split()))[:300]

    def _key_place(self) -> str:
        return f"{self.at}.api_key_env: " + (f"the key in {self.config.api_key_env}" if self.key else "no key, which")


def _key_of(config: "TeacherConfig", at: str) -> str | None:
    name = config.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(f"{at}.api_key_env: the environment variable {name} is not set; set it to the key of "
                         f"{config.name or config.model}")  # fmt: skip
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{at}.api_key_env: what {name} holds is no key: it has spaces or other odd characters")
    return key


def retry_after(headers: Any) -> float | None:
    """Seconds to wait by `Retry-After` (seconds or a date, RFC 9110) or `retry-after-ms`; None where neither says."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            continue
    return None
