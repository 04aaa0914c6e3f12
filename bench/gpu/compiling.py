"""Compile, in many processes, the Triton kernels that the steps after this will launch, so that none waits for one.

On a GPU the compiled kernels go into Triton's cache under the very keys of the launches. In a rehearsal they are
compiled for sm_90, as many as the time allows, which at least shows that they compile.
"""

import multiprocessing
import os
import time
from typing import Any

from bench.gpu import record
from lorapar_kernels import compile
from lorapar_kernels.triton_kernels.launch import Variant, warm

# Seconds before the limit at which no further variant is begun: one takes two to ten.
MARGIN = 12.0
# Seconds of compiling that a rehearsal is content with.
REHEARSED = 12.0
_variants: list[Variant] = []
_began = time.time()


def main() -> None:
    from bench.gpu.cases import variants

    _variants.extend(variants())
    # Recording a launch may have asked CUDA for a device, and a forked child cannot use CUDA after that.
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    began, done, failed = time.time(), 0, 0
    with multiprocessing.get_context("spawn").Pool(workers, _take) as pool:
        for name, seconds, failure in pool.imap_unordered(_compile, range(len(_variants)), chunksize=1):
            if failure:
                failed += 1
                record.wrong(name, failure)
            elif seconds:
                done += 1
                record.result(name, "s", seconds, detail=True)
    record.result("variants compiled", "", done, of=len(_variants), failed=failed, workers=workers)
    record.result("all of them", "s", time.time() - began)


def _take() -> None:
    """A child's own list of the variants."""
    from bench.gpu.cases import variants

    _variants.extend(variants())


def _compile(place: int) -> tuple[str, float, str | None]:
    """(name, seconds, what went wrong); 0 seconds where the time is up."""
    variant: Any = _variants[place]
    name = f"{variant.kernel.__name__} {variant.name}"
    began = time.time()
    if record.remaining() < MARGIN or (record.rehearsal() and began - _began > REHEARSED):
        return name, 0.0, None
    if record.rehearsal():
        failure = compile.fault(compile.compile_variant(variant, 90))
    else:
        try:
            warm(variant)
            failure = None
        # Whatever the compiler raises: the others are still wanted, and the line makes the exit status 1.
        except Exception as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return name, time.time() - began, failure
