"""csrc's shared libraries: find them beside this file, load them with ctypes, call them, say what is there.

`lorapar_cpu` works on host memory, `lorapar_cuda` on a CUDA device's; both export the functions of
csrc/lorapar.h. They are built by `pip install` (setup.py) where a compiler is found. ctypes releases the GIL
during a call.
"""

import ctypes
import functools
import os
import shutil
import warnings
from pathlib import Path

import torch

from .backend import old_gpu

ABI_VERSION = 7  # LORAPAR_ABI_VERSION of the header that the signatures below were written from
KINDS = ("cpu", "cuda")

# The statuses that a caller answers with words of its own.
ERROR_SCORE, ERROR_ZERO, ERROR_COUNT = 5, 6, 8

# name -> (argument types, result type), as in csrc/lorapar.h, a dict a topic. Pointers travel as void *: they come from
# data_ptr(). The last argument of what does work is `queue`, which `call` supplies.
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
QUEUE, STATUS = ctypes.c_ssize_t, ctypes.c_int
LIBRARY = {
    "lorapar_abi_version": ([], ctypes.c_int),
    "lorapar_build": ([], ctypes.c_char_p),
    "lorapar_error_string": ([STATUS], ctypes.c_char_p),
}
BITMASK = {
    "lorapar_pack_mask": ([POINTER, SIZE, POINTER, QUEUE], STATUS),
    "lorapar_unpack_mask": ([POINTER, SIZE, POINTER, QUEUE], STATUS),
    "lorapar_index_mask": ([POINTER, SIZE, POINTER, QUEUE], STATUS),
}


class Scores(ctypes.Structure):
    """lorapar_scores."""

    _fields_ = (("scores", POINTER), ("among", POINTER), ("keep", POINTER), ("n", SIZE))


class Cut(ctypes.Structure):
    """lorapar_cut."""

    _fields_ = (("bits", ctypes.c_uint32), ("ties", SIZE), ("equals", SIZE))


SELECTION = {
    "lorapar_selection_workspace": ([POINTER, SIZE], SIZE),
    "lorapar_top_mass": ([POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, SIZE, QUEUE], STATUS),
    "lorapar_top_count": ([POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, QUEUE], STATUS),
    "lorapar_keep": ([POINTER, SIZE, POINTER, POINTER, SIZE, QUEUE], STATUS),
    "lorapar_tile_sums": ([POINTER, SIZE, SIZE, SIZE, SIZE, POINTER, QUEUE], STATUS),
}


class AdamWTensor(ctypes.Structure):
    """lorapar_adamw_tensor."""

    _fields_ = (
        *((name, POINTER) for name in ("param", "grad", "mask", "before", "exp_avg", "exp_avg_sq")),
        *((name, POINTER) for name in ("scales", "compensation")),
        *((name, SIZE) for name in ("n", "active")),
    )


class AdamWSettings(ctypes.Structure):
    """lorapar_adamw_settings."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("step", SIZE),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("maximize", "stochastic", "param_type", "grad_type")),
        *((name, POINTER) for name in ("grad_scale", "skipped", "step_at", "lr_at")),
        ("step_type", ctypes.c_int32),
    )


MASKED_ADAMW = {"lorapar_masked_adamw": ([POINTER, SIZE, POINTER, QUEUE], STATUS)}
DROPOUT = {
    "lorapar_dropout_mask": ([POINTER, SIZE, INT, POINTER, QUEUE], STATUS),
    "lorapar_zero_dropped": ([POINTER, INT, SIZE, POINTER, INT, POINTER, QUEUE], STATUS),
}
SIGNATURES = LIBRARY | BITMASK | SELECTION | MASKED_ADAMW | DROPOUT


def path(kind: str) -> Path:
    """Where the library of this kind is looked for."""
    return Path(__file__).with_name(f"liblorapar_{kind}.so")


def open_library(file: Path) -> ctypes.CDLL:
    """Load one library and declare its functions; OSError where it cannot serve."""
    library = ctypes.CDLL(str(file))
    for name, (arguments, result) in SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"{file} has no function {name}: build it again (pip install)") from None
        function.argtypes, function.restype = arguments, result
    version = library.lorapar_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"{file} has ABI version {version}, expected {ABI_VERSION}: build it again (pip install)")
    return library


@functools.cache
def load(kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of this kind and None, or None and the reason; looked for once a process.

    A library that is not there is a choice of the installation; one that is there and does not load is a
    fault, and warns, since the reference then serves in its place.
    """
    file = path(kind)
    if not file.exists():
        return None, f"{file} is not there: at the install its compiler was not found, or failed"
    try:
        return open_library(file), None
    except OSError as error:
        warnings.warn(f"the native {kind} library cannot be used: {error}", RuntimeWarning, stacklevel=2)
        return None, str(error)


def obstacle(device: torch.device) -> str | None:
    """Why no native function can work on this device's tensors; None when one can."""
    if device.type not in KINDS:
        return f"there is no native library for {device.type} tensors"
    reason = load(device.type)[1]
    return old_gpu(device) if reason is None and device.type == "cuda" else reason


def selection_workspace(device: torch.device, table: ctypes.Array) -> torch.Tensor:
    """Working memory for csrc's selection of this table, from torch's allocator.

    The allocator reuses memory in the order of the current stream, on which csrc queues its work, so the tensor may be
    dropped when the call has returned.
    """
    library, reason = load(device.type)
    if library is None:
        raise RuntimeError(reason)
    size = library.lorapar_selection_workspace(table, len(table))
    return torch.empty(size, dtype=torch.uint8, device=device)


def status_of(function: str, device: torch.device, *arguments: object) -> int:
    """Call lorapar_<function>(*arguments, queue) on `device`; returns its status, 0 for no error.

    On CUDA the queue is torch's current stream, on the CPU the number of threads that torch uses.
    """
    library, reason = load(device.type)
    if library is None:
        raise RuntimeError(reason)
    native = getattr(library, f"lorapar_{function}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            return native(*arguments, torch.cuda.current_stream(device).cuda_stream)
    return native(*arguments, torch.get_num_threads())


def call(function: str, device: torch.device, *arguments: object) -> None:
    """`status_of`, and `check_status` of it."""
    check_status(function, device, status_of(function, device, *arguments))


def check_status(function: str, device: torch.device, status: int) -> None:
    """RuntimeError in the library's words where a function's status is not 0."""
    if status != 0:
        library, _ = load(device.type)
        said = library.lorapar_error_string(status).decode()  # type: ignore[union-attr]
        raise RuntimeError(f"native {function} failed with status {status}: {said}")


def status() -> dict[str, dict[str, object]]:
    """What `lorapar doctor` shows: where each library is, its build or why it is out; the compilers.

    {"cpu": {"path": str, "loaded": bool, "build": str | None, "reason": str | None}, "cuda": {...},
     "compilers": {"c++": str | None, "nvcc": str | None}}
    """
    report: dict[str, dict[str, object]] = {}
    for kind in KINDS:
        library, reason = load(kind)
        build = library.lorapar_build().decode() if library is not None else None
        report[kind] = {
            "path": str(path(kind)),
            "loaded": library is not None,
            "build": build,
            "reason": reason,
        }
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    report["compilers"] = {"c++": cxx, "nvcc": os.environ.get("NVCC") or shutil.which("nvcc")}
    return report
