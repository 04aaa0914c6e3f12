"""A teacher that runs here: a transformers model that answers greedily; waiting questions are answered as one batch."""

import asyncio
import re
import threading
from typing import TYPE_CHECKING, Any

from ..data.tokens import prompt_ids
from ..errors import InputError
from ..model.generate import answer_greedily
from ..model.load import load_model, load_tokenizer
from ..model.positions import positions_of
from ..recipe.sections import ModelConfig
from .teacher import CallFailed, Reply

if TYPE_CHECKING:
    from ..recipe.sections import TeacherConfig

# How long a batch that is not full waits for more questions, in seconds; while a batch runs, the next one fills up.
GATHER_SECONDS = 0.02


class LocalTeacher:
    """A model by its name (a folder, a hub id, a .gguf file, an alias), loaded when it is first asked.

    `in_flight` is its batch size, `parameters.max_tokens` (128) how long a reply may be; there are no other parameters.
    """

    def __init__(self, config: "TeacherConfig", at: str):
        self.config, self.at = config, at
        self.name = config.name or config.model
        for key in ("api_key_env", "per_minute"):
            if getattr(config, key) is not None:
                raise InputError(f"{at}.{key}: only for a teacher behind a base_url; {self.name} runs here")
        for key in config.parameters:
            if key != "max_tokens":
                raise InputError(f"{at}.parameters.{key}: a local teacher has the parameter max_tokens alone; "
                                 "give base_url for an endpoint")  # fmt: skip
        self.max_tokens = config.parameters.get("max_tokens", 128)
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(f"{at}.parameters.max_tokens: got {self.max_tokens!r}, expected at least 1")
        self.identity = {"local": config.model, "parameters": {"max_tokens": self.max_tokens}}
        self.context = config.context
        self.tokenizer: Any = None
        self.model: Any = None
        self.waiting: list[tuple[list[int], asyncio.Future[str]]] = []
        self.worker: asyncio.Task[None] | None = None
        self.closed = threading.Event()

    def hide(self, text: str) -> str:
        return text

    def tokens(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(ModelConfig(self.config.model))
        chat = self.tokenizer.chat_template is not None
        return prompt_ids({"prompt": [{"role": "user", "content": prompt}] if chat else prompt}, self.tokenizer)

    async def check(self) -> None:
        """Load the model, so that a missing one is refused before another teacher is paid."""
        self.closed.clear()
        try:
            self.tokens("")
            self.model = await asyncio.to_thread(load_model, ModelConfig(self.config.model))
        except InputError as error:
            message = re.sub(r"^model\.(\w+)", rf"{self.at}.\1", str(error))
            raise InputError(f"{message}; a teacher without base_url is a local model") from None
        if self.context is None:
            self.context = positions_of(self.model.config)

    async def ask(self, prompt: str) -> Reply:
        ids = self.tokens(prompt)
        if self.context is not None and len(ids) + self.max_tokens > self.context:
            raise CallFailed(f"{len(ids)} + {self.max_tokens} tokens exceed {self.context}", retry=False, too_long=True)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((ids, future))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        text = await future
        return Reply(text, None, len(ids), len(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    async def _work(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        while self.waiting:
            batch, self.waiting = self.waiting[: self.config.in_flight], self.waiting[self.config.in_flight :]
            ids, futures = [ids for ids, _ in batch], [future for _, future in batch]
            try:
                texts = await asyncio.to_thread(
                    answer_greedily, self.model, self.tokenizer, ids, self.max_tokens, self.config.in_flight,
                    stopped=self.closed.is_set,
                )  # fmt: skip
            except Exception as error:
                # Raised where each reply is awaited, not here.
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, text in zip(futures, texts):
                if not future.done():
                    future.set_result(text)
            await asyncio.sleep(0)

    async def close(self) -> None:
        # A thread cannot be cancelled, and Ctrl-C would wait for the whole batch.
        self.closed.set()
        if self.worker is not None:
            self.worker.cancel()
        self.model = None
