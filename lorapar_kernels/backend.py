"""Which implementation of an op runs: the best that can, or the one that LORAPAR_BACKEND names, or an error.

    LORAPAR_BACKEND=reference   plain PyTorch: the specification, on every device
    LORAPAR_BACKEND=native      csrc's library (native.py)
    LORAPAR_BACKEND=triton      the Triton kernel

Unset, an op takes the first that can serve the call, in its own order of preference. Set, that one serves
every call or the call fails: a forced backend never falls back, so a benchmark or a test cannot measure
another one by accident.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch

# bf16 on the matrix cores, and the first GPUs that Triton still supports. csrc/cuda is built from sm_80 on, too: a GPU
# runs the code of its major version up to its minor one (8.6 and 8.9 that of sm_80), and the PTX serves the newer
# majors, 12.0 among them (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").
OLDEST = (8, 0)
BACKENDS = ("reference", "native", "triton")


class Choice(NamedTuple):
    """A backend that `choose` has chosen for a call of `op`, and why each other one cannot serve it (None: it can)."""

    op: str
    chosen: str
    others: dict[str, str | None]


_heard: ContextVar[list[Choice] | None] = ContextVar("heard", default=None)


def named(variable: str, allowed: Sequence[str]) -> str | None:
    """The word that an environment variable names, None where it is unset or empty; ValueError if it is not allowed."""
    name = os.environ.get(variable, "")
    if name and name not in allowed:
        raise ValueError(f"{variable} must be one of {', '.join(allowed)}, got {name!r}")
    return name or None


def forced() -> str | None:
    """The backend that LORAPAR_BACKEND names, None where it is unset or empty; else ValueError."""
    return named("LORAPAR_BACKEND", BACKENDS)


def no_obstacle() -> None:
    """The obstacle of a backend that has none."""


@functools.cache
def old_gpu(device: torch.device) -> str | None:
    """Why the kernels cannot run on this CUDA device, which is too old for them, or not there; else None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= OLDEST:
        return None
    return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or newer, this GPU has {major}.{minor}"


@contextlib.contextmanager
def listening() -> Iterator[list[Choice]]:
    """The choices made within the block, in their order."""
    choices: list[Choice] = []
    token = _heard.set(choices)
    try:
        yield choices
    finally:
        _heard.reset(token)


def choose(op: str, obstacles: Mapping[str, Callable[[], str | None]]) -> str:
    """The backend for one call of `op`.

    Args:
        obstacles: backend -> a function that says why it cannot serve this call (None: it can), the preferred
            one first. A backend that is not listed is not implemented for the op.

    Raises ValueError, with the obstacle, where LORAPAR_BACKEND forces a backend that cannot serve.
    """
    chosen = _chosen(op, obstacles)
    choices = _heard.get()
    if choices is not None:
        others = {backend: obstacle() for backend, obstacle in obstacles.items() if backend != chosen}
        choices.append(Choice(op, chosen, others))
    return chosen


def _chosen(op: str, obstacles: Mapping[str, Callable[[], str | None]]) -> str:
    name = forced()
    if name is None:
        return next(backend for backend, obstacle in obstacles.items() if obstacle() is None)
    if name not in obstacles:
        raise ValueError(f"LORAPAR_BACKEND={name} cannot serve {op}, which has {' and '.join(obstacles)} only")
    reason = obstacles[name]()
    if reason is not None:
        raise ValueError(f"LORAPAR_BACKEND={name} cannot serve {op}: {reason}")
    return name
