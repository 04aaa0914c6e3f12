"""What is installed, which devices there are, and which implementation of each operation runs here."""

import importlib.metadata
import os
import platform

import torch

import lorapar_kernels.native as native
from lorapar_kernels import backend

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "math-verify",
            "reasoning-gym", "gguf", "matplotlib", "bitsandbytes", "vllm")  # fmt: skip


def doctor() -> str:
    """A report for a person, a fact a line."""
    lines = [f"python           {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        lines.append(f"{name:<16} {_version(name)}")
    lines.append("")
    lines += _devices()
    lines.append("")
    lines.append(f"LORAPAR_BACKEND  {os.environ.get('LORAPAR_BACKEND', 'not set (each operation takes its own default)')}")
    lines += [f"{key:<16} {value}" for key, value in native.status().items()]
    lines += [f"{operation:<16} {runs}" for operation, runs in backend.operations().items()]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu              {capability}, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        return [*lines, "cuda             no device"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}           {facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory >> 20} MiB")
    return lines
