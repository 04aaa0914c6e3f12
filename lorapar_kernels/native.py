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
from torch import Tensor

ABI_VERSION = 1  # LORAPAR_ABI_VERSION of the header that the signatures below were written from
KINDS = ("cpu", "cuda")

# name -> (argument types, result type), as in csrc/lorapar.h. Pointers travel as void *: they come from
# data_ptr().
_pointer, _size = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "lorapar_abi_version": ([], ctypes.c_int),
    "lorapar_build": ([], ctypes.c_char_p),
    "lorapar_error_string": ([ctypes.c_int], ctypes.c_char_p),
    "lorapar_pack_mask": ([_pointer, _size, _pointer, _pointer], ctypes.c_int),
    "lorapar_unpack_mask": ([_pointer, _size, _pointer, _pointer], ctypes.c_int),
    "lorapar_count_mask": ([_pointer, _size, _pointer, _pointer], ctypes.c_int),
}


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
    return load(device.type)[1]


def call(function: str, device: torch.device, *arguments: int) -> None:
    """Call lorapar_<function>(*arguments, stream) on `device`; RuntimeError in the library's words."""
    library, reason = load(device.type)
    if library is None:
        raise RuntimeError(reason)
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            status = getattr(library, f"lorapar_{function}")(*arguments, stream)
    else:
        status = getattr(library, f"lorapar_{function}")(*arguments, None)
    if status != 0:
        said = library.lorapar_error_string(status).decode()
        raise RuntimeError(f"native {function} failed with status {status}: {said}")


def pack_mask(mask: Tensor) -> Tensor:
    """`bitmask.pack_mask` by the native library; the mask is contiguous."""
    words = torch.empty((mask.numel() + 31) // 32, dtype=torch.int32, device=mask.device)
    call("pack_mask", mask.device, mask.data_ptr(), mask.numel(), words.data_ptr())
    return words


def unpack_mask(words: Tensor, shape: torch.Size) -> Tensor:
    """`bitmask.unpack_mask` by the native library; words are contiguous and checked."""
    mask = torch.empty(shape, dtype=torch.bool, device=words.device)
    call("unpack_mask", words.device, words.data_ptr(), mask.numel(), mask.data_ptr())
    return mask


def count_mask(words: Tensor, n: int) -> Tensor:
    """`bitmask.count_mask` by the native library, one int64 element; words are contiguous and checked."""
    count = torch.empty(1, dtype=torch.int64, device=words.device)
    call("count_mask", words.device, words.data_ptr(), n, count.data_ptr())
    return count


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
