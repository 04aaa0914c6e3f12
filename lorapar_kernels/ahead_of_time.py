"""How a kernel file says with which signatures it is compiled ahead of time (compile.py does it).

A launcher calls `launch`. Inside `recording`, the same launcher, called with tensors on the meta device, launches
nothing and leaves the signatures that it would have launched: what is compiled ahead of time is what runs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
# Bytes of shared memory that a block can have on every GPU of compute capability 8.0 and above, consumer cards too
# (CUDA C++ Programming Guide, technical specifications).
COMMON_ROOM = 99 << 10
# A product and the sum it goes into may be one instruction, which rounds once. Said here, because Triton 3.9 warns
# where nothing is said, and 3.10 changes what that means: fp32 products would take twice the instructions.
FP_FUSION = True


@dataclass(frozen=True)
class Variant:
    """One specialisation of one Triton kernel.

    Attributes:
        kernel: what @triton.jit gave.
        name: tells this variant from the kernel's others, in the table.
        signature: argument -> Triton type ("*bf16", "i32", "constexpr"; a tuple of them for a tuple), in order.
        constants: the values of the constexpr arguments, by name or by position (argument, entry of the tuple).
        aligned: arguments, by name or by position, that are multiples of 16, as the launcher would find them.
        warps, stages: launch options.
        room: bytes of shared memory that a device has wherever the launcher takes this variant.
    """

    kernel: Any
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any] = field(default_factory=dict)
    aligned: tuple[Any, ...] = ()
    warps: int = 4
    stages: int = 3
    room: int = COMMON_ROOM


_recorded: ContextVar[list[Variant] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Variant]]:
    """Within the block `launch` launches nothing; the list gathers what it would have, each once."""
    variants: list[Variant] = []
    token = _recorded.set(variants)
    try:
        yield variants
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, room: int = COMMON_ROOM, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`: arguments by position, constexprs and launch options by name.

    room: of the `Variant`; a launcher that gives another than COMMON_ROOM has asked the device.
    """
    variants = _recorded.get()
    if variants is None:
        kernel[grid](*arguments, enable_fp_fusion=FP_FUSION, **constants)
        return
    variant = _variant(kernel, arguments, constants, room)
    if variant not in variants:
        variants.append(variant)


def _variant(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], room: int) -> Variant:
    options = {"num_warps": constants.pop("num_warps", 4), "num_stages": constants.pop("num_stages", 3)}
    names = kernel.arg_names
    as_they_are = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature: dict[str, Any] = {}
    values: dict[Any, Any] = dict(constants)
    aligned: list[Any] = []
    for i, argument in enumerate(arguments):
        entries = argument if isinstance(argument, tuple) else (argument,)
        paths = [(i, j) for j in range(len(entries))] if isinstance(argument, tuple) else [(i,)]
        specialise = names[i] not in as_they_are
        kinds = tuple(_kind(entry, specialise) for entry in entries)
        signature[names[i]] = kinds if isinstance(argument, tuple) else kinds[0]
        for path, entry, kind in zip(paths, entries, kinds):
            if kind == "constexpr":
                values[path] = entry
            # Triton's launcher specialises on both: pointers from torch's allocator are aligned.
            elif isinstance(entry, torch.Tensor) or (specialise and isinstance(entry, int) and entry % 16 == 0):
                aligned.append(path)
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    pointers = [kind[1:] for entry in ordered.values() for kind in _flat(entry) if kind.startswith("*")]
    dtypes = "/".join(dict.fromkeys(pointers))
    said = " ".join(f"{name}={_short(value)}" for name, value in constants.items())
    return Variant(
        kernel, f"{dtypes} {said}", ordered, values, tuple(aligned), options["num_warps"], options["num_stages"], room
    )


def _kind(value: Any, specialise: bool = True) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    # Triton's TensorDescriptor, by what it has, so that this file need not import Triton.
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    # The launcher makes None, and integers equal to 1, constants of the kernel.
    if value is None or (specialise and isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _flat(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "".join(_short(entry) for entry in value)
    return str(int(value)) if isinstance(value, bool) else str(value)
