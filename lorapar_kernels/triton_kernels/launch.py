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
INT32 = 2**31 - 1
# Whether each call of a Launch is held against the first one's promises; tests switch it on.
CHECKED = False
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


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, room: int = COMMON_ROOM, **constants: Any) -> Any:
    """`kernel[grid](*arguments, **constants)`: arguments by position, constexprs and launch options by name.

    It runs on the device of the first CUDA tensor. room: the `Variant`'s; a launcher passes more than COMMON_ROOM only
    where the device has it. Returns what Triton does: the compiled kernel, None where nothing was compiled.
    """
    variants = _recorded.get()
    if variants is None:
        device = _cuda_device(arguments)
        # Triton launches on the current device, wherever the tensors are. Asking which that is costs less than a
        # microsecond, entering another several.
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(kernel, grid, *arguments, room=room, **constants)
        return kernel[grid](*arguments, enable_fp_fusion=FP_FUSION, **constants)
    variant = _variant(kernel, Call(grid, arguments, constants), room)
    if variant not in variants:
        variants.append(variant)
    return None


class Launch:
    """One kernel with its constexprs and launch options, to be launched again and again.

    The arguments' dtypes, which of them are None, and of each integer that the kernel specialises on, whether it is 1
    and whether a multiple of 16, are the same in every call of one Launch: a launcher keeps one for each set of them.
    At least one argument is a tensor, none is a tuple or a descriptor, and the constexprs are the kernel's last
    parameters.

    Triton's launcher finds all of that out again in each call, and looks the compiled kernel up by a string made of it.
    Here the first call goes through it, and later ones call the compiled kernel's own launcher with what a call cannot
    promise checked: the device, and which addresses are multiples of 16, on which Triton specialises too. Where hooks
    watch the launches (a profiler's), Triton makes them.
    """

    def __init__(self, kernel: Any, room: int = COMMON_ROOM, **constants: Any):
        self.kernel, self.room, self.constants = kernel, room, constants
        # Of the first launch on a GPU: where the arguments have tensors, and integers that are not specialised on; the
        # constexprs' values, which follow the arguments; Triton's driver and its switches.
        self._tensors: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._last: tuple[Any, ...] = ()
        self._driver: Any = None
        self._switches: Any = None
        # By device and alignment, what Triton compiled.
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._promised: list[Any] | None = None

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if CHECKED:
            self._check(arguments)
        tensors = self._tensors or self._learn(arguments)
        if not tensors or _recorded.get() is not None or self._is_watched():
            self._by_triton(grid, arguments)
            return
        values, low = list(arguments), 0
        for i in tensors:
            tensor = values[i]
            # Triton asks the driver whether the GPU can read there, and says so where it cannot. A tensor's device
            # tells as much, for less; then its address is all that the launcher wants of it.
            if not tensor.is_cuda:
                self._by_triton(grid, arguments)
                return
            values[i] = address = tensor.data_ptr()
            low |= address
        for i in self._sizes:
            # Triton would compile for 64 bits.
            if values[i] > INT32:
                self._by_triton(grid, arguments)
                return
        device = arguments[tensors[0]].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, *arguments)
            return
        key = device, low % 16 == 0 or tuple(values[i] % 16 == 0 for i in tensors)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._by_triton(grid, arguments)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = self._driver.active.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *self._last
        )

    def _by_triton(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        return launch(self.kernel, grid, *arguments, room=self.room, **self.constants)

    def _learn(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        """Where the tensors are, if there is one on a GPU."""
        if _cuda_device(arguments) is None:
            return ()
        from triton import knobs
        from triton.runtime import driver

        self._driver, self._switches = driver, knobs.runtime
        names, free = self.kernel.arg_names, _not_specialised(self.kernel)
        self._sizes = tuple(i for i, value in enumerate(arguments) if type(value) is int and names[i] in free)
        self._last = tuple(self.constants[name] for name in names[len(arguments) :])
        self._tensors = tuple(i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor))
        return self._tensors

    def _is_watched(self) -> bool:
        """Whether something of Triton's is to be called at each launch."""
        enter, leave = self._switches.launch_enter_hook, self._switches.launch_exit_hook
        # Chains of hooks; but a function can be put in their place, or None.
        return bool(self.kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def _check(self, arguments: tuple[Any, ...]) -> None:
        """AssertionError where an argument is not what the first call of this Launch promised."""
        names, free = self.kernel.arg_names, _not_specialised(self.kernel)
        promises = [_promise(value, name in free) for value, name in zip(arguments, names)]
        self._promised = promises if self._promised is None else self._promised
        for name, first, now in zip(names, self._promised, promises):
            assert first == now, f"{self.kernel.__name__}: {name} was {first} in this Launch's first call, now {now}"
        assert len(promises) == len(self._promised), f"{self.kernel.__name__}: one call has more arguments"


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
    names, as_they_are = kernel.arg_names, _not_specialised(kernel)
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


def _not_specialised(kernel: Any) -> set[str]:
    """The parameters whose values `kernel` is not compiled for."""
    parameters = getattr(kernel, "params", None)
    # An interpreted kernel has none, but keeps what the decorator was given.
    if parameters is None:
        return set(kernel.kwargs["do_not_specialize"] or ())
    return {parameter.name for parameter in parameters if parameter.do_not_specialize}


def _promise(value: Any, free: bool) -> Any:
    """What of an argument is the same in each call of a Launch; of an integer, what Triton compiles for."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if value is None or type(value) is not int or free:
        return None if value is None else type(value)
    return "1" if value == 1 else f"{'64 bits' if value > INT32 else 'int'}{', a multiple of 16' * (value % 16 == 0)}"


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
