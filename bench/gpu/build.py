"""csrc's library for this GPU: taken as it is where one loads, else built here by nvcc, for this GPU's architecture."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu import record
from lorapar_kernels import native

ROOT = Path(__file__).parents[2]


def main() -> None:
    kind = record.device()
    if native.path(kind).exists():
        library, reason = native.load(kind)
        if library is not None:
            record.result(f"csrc {kind}: {library.lorapar_build().decode()}", "s", 0.0, taken="as it was there")
            return
        print(f"built again: {reason}", file=sys.stderr)
    arch = "90" if record.rehearsal() else "".join(map(str, torch.cuda.get_device_capability()))
    began = time.time()
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT, env=os.environ | {"LORAPAR_CUDA_ARCHS": arch}, capture_output=True, text=True,
    )  # fmt: skip
    log = built.stdout + built.stderr
    print(log, file=sys.stderr)
    # In a process of its own, since this one has looked for the library already.
    asked = f"from lorapar_kernels import native; print(native.status()[{kind!r}]['build'] or '')"
    build = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not build:
        raise RuntimeError(f"csrc's {kind} library was not built: {log.strip()[-300:]}")
    spills = sum("spill stores" in line and "0 bytes spill stores" not in line for line in log.splitlines())
    record.result(f"csrc {kind}: {build}", "s", time.time() - began, taken="built here", kernels_that_spill=spills)
