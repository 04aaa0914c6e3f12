"""Compile every Triton kernel of the package ahead of time, for any architecture, with no GPU present.

    python -m lorapar_kernels.compile --arch 80 90 100

Prints a line per kernel, variant and architecture: registers a thread, bytes spilled, bytes of shared memory, and the
matrix instruction. Exit status 0 when all compiled, none spills and each fits into shared memory; 1 when one does not
(or Triton is not there); 2 on unusable arguments. `--every` takes each kernel in each way in which it can be launched,
which is a matter of an hour; without it, each choice that makes a variant is covered at least once.

Users' kernels are compiled at run time; this checks, without the GPU, that they will compile and what they will cost.
"""

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .triton_kernels.launch import COMMON_ROOM, FP_FUSION, Variant

# In triton_kernels; each has `ahead_of_time(every)`, its kernels' variants. A test finds a module that is left out.
MODULES = ("dropout", "importance", "lora_backward", "lora_forward", "lora_product")


# Where a block can have more shared memory than COMMON_ROOM, and a launcher may make use of it: no consumer card has
# these compute capabilities (CUDA C++ Programming Guide, technical specifications). Bytes.
ROOM = {90: 227 << 10, 100: 227 << 10}
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")


@dataclass(frozen=True)
class Row:
    """What one variant costs on one architecture."""

    kernel: str
    variant: str
    arch: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instruction: str = ""
    room: int = COMMON_ROOM
    failure: str | None = None


def ptxas_figures(log: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled (stores and loads) in what `ptxas -v` printed; else ValueError."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"ptxas -v printed no figures: {log.strip()[:200]!r}")
    return max(map(int, registers)), sum(int(stores) + int(loads) for stores, loads in spills)


def assemble(ptx: str, arch: int) -> str:
    """What ptxas says of the PTX at -v, with the assembler and the target name that Triton itself takes."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(source)]
        done = subprocess.run([*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas exited {done.returncode}: {done.stderr.strip()}")
    return done.stderr + done.stdout


def compile_variant(variant: Variant, arch: int) -> Row:
    """Compile one variant for one architecture; a failure is reported in the row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = variant.kernel.__name__
    try:
        positions = [a if isinstance(a, tuple) else (list(variant.signature).index(a),) for a in variant.aligned]
        attributes: dict[Any, Any] = {position: [["tt.divisibility", 16]] for position in positions}
        source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
        options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": FP_FUSION}
        compiled: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, spilled = ptxas_figures(assemble(compiled.asm["ptx"], arch))
    # Whatever the compiler raises, the other rows are still wanted, and the row makes the exit status 1.
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Row(name, variant.name, arch, failure=" ".join(text.split())[:500])
    instruction = matrix_instruction(compiled.asm["ptx"])
    return Row(name, variant.name, arch, registers, spilled, compiled.metadata.shared, instruction, variant.room)


def matrix_instruction(ptx: str) -> str:
    """The widest matrix instruction in the PTX, "-" where products run on the plain cores or there are none."""
    return next((name for name in MATRIX_INSTRUCTIONS if name in ptx), "-")


def fault(row: Row) -> str | None:
    """Why a variant will not do; None when it will."""
    if row.failure is not None:
        return row.failure
    if row.spilled > 0:
        return f"spills {row.spilled} bytes"
    return f"needs {row.shared} bytes of shared memory, of {row.room}" if row.shared > row.room else None


def table(rows: list[Row]) -> str:
    """The rows for people."""
    kernels = max([6, *(len(row.kernel) for row in rows)])
    names = max([7, *(len(row.variant) for row in rows)])
    heading = f"{'registers':>9} {'spilled':>8} {'shared':>8} {'instruction':>12}"
    lines = [f"{'kernel':<{kernels}} {'variant':<{names}} {'arch':>6} {heading}"]
    for row in rows:
        figures = row.failure or f"{row.registers:>9} {row.spilled:>8} {row.shared:>8} {row.instruction:>12}"
        lines.append(f"{row.kernel:<{kernels}} {row.variant:<{names}} {f'sm_{row.arch}':>6} {figures}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lorapar_kernels.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        metavar="N",
        help="compute capabilities, 80 for 8.0 (default: 80 90 100)",
    )
    parser.add_argument("--every", action="store_true", help="every variant that can be launched")
    given = parser.parse_args(arguments)
    archs = given.arch
    unknown = [arch for arch in archs if not 75 <= arch < 1000]
    if unknown:
        parser.error(f"--arch takes compute capabilities of 75 and above, such as 90 for 9.0, got {unknown[0]}")
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed (pip install triton)", file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "TRITON_INTERPRET=1 makes interpreted kernels, which cannot be compiled: unset it",
            file=sys.stderr,
        )
        return 1
    variants = [
        variant
        for module in MODULES
        for variant in importlib.import_module(f"{__package__}.triton_kernels.{module}").ahead_of_time(given.every)
    ]
    rows = [
        compile_variant(variant, arch)
        for variant in variants
        for arch in archs
        if variant.room <= ROOM.get(arch, COMMON_ROOM)
    ]
    print(table(rows))
    bad = [(row, why) for row in rows if (why := fault(row)) is not None]
    for row, why in bad:
        print(f"{row.kernel} {row.variant} sm_{row.arch}: {why}")
    print(
        f"{len(bad)} of {len(rows)} will not do"
        if bad
        else f"{len(rows)} compiled, no spills, all within shared memory"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
