"""The processes of a launch: which one this is, and what they tell one another.

Words, decisions and short results go through the store at which the processes have met, and never through a collective:
a collective ends a run after ten minutes (NCCL's limit), and how long the others take is nobody's fault. So whoever has
nothing to do waits here, for as long as it takes. Tensors go through collectives, right after everybody has come.

Without a launch there is one process, and nothing is said or waited for.
"""

import itertools
import logging
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
_rounds = itertools.count()  # every process takes the same ones, in the same order
_waited = 0.0


def count() -> int:
    """How many processes there are; 1 where there is no process group."""
    return dist.get_world_size() if _is_launch() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if _is_launch() else 0


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def _is_launch() -> bool:
    return dist.is_available() and dist.is_initialized()


def store() -> Any:
    """The store at which the processes have met."""
    return dist.distributed_c10d._get_default_store()


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
    global _waited
    if count() == 1:
        return [value]
    number, meeting = next(_rounds), store()
    keys = [f"lorapar/{number}/{other}" for other in range(count())]
    meeting.set(keys[rank()], pickle.dumps(value))
    began, said, pause = time.monotonic(), False, 1e-3
    while not meeting.check(keys):
        if not said and time.monotonic() - began > SAY_AFTER:
            said = True
            missing = [str(other) for other, key in enumerate(keys) if not meeting.check([key])]
            log.info("waiting for process %s of %d", ", ".join(missing), count())
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL)
    _waited += time.monotonic() - began
    found = [value if other == rank() else pickle.loads(meeting.get(key)) for other, key in enumerate(keys)]
    if number and is_main():
        # Whoever has come to this round has read all of the one before.
        for other in range(count()):
            meeting.delete_key(f"lorapar/{number - 1}/{other}")
    return found


def wait() -> None:
    """Return once every process has come here, however long that takes."""
    gather(None)


def waited() -> float:
    """Seconds that this process has waited for others so far."""
    return _waited


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process; the others do not call it, and wait."""
    return cast(T, gather(make() if is_main() else None)[0])


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
