"""How long a call takes: on the GPU, by events and by graph replay, and on the host, without waiting for the GPU.

    events   CUDA events around several calls: what the GPU takes, or the host where that is slower
    graph    the call captured as a CUDA graph and replayed: the GPU alone
    host     the clock around several calls that are not waited for: Python, autograd and launches alone
    clock    the clock around one call that is waited for: what a user sees

Ways of one case are timed in turns (A B A B), so that a machine that drifts drifts for all of them. In a rehearsal on a
CPU all are the clock's time of a call.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bench import lora_layers
from bench.gpu import record

Way = Callable[[], object]
KINDS = ("events", "graph", "host")
# A queue holds about a thousand launches before a launch waits for the GPU; a layer takes about thirty.
CALLS_UNWAITED = 8
# Seconds before the step's end at which no further round begins.
SPARE = 5.0
# Cycles of the GPU's clock that a spin takes while the host queues its calls: about 5 ms.
SPIN = 10_000_000


def times(
    ways: Mapping[str, Way], kinds: tuple[str, ...] = KINDS, rounds: int = 7, calls: int = 5
) -> dict[str, dict[str, list[float]]]:
    """way -> kind -> seconds a call, `rounds` readings of each; a kind that a way cannot give is left out, with a line.

    Each way is called twice beforehand, so that nothing is compiled in a reading.
    """
    if record.rehearsal():
        # An interpreted kernel takes long, and what it takes means nothing: one call serves all kinds.
        read = {name: _by_the_clock(way)() for name, way in ways.items()}
        return {name: {kind: [seconds] for kind in kinds} for name, seconds in read.items()}
    for way in ways.values():
        way()
        way()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    # Replays last: a capture that failed can leave torch's generator and allocator as they are within one.
    for kind in sorted(kinds, key=lambda kind: kind == "graph"):
        readers: dict[str, Callable[[], float]] = {}
        for name, way in ways.items():
            # A way that waits for the GPU, or allocates as no graph may, has no time by replay: the others stand.
            with _told(f"{name} [{kind}]"):
                readers[name] = READERS[kind](way, calls)
        for _ in range(rounds):
            for name in list(readers):
                once = readers.pop(name)
                with _told(f"{name} [{kind}]"):
                    found[name].setdefault(kind, []).append(once())
                    readers[name] = once
            # Fewer readings are better than a step that was ended before it said anything.
            if record.remaining() < SPARE:
                break
    return {name: {kind: seconds for kind, seconds in of.items() if seconds} for name, of in found.items()}


@contextmanager
def _told(case: str) -> Iterator[None]:
    """What fails within the block is skipped, with a line; but what a GPU that no longer answers raises."""
    try:
        yield
    except RuntimeError as error:
        record.skipped(case, " ".join(str(error).split())[:200])
        torch.cuda.synchronize()


def _by_the_clock(way: Way) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        way()
        return time.perf_counter() - began

    return once


def _by_events(way: Way, calls: int) -> Callable[[], float]:
    def once() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The queue fills while the GPU spins, so a reading does not begin with the host's first launch.
        torch.cuda._sleep(SPIN)
        began.record()
        for _ in range(calls):
            way()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / calls

    return once


def _by_replay(way: Way, calls: int) -> Callable[[], float]:
    graph = captured(way)

    def once() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        began.record()
        for _ in range(calls):
            graph.replay()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / calls

    return once


def captured(way: Way) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, warmed up on a side stream as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        way()
        way()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block puts the stream back where a capture fails, which torch's own does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        way()
    return graph


def _unwaited(way: Way, calls: int) -> Callable[[], float]:
    calls = min(calls, CALLS_UNWAITED)

    def once() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            way()
        took = time.perf_counter() - began
        torch.cuda.synchronize()
        return took / calls

    return once


def _waited(way: Way, calls: int) -> Callable[[], float]:
    del calls

    def once() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return once


READERS = {"events": _by_events, "graph": _by_replay, "host": _unwaited, "clock": _waited}


def say(case: str, found: dict[str, dict[str, list[float]]], **facts: Any) -> dict[str, dict[str, float]]:
    """Every way's times as results, "CASE | WAY [KIND]"; returns the medians, way -> kind -> seconds."""
    return {
        name: {
            kind: record.spread(f"{case} | {name} [{kind}]", "s", seconds, way=name, timed_by=kind, **facts)
            for kind, seconds in of.items()
        }
        for name, of in found.items()
    }


def over(medians: dict[str, dict[str, float]], base: str, kind: str) -> dict[str, float]:
    """Per cent that each other way takes over `base`, by one kind of time."""
    if kind not in medians.get(base, {}):
        return {}
    return {
        name: 100 * (of[kind] / medians[base][kind] - 1) for name, of in medians.items() if name != base and kind in of
    }


@contextmanager
def synchronised() -> Iterator[None]:
    """A wait for the GPU at both ends, where there is one."""
    if not record.rehearsal():
        torch.cuda.synchronize()
    yield
    if not record.rehearsal():
        torch.cuda.synchronize()


def kernels(way: Way) -> dict[str, tuple[int, float]]:
    """Kernel name -> (launches, seconds in all) of one call, by torch's profiler; {} in a rehearsal."""
    if record.rehearsal():
        return {}
    from torch.profiler import ProfilerActivity, profile

    # The first profile of a process can miss kernels while the profiler starts.
    for _ in range(2):
        way()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            way()
            torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    events: Any = profiled.events()
    for event in events:
        if "CUDA" in str(event.device_type):
            count, seconds = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, seconds + event.time_range.elapsed_us() / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def peak_bytes(way: Way) -> int:
    """Device memory that one call takes at its peak beyond what was there; 0 in a rehearsal."""
    return 0 if record.rehearsal() else lora_layers.peak_bytes(way)
