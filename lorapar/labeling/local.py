"""A teacher that runs here: a transformers model that answers greedily; waiting questions are answered as one batch.

In a launch the main process alone asks the panel, and knows what is in the store, what a stop has made needless and
what may be spent. The other processes help its local teachers: in `help_with` each answers the batches that it is
handed, with a model of its own. So every question is asked once, and only if it is needed. Batches and replies go
through the store at which the processes have met.
"""

import asyncio
import itertools
import pickle
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..data.tokens import prompt_ids
from ..distributed import processes
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
# Between two looks at whether a batch, or its reply, has come from another process, in seconds: at first, and at most.
POLL_SECONDS = (1e-3, 0.05)
# By helping process, the numbers of the batches it is handed; both sides count, over the life of the process.
_batches: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
_LOADING = threading.Lock()


class LocalTeacher:
    """A model by its name (a folder, a hub id, a .gguf file, an alias), loaded when it is first asked.

    `in_flight` is its batch size, `parameters.max_tokens` (128) how long a reply may be; there are no other parameters.
    `helpers`: the processes that are in `help_with` and answer batches too; `number`: its place among their teachers.
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
        self.helpers: Sequence[int] = ()
        self.number = 0
        self.workers: dict[int, asyncio.Task[None]] = {}
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
            self.model = await asyncio.to_thread(_load, self.config.model)
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
        for rank in (processes.rank(), *self.helpers):
            if rank not in self.workers or self.workers[rank].done():
                self.workers[rank] = asyncio.create_task(self._work(rank))
        text = await future
        return Reply(text, None, len(ids), len(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    async def _work(self, rank: int) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        while self.waiting:
            batch, self.waiting = self.waiting[: self.config.in_flight], self.waiting[self.config.in_flight :]
            ids, futures = [ids for ids, _ in batch], [future for _, future in batch]
            try:
                if rank == processes.rank():
                    texts = await asyncio.to_thread(self.answer, ids)
                else:
                    texts = await _answered_by(rank, self.number, ids)
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

    def answer(self, ids: list[list[int]]) -> list[str]:
        """The replies to one batch of prompts."""
        return answer_greedily(
            self.model, self.tokenizer, ids, self.max_tokens, self.config.in_flight, stopped=self.closed.is_set
        )  # fmt: skip

    async def close(self) -> None:
        # A thread cannot be cancelled, and Ctrl-C would wait for the whole batch.
        self.closed.set()
        for worker in self.workers.values():
            worker.cancel()
        self.model = None


def _load(name: str) -> Any:
    # One at a time: while it loads, torch's default dtype is the model's, for every thread.
    with _LOADING:
        return load_model(ModelConfig(name))


@contextmanager
def helped(teachers: Sequence[LocalTeacher]) -> Iterator[None]:
    """In the main process: have the others, which are in `help_with`, answer batches of these teachers meanwhile."""
    helpers = range(1, processes.count()) if teachers else ()
    for number, teacher in enumerate(teachers):
        teacher.helpers, teacher.number = helpers, number
    try:
        yield
    finally:
        for teacher in teachers:
            teacher.helpers = ()
        for rank in helpers:
            _hand(rank, None)


def help_with(teachers: Sequence[LocalTeacher]) -> None:
    """In the other processes: answer the batches that the main process hands over, until it needs no more help."""
    loaded = set()
    try:
        while teachers and (handed := _next_batch()) is not None:
            number, ids, reply_to = handed
            if number not in loaded:
                asyncio.run(teachers[number].check())
                loaded.add(number)
            processes.store().set(reply_to, pickle.dumps(teachers[number].answer(ids)))
    finally:
        for number in loaded:
            asyncio.run(teachers[number].close())


def _hand(rank: int, batch: tuple[int, list[list[int]]] | None) -> str:
    """Hand a batch (the teacher's number, its prompts), or the word that no more will come, to another process; the key
    of its reply."""
    key = f"teachers/{rank}/{next(_batches[rank])}"
    processes.store().set(key, pickle.dumps(batch))
    return f"{key}/reply"


async def _answered_by(rank: int, number: int, ids: list[list[int]]) -> list[str]:
    store, reply, pause = processes.store(), _hand(rank, (number, ids)), POLL_SECONDS[0]
    while not store.check([reply]):
        await asyncio.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])
    texts = pickle.loads(store.get(reply))
    store.delete_key(reply)
    return texts


def _next_batch() -> tuple[int, list[list[int]], str] | None:
    rank, store, pause = processes.rank(), processes.store(), POLL_SECONDS[0]
    key = f"teachers/{rank}/{next(_batches[rank])}"
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])
    batch = pickle.loads(store.get(key))
    store.delete_key(key)
    return None if batch is None else (*batch, f"{key}/reply")
