"""Peak memory of a stage: the CUDA allocator's where there is a GPU, else the process's resident set."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start a new peak. Outside Linux the resident set's peak cannot be reset: it is that of the whole process."""
    # Before its first use CUDA has no statistics, and asking for them by a device's number fails.
    for device in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # proc(5): 5 resets VmHWM


def peak_memory_bytes() -> int:
    """Bytes at the peak since the last reset; with GPUs, of the one of which this process took most."""
    if torch.cuda.is_available():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Unix alone has it

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def release_freed() -> None:
    """Give back to the system what is no longer used; a stage in the same process would seem to need it otherwise."""
    # Imported where bitsandbytes is: its layers' buffers outlive the model.
    bnb_weights = sys.modules.get("lorapar_kernels.bnb_weights")
    if bnb_weights is not None:
        bnb_weights.free_buffers()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed blocks


def give_back_large_blocks() -> None:
    """Have glibc return every block of 1 MiB or more to the system when it is freed.

    Recomputing keeps each layer's input between blocks that come and go, and the heap then holds three times what lives
    (bench/LOG.md). The price is a tenth of the time on a CPU. Nothing is done where there is no glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's, torch's on a CPU (a plain RuntimeError), or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def available_bytes(device: torch.device | str) -> int:
    """Bytes that this process can have: all of a GPU's memory; on a CPU what it has and what the system can add without
    swapping."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available + resident_bytes()


def resident_bytes() -> int:
    """Bytes of the process that are in memory now."""
    return psutil.Process().memory_info().rss
