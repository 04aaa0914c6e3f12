"""What is installed, which devices there are, and which implementation of each operation runs here."""

import importlib.metadata
import os
import platform
from collections.abc import Callable

import torch

import lorapar_kernels as lk
import lorapar_kernels.native as native
from lorapar_kernels import lora_product
from lorapar_kernels.backend import listening
from lorapar_kernels.lora_linear import passes_for

from .memory.switches import switches
from .model.quantised import QUANTISED, works_here

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors",
            "reasoning-gym", "gguf", "matplotlib", "bitsandbytes", "vllm")  # fmt: skip


def doctor() -> str:
    """A report for a person, a fact a line."""
    forced = os.environ.get("LORAPAR_BACKEND")
    lines = [f"{'python':<18} {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<18} {_version(name)}" for name in ("lorapar", *PACKAGES)]
    lines += ["", *_devices(), *_libraries(), ""]
    lines.append(f"{'LORAPAR_BACKEND':<18} {forced or 'not set: each operation takes the first that can serve'}")
    for device in ("cpu", "cuda"):
        lines += ["", f"what runs on {device}"]
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("  no device")
            continue
        lines += [f"  {operation:<20} {runs}" for operation, runs in operations(torch.device(device)).items()]
        lines.append(f"  {'lora_linear, product':<20} {_product(torch.device(device))}")
        lines += [f"  {f'lora.base: {base}':<20} {works_here(base, torch.device(device))}" for base in QUANTISED]
        lines += [f"  {switch:<22} {said}" for switch, said in switches(device).items()]
    return "\n".join(lines)


def operations(device: torch.device) -> dict[str, str]:
    """{operation: the implementation that serves a small call of it on `device`, and why the others cannot}.

    Each operation is called and its choice recorded, so that what is reported is what runs.
    """
    t, mask = torch.ones(2, 2, device=device), torch.ones(2, 2, dtype=torch.bool, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    sums = lk.ScoreSums.zeros_like(t, t)
    calls: dict[str, Callable[[], object]] = {
        "lora_linear": lambda: lk.lora_linear(t, t, t, t, 1.0),
        "lora_add": lambda: lk.lora_add(t, t, t, t, 1.0),
        "lora_linear_scored": lambda: lk.lora_linear_scored(t, t, t, t, 1.0, torch.tensor([0, 2]), sums),
        "lora_add_scored": lambda: lk.lora_add_scored(t, t, t, t, 1.0, torch.tensor([0, 2]), sums),
        "top_mass": lambda: lk.top_mass(t, 0.5),
        "top_count": lambda: lk.top_count(t, 1),
        "tile_sums": lambda: lk.tile_sums(t, (1, 1)),
        "masked_adamw": lambda: lk.masked_adamw([t.clone()], [t], [mask], [t.reshape(-1).clone()],
                                                [t.reshape(-1).clone()], 1, lr=0.1),
        "dropout_mask": lambda: lk.dropout_mask(seed, [2, 2], 0.5),
        "pack_mask": lambda: lk.pack_mask(mask),
        "unpack_mask": lambda: lk.unpack_mask(torch.ones(1, dtype=torch.int32, device=device), [2, 2]),
    }  # fmt: skip
    return {name: _chosen_by(call) for name, call in calls.items()}


def _chosen_by(call: Callable[[], object]) -> str:
    with listening() as choices:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return f"fails: {error}"
    if not choices:
        return "reference"
    first = choices[0]
    reasons = [f"{other}: {why}" for other, why in first.others.items() if why is not None]
    return first.chosen + (f"  ({'; '.join(reasons)})" if reasons else "")


def _product(device: torch.device) -> str:
    """Which product a `lora_linear` on `device` takes."""
    one = torch.ones(1, 1, device=device)
    try:
        return lora_product.in_force(device, passes_for("lora_linear", one, [one]).fused)
    except ValueError as error:
        return f"fails: {error}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"{'cpu':<18} {capability}, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        return [*lines, f"{'cuda':<18} no device"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        said = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory >> 20} MiB"
        lines.append(f"{f'cuda:{index}':<18} {said}")
    return lines


def _libraries() -> list[str]:
    status = native.status()
    lines = [f"{f'{name}':<18} {place or 'not found'}" for name, place in status["compilers"].items()]
    for kind in native.KINDS:
        said = status[kind]["build"] if status[kind]["loaded"] else status[kind]["reason"]
        lines.append(f"{f'native {kind}':<18} {said}")
    return lines
