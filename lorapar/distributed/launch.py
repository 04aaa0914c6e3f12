"""A launch of several processes: joined at its start, watched while it runs, and ended with one line.

torchrun and accelerate start the processes and say to each which one it is; torch's process group is how they meet.

    check()     another engine than DDP and FSDP2 is asked for: one line, before anything is loaded
    join()      the process group, and whether accelerate's configuration asks for FSDP2
    watching()  two threads see to it that a process that has failed, died or cannot be reached ends all the others

Who fails says why, and nobody else says anything: the others would only report that they were stopped. A process that
was killed says nothing, so the first that misses it does. Within a host that takes seconds; a host that is cut off is
missed after `LOST` seconds.
"""

import atexit
import contextlib
import datetime
import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import InputError
from . import processes

log = logging.getLogger("lorapar")
BEAT = 1.0  # seconds between two signs of life
LOST = 40.0  # seconds without one after which a process counts as lost
# Of a collective. A reward may take its time in one process, and whoever has died is noticed otherwise.
LIMIT = datetime.timedelta(hours=2)
# What gloo, NCCL and the store say of a connection whose other end has gone.
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
          "remote process exited", "failed to recv")  # fmt: skip
RESUMES = "the same command resumes from here"
INSTEAD = (
    "use DDP (torchrun, accelerate launch), or FSDP2 where the base is too large for one device (model.fsdp: true)"
)
# Engines of accelerate's configuration that cut up the model or take the optimizer's step.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO-1 to 3), which flattens the parameters that masks and the optimizer "
    "know by name",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which cuts layers apart",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or pipeline parallel), which "
    "cuts layers apart",
}
# What accelerate's FSDP configuration may say beside its version: the values that we go by, and what to do otherwise.
FSDP_HEEDED = {
    "FSDP_OFFLOAD_PARAMS": (("false",), "hold the base in 4 bits instead (lora.base: nf4)"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "set sft.gradient_checkpointing and grpo.gradient_checkpointing"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "a block's weights are given up after its forward"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "every process holds its part of each block"),
    "FSDP_IGNORED_MODULES": (("none", ""), "all but the decoder blocks stays whole"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("transformer_based_wrap",),
        "the decoder block is the unit: PEFT's fsdp_auto_wrap_policy, and a policy by size, wrap leaves whose weights "
        "our layers read outside of their forward",
    ),
}

_fsdp = False
_lock = threading.Lock()
_said = False
_ending: tuple[threading.Thread, bool] | None = None  # the thread that ends this process, and whether it says why


def check(environment: Mapping[str, str] = os.environ) -> None:
    """InputError where the launch asks for an engine that cannot train a partition."""
    for name, what in ENGINES.items():
        if environment.get(name, "false").lower() == "true":
            raise InputError(f"{name}: the launch asks for {what}; {INSTEAD}")
    if not accelerate_shards(environment):
        return
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"fsdp_version: got {version}, expected 2: FSDP1 flattens parameters, and masks and the "
                         "optimizer know them by name; set fsdp_version: 2 in accelerate's configuration")  # fmt: skip
    for name, (allowed, remedy) in FSDP_HEEDED.items():
        given = environment.get(name, allowed[0])
        if given.lower() not in allowed:
            raise InputError(f"{name.lower()}: got {given}, expected {allowed[0]}: {remedy}")


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= set(os.environ)


def accelerate_shards(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate's configuration asks for FSDP, and accelerate would do it itself."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def join(on_cpu: bool) -> None:
    """Meet the other processes of the launch, where there is one, and note whether it asks for FSDP2."""
    global _fsdp
    from accelerate import PartialState

    check()
    alone = os.environ.get("WORLD_SIZE", "1")
    if alone != "1" and not is_launched():
        raise InputError(f"WORLD_SIZE: got {alone} in the environment, but no RANK: start the processes with torchrun "
                         "or accelerate launch, or unset it")  # fmt: skip
    if accelerate_shards():
        # The sharding is ours (sharding.py): accelerate would put the adapter's parameters into it.
        _fsdp = True
        del os.environ["ACCELERATE_USE_FSDP"]
    given = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if given != "no" and os.environ.get("RANK", "0") == "0":
        log.warning(
            "mixed_precision: %s of accelerate's configuration is not heeded; sft.bf16 and grpo.bf16 are", given
        )
    if is_launched() and not processes.have_met():
        PartialState(cpu=on_cpu, timeout=LIMIT)


def shares(fsdp: bool) -> int:
    """Over how many processes the base is sharded; `model.fsdp`, or accelerate's configuration, asks for it.

    A plan has not met the others: it goes by how many there are to be.
    """
    planned = int(os.environ.get("WORLD_SIZE", "1"))
    count = processes.count() if processes.have_met() else planned
    return count if fsdp or _fsdp or accelerate_shards() else 1


class _Watch:
    """This process's signs of life, and a look at those of the others."""

    def __init__(self) -> None:
        self.store: Any = processes.store().clone()
        self.rank, self.count = processes.rank(), processes.count()
        here = _this_host()
        everybody = processes.gather((here, os.getpid()))
        self.siblings = {r: pid for r, (host, pid) in enumerate(everybody) if host == here and r != self.rank}
        self.seen = dict.fromkeys((r for r in range(self.count) if r != self.rank), (b"", time.monotonic()))
        self.reached = time.monotonic()
        self.stopped = threading.Event()
        # The store does not answer where its host is cut off, so another thread looks at the clock.
        for look in (self.beat, self.clock):
            threading.Thread(target=look, daemon=True, name=f"lorapar-{look.__name__}").start()

    def beat(self) -> None:
        number = 0
        while not self.stopped.wait(BEAT):
            number += 1
            try:
                self.store.set(f"alive/{self.rank}", str(number))
                if self.store.check(["end"]):
                    self.give_up(None, self.store.get("end").decode())
                for other, (value, _) in self.seen.items():
                    key = f"alive/{other}"
                    now = self.store.get(key) if self.store.check([key]) else b""
                    if now != value:
                        self.seen[other] = now, time.monotonic()
            except Exception:
                if self.stopped.is_set():
                    return
                # Its process has ended, and with it the store.
                self.give_up(f"the first process, or its machine, was lost; {RESUMES}")
            self.reached = time.monotonic()
            if line := who_died():
                self.give_up(line)

    def clock(self) -> None:
        last = time.monotonic()
        while not self.stopped.wait(BEAT):
            now = time.monotonic()
            if now - last > 10 * BEAT:
                # This process was stopped itself (Ctrl-Z, a suspended job), and its clock went on.
                self.reached = now
                self.seen = {other: (value, now) for other, (value, _) in self.seen.items()}
            last = now
            silent = [other for other, (_, at) in self.seen.items() if now - at > LOST and not self.runs(other)]
            if now - self.reached > LOST:
                self.give_up(f"the machine of the first process has not answered for {LOST:.0f} s; {RESUMES}")
            elif silent:
                self.give_up(f"{_named(silent)} has given no sign of life for {LOST:.0f} s; {RESUMES}")

    def runs(self, other: int) -> bool:
        """Whether a process of this host is there and not stopped: its threads may wait for one that holds Python."""
        pid = self.siblings.get(other)
        return pid is not None and _state(pid) not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)

    def dead(self) -> list[int]:
        """Processes of this host that have ended."""
        return [other for other, pid in self.siblings.items() if _state(pid) in (None, psutil.STATUS_ZOMBIE)]

    def give_up(self, line: str | None, why: str = "") -> None:
        """End this process, whatever its main thread waits for; None: another has said `why`."""
        if self.stopped.is_set():
            return
        if line is not None and not say_end(line):
            time.sleep(BEAT)  # the main thread may be about to say it
        # run.log has the libraries' warnings, and the terminal has not.
        warnings.warn(f"process {self.rank} ends: {line or why}", stacklevel=2)
        os._exit(1)


_watch: _Watch | None = None


def _state(pid: int) -> str | None:
    """psutil's word for a process of this host; None where there is none."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def _this_host() -> tuple[str, ...]:
    """What tells the processes that see one another apart from the rest: machines of one image may have one name, and
    containers of one machine do not see one another's processes."""
    facts = [socket.gethostname(), os.environ.get("GROUP_RANK", "")]
    with contextlib.suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return tuple(facts)


def _named(ranks: list[int]) -> str:
    return f"process {', '.join(map(str, ranks))} of {processes.count()}"


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """While the block runs, the end of one process is the end of all; nothing where there is one process."""
    global _watch
    if processes.count() == 1:
        yield
        return
    _watch = _Watch()
    try:
        yield
        # Who is ready earlier would be missed by the others.
        processes.wait()
        atexit.register(_leave)
    except BaseException as error:
        claim("".join(traceback.format_exception(error)))
        raise
    finally:
        _watch.stopped.set()


def _leave() -> None:
    """Close the connections at the end of a process that has nothing left to say: gloo may abort in a process whose
    peers have gone before it."""
    if processes.have_met():
        torch.distributed.destroy_process_group()


def say_end(line: str) -> bool:
    """Print the line that ends the launch, unless it was said already, by whichever process; returns whether it was
    printed. Where another thread of this process is about to say it, that is waited for."""
    global _said
    first = claim(line) and not _said
    if not first and _ending is not None and _ending[0] is not threading.current_thread():
        # Ending now would end that thread before it has spoken.
        _ending[0].join(5 * BEAT)
    if first:
        _said = True
        print(f"lorapar: {line}", file=sys.stderr, flush=True)
        if processes.count() > 1 and processes.is_main():
            time.sleep(2 * BEAT)  # the store may end with this process, and the others have to see in it why
    return first


def claim(why: str) -> bool:
    """Whether this thread is the one that ends the launch, and says why. Where nobody can be asked, each host's first
    process is."""
    global _ending
    if processes.count() == 1:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    with _lock:
        if _ending is None:
            _ending = threading.current_thread(), _is_first(why)
    thread, first = _ending
    return first and thread is threading.current_thread()


def _is_first(why: str) -> bool:
    answer = [os.environ.get("LOCAL_RANK", "0") == "0"]

    def ask() -> None:
        with contextlib.suppress(Exception):
            mine = f"process {processes.rank()}: {why[-processes.PIECE // 2 :]}".encode()
            answer[0] = processes.store().compare_set("end", "", mine) == mine

    # A store that is cut off does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(5.0)
    return answer[0]


def who_died(within: float = 0.0) -> str | None:
    """The line for processes of this host that have ended, or do so in the next seconds; None where all live.

    It is what a SIGTERM means that the launcher sends because another process has ended, and a lost connection.
    """
    until = time.monotonic() + within
    while _watch is not None:
        if dead := _watch.dead():
            return f"{_named(dead)} ended without a word (killed?); {RESUMES}"
        if time.monotonic() >= until:
            break
        time.sleep(0.05)
    return None


def what_was_lost(error: BaseException) -> str | None:
    """The line for an error that another process's end has caused; None where it is one of this process's own."""
    if processes.count() == 1:
        return None
    text = str(error)
    broken = next((words for words in BROKEN if words in text), None) if isinstance(error, RuntimeError) else None
    # Its end may show a moment after the connection's.
    return who_died(within=2.0 if broken else 0.0) or (
        f"the connection to another process was lost ({broken}); {RESUMES}" if broken else None
    )
