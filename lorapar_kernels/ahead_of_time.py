"""How a kernel file says with which signatures it is compiled ahead of time (compile.py does it)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of one Triton kernel.

    Attributes:
        kernel: what @triton.jit gave.
        name: tells this variant from the kernel's others, in the table.
        signature: argument -> Triton type ("*bf16", "i32", "constexpr"), every argument in order.
        constants: the values of the constexpr arguments.
        aligned: pointer and integer arguments that are multiples of 16, as the launcher would find them.
        warps, stages: launch options.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
