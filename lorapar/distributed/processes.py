"""The processes of a launch: which one this is, and what they tell one another.

Words, decisions and short results go through the store at which the processes have met, and never through a collective:
a collective ends a run after ten minutes (NCCL's limit), and how long the others take is nobody's fault. So whoever has
nothing to do waits here, for as long as it takes. Tensors go through collectives, right after everybody has come.

Without a launch there is one process, and nothing is said or waited for.
"""

import inspect
import itertools
import logging
import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("lorapar")
T = TypeVar("T")
LONGEST_POLL = 0.1  # seconds between two looks at the store
SAY_AFTER = 60.0  # seconds after which a process says whom it waits for
PIECE = 4 << 20  # bytes; the store breaks off at 8 MiB
_rounds = itertools.count()  # every process takes the same ones, in the same order
_waited = 0.0
_pieces = 0  # of this process's words in the round before


def count() -> int:
    """How many processes there are; 1 where there is no process group."""
    return dist.get_world_size() if have_met() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if have_met() else 0


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def have_met() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def store() -> Any:
    """The store at which the processes have met; where torchrun starts them again, without the words of before."""
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    return dist.distributed_c10d.PrefixStore(f"lorapar/{attempt}", dist.distributed_c10d._get_default_store())


def share(items: Sequence[T]) -> list[T]:
    """This process's part of what all have: every so many-th, so that what lies in order of length is shared evenly."""
    return list(items[rank() :: count()])


def rounds(items: Sequence[T]) -> list[T | None]:
    """`share`, and None at its end where another process has one more: what takes part in a collective (a forward of a
    sharded base) must come as often as the others."""
    mine = share(items)
    return [*mine, *[None] * (-(-len(items) // count()) - len(mine))]


def gather(value: T) -> list[T]:
    """What each process hands over, in the order of their ranks, in every process. Pickled: words and numbers, not
    tensors of a model's size."""
    global _waited, _pieces
    if count() == 1:
        return [value]
    number, meeting = next(_rounds), store()
    keys = [f"{number}/{other}" for other in range(count())]
    words = pickle.dumps((_caller(), value))
    pieces = [words[at : at + PIECE] for at in range(0, len(words), PIECE)]
    for place, piece in enumerate(pieces):
        meeting.set(f"{keys[rank()]}/{place}", piece)
    # Last, so that whoever sees it finds the pieces.
    meeting.set(keys[rank()], str(len(pieces)))
    began, said, pause = time.monotonic(), False, 1e-3
    while not meeting.check(keys):
        if not said and time.monotonic() - began > SAY_AFTER:
            said = True
            missing = [str(other) for other, key in enumerate(keys) if not meeting.check([key])]
            log.warning("%s: waiting for process %s of %d", _caller(), ", ".join(missing), count())
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL)
    _waited += time.monotonic() - began
    found = [_read(meeting, key) for key in keys]
    for other, (caller, _) in enumerate(found):
        if caller != _caller():
            raise RuntimeError(f"process {other} is in {caller}, and process {rank()} in {_caller()}: every process "
                               "of a launch makes the same calls in the same order")  # fmt: skip
    if number:
        # Whoever has come to this round has read all of the one before.
        before = f"{number - 1}/{rank()}"
        for key in (before, *(f"{before}/{place}" for place in range(_pieces))):
            meeting.delete_key(key)
    _pieces = len(pieces)
    return [value if other == rank() else theirs for other, (_, theirs) in enumerate(found)]


def _caller() -> str:
    """The function outside of this file that has something said."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"


def _read(meeting: Any, key: str) -> Any:
    return pickle.loads(b"".join(meeting.get(f"{key}/{place}") for place in range(int(meeting.get(key)))))


def wait() -> None:
    """Return once every process has come here, however long that takes."""
    gather(None)


def waited() -> float:
    """Seconds that this process has waited for others so far."""
    return _waited


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process; the others do not call it, and wait. What it raises is
    raised in all."""
    made: Any = None
    error: Exception | None = None
    if is_main():
        try:
            made = make()
        except Exception as raised:
            error = raised
    told = error if _can_be_told(error) else RuntimeError(f"{type(error).__name__}: {error}")
    made, told = gather((made, told if error is not None else None))[0]
    if error is not None:
        raise error
    if told is not None:
        raise told
    return cast(T, made)


def _can_be_told(error: Exception | None) -> bool:
    try:
        return repr(pickle.loads(pickle.dumps(error))) == repr(error)
    except Exception:
        return False


@torch.no_grad()
def sum_in_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over the processes, in their order and in fp64, so that it is the same in every process
    and in every run; rounded once, to the tensor's dtype."""
    if count() == 1:
        return list(tensors)
    wait()
    sums = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(count())]
        dist.all_gather(parts, tensor.contiguous())
        total = parts[0].double()
        for part in parts[1:]:
            total += part
        sums.append(total.to(tensor.dtype))
    return sums
