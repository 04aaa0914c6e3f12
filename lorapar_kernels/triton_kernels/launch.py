"""Launch a kernel, or record the signature with which it would be launched (compile.py compiles those ahead of time).

A launcher calls `launch`, which goes to the GPU of its tensors. Inside `recording`, the same launcher, called with
tensors on the meta device, launches nothing and records the signatures instead: what is compiled ahead of time is
what runs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# x's dtype and the adapter's, in each combination that a layer takes.
DTYPES = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
# Bytes of shared memory that a block can have on every GPU of compute capability 8.0 and above, consumer cards too
# (CUDA C++ Programming Guide, technical specifications).
COMMON_ROOM = 99 << 10
# A product and the sum it is added to may be one instruction, which rounds once. Set explicitly, because Triton 3.9
# warns where it is not set, and 3.10 changes the default: fp32 products would take twice the instructions.
FP_FUSION = True


class Call(NamedTuple):
    """A launch that was recorded and not made: `kernel[grid](*arguments, **constants)`, tensors without memory."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One specialisation of one Triton kernel.

    Attributes:
        kernel: what @triton.jit returned.
        name: tells this variant from the kernel's others, in the table.
        signature: argument -> Triton type ("*bf16", "i32", "constexpr"; a tuple of them for a tuple), in order.
        constants: the values of the constexpr arguments, by name or by position (argument, entry of the tuple).
        aligned: arguments, by name or by position, that are multiples of 16, as the launcher would find them.
        warps, stages: launch options.
        room: bytes of shared memory that a device has wherever the launcher takes this variant.
        call: the first launch that recorded it, for `warm`; None where the variant was not recorded.
    """

    kernel: Any
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any] = field(default_factory=dict)
    aligned: tuple[Any, ...] = ()
    warps: int = 4
    stages: int = 3
    room: int = COMMON_ROOM
    call: Call | None = field(default=None, compare=False, repr=False)


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

    It runs on the device of the first CUDA tensor. room: the `Variant`'s; a launcher passes more than COMMON_ROOM only
    where the device has it.
    """
    variants = _recorded.get()
    if variants is None:
        device = _cuda_device(arguments)
        # Triton launches on the current device, wherever the tensors are. Asking which that is costs less than a
        # microsecond, entering another several.
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                launch(kernel, grid, *arguments, room=room, **constants)
            return
        kernel[grid](*arguments, enable_fp_fusion=FP_FUSION, **constants)
        return
    variant = _variant(kernel, Call(grid, arguments, constants), room)
    if variant not in variants:
        variants.append(variant)


class Launch:
    """One kernel with its constexprs and launch options, to be launched again and again.

    The arguments' dtypes, which of them are None, and each integer that the kernel specialises on are the same in every
    call of one Launch: a launcher keeps one for each set of them.
    """

    def __init__(self, kernel: Any, room: int = COMMON_ROOM, **constants: Any):
        self.kernel, self.room, self.constants = kernel, room, constants

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        launch(self.kernel, grid, *arguments, room=self.room, **self.constants)


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


def unit_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with unit column stride, which the kernels take for granted."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for a launcher inside `recording`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def precision(x: torch.Tensor) -> str:
    """How products of tensors like x are made: IEEE, or TF32 for fp32 where the caller allows it for torch's own.

    torch's older switches (`allow_tf32`, `set_float32_matmul_precision`) set this one too; asking the older one raises
    once this one has been set.
    """
    if x.element_size() != 4:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _cuda_device(arguments: tuple[Any, ...]) -> int | None:
    """The number of the first CUDA tensor's device, in tuples and descriptors too; None where there is none."""
    for argument in arguments:
        if isinstance(argument, tuple):
            device = _cuda_device(argument)
            if device is not None:
                return device
            continue
        tensor = argument if isinstance(argument, torch.Tensor) else getattr(argument, "base", None)
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            return tensor.get_device()
    return None


def warm(variant: Variant) -> None:
    """Compile a recorded variant for the current GPU, launching nothing.

    It goes through Triton's launcher with the arguments of the launch that was recorded, so the compiled kernel has the
    key, in memory and in Triton's cache on disk, under which a launch like it will look. (Triton 3.6 to 3.9 read of a
    tensor its dtype and whether its address is a multiple of 16; one on the meta device has address 0.)
    """
    if variant.call is None:
        raise ValueError(f"{variant.kernel.__name__} {variant.name} was not recorded from a launch, so has no call")
    grid, arguments, constants = variant.call
    variant.kernel.warmup(*arguments, grid=grid, enable_fp_fusion=FP_FUSION, **constants)


def _variant(kernel: Any, call: Call, room: int) -> Variant:
    arguments, constants = call.arguments, dict(call.constants)
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
            # Triton's launcher specialises on both; the addresses of meta tensors are aligned as an allocator's are.
            elif isinstance(entry, torch.Tensor):
                aligned += [path] if entry.data_ptr() % 16 == 0 else []
            elif specialise and isinstance(entry, int) and entry % 16 == 0:
                aligned.append(path)
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    pointers = [kind[1:] for entry in ordered.values() for kind in _flat(entry) if kind.startswith("*")]
    dtypes = "/".join(dict.fromkeys(pointers))
    shown = " ".join(f"{name}={_short(value)}" for name, value in constants.items())
    warps, stages = options["num_warps"], options["num_stages"]
    return Variant(kernel, f"{dtypes} {shown}", ordered, values, tuple(aligned), warps, stages, room, call)


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
