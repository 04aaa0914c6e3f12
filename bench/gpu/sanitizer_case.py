"""One small case of each kernel, for sanitizer.py: `python -m bench.gpu.sanitizer_case GROUP` runs a group's.

The results are held to nothing here: correctness.py and native_ops.py do that. Sizes are uneven, so that tiles stick
out of the matrices on every side.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch

import lorapar_kernels as lk
from bench.gpu import cases, native_ops, record
from bench.gpu.correctness import BF16, FP32, Case, Problem, masks_of
from bench.lora_layers import environment
from lorapar_kernels import native

# Exit statuses: a case raised and the others ran; csrc's library is not there.
FAILED, MISSING = 7, 3
# How the line of a case that raised begins.
FAULT = "failed: "
Call = Callable[[], None]
# Rows that begin at 16 bytes, so by tile descriptors where the GPU has them, and rows that do not.
EVEN, ODD = (136, 72), (61, 45)


def layer_cases(product: str) -> list[Case]:
    every = [
        Case("linear", 75, EVEN[0], (EVEN[1],), product=product),
        Case("linear", 75, ODD[0], (ODD[1],), 17, masks="tiles", product=product),
        Case("linear", 75, EVEN[0], (EVEN[1],), 64, p=0.0, masks="none", factors=BF16, product=product),
        Case("linear", 21, ODD[0], (ODD[1],), dtype=FP32, factors=FP32, product=product),
        Case("grouped", 75, EVEN[0], (EVEN[1],) * 3, product=product),
    ]
    # A rehearsal's interpreter takes a second for each of these.
    return every[:2] if record.rehearsal() else every


def scored_cases() -> list[Case]:
    return [
        Case("scored", 75, *shape, rank=8, p=0.0, masks="none") for shape in ((EVEN[0], EVEN[1:]), (ODD[0], ODD[1:]))
    ]


def of_layers(every: list[Case], device: str) -> dict[str, Call]:
    def call(case: Case) -> None:
        problem = Problem(case, device)
        problem.ours(masks_of(problem))

    return {case.name: partial(call, case) for case in every}


def scoring(device: str) -> dict[str, Call]:
    def mask() -> None:
        with environment("LORAPAR_BACKEND", "triton"):
            lk.dropout_mask(torch.tensor([5], device=device), (61, 45), cases.P)

    return {**of_layers(scored_cases(), device), "dropout mask": mask}


def csrc(device: str) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)

    def call(check: native_ops.Check, n: int) -> None:
        with environment("LORAPAR_BACKEND", "native"):
            check(n, generator)[0](device)

    # One of each form of the optimizer's step.
    sizes = {name: range(1037, 1043) if name == "masked_adamw" else (1037,) for name in native_ops.CHECKS}
    return {f"{name} {n}": partial(call, native_ops.CHECKS[name], n) for name, of in sizes.items() for n in of}


# group -> its cases on a device, and by what names the sanitizer would tell its kernels
GROUPS: dict[str, tuple[Callable[[str], dict[str, Call]], tuple[str, ...]]] = {
    "plain": (lambda device: of_layers(layer_cases("plain"), device), (
        "shrink_kernel", "output_kernel", "input_kernel", "reduce_kernel")),
    "fused": (lambda device: of_layers(layer_cases("fused"), device), ("product_kernel",)),
    "scoring": (scoring, ("_example_products_kernel", "_add_partial_sums_kernel", "_dropout_mask_kernel")),
    "csrc": (csrc, (
        "pack_mask_kernel", "unpack_mask_kernel", "count_tiles_kernel", "running_sum_kernel", "weigh_kernel",
        "count_kernel", "equals_kernel", "keep_kernel", "tile_sums_kernel", "nonfinite_kernel", "step_kernel",
        "mask_kernel",
    )),
}  # fmt: skip


def launches(device: str) -> None:
    every = [*layer_cases("plain"), *layer_cases("fused"), *scored_cases()]
    for call in of_layers(every, device).values():
        call()
    from lorapar_kernels.triton_kernels import dropout as dropout_triton

    dropout_triton.dropout_mask(torch.empty(1, dtype=torch.int64, device=device), (61, 45), 3277)


def run(group: str) -> dict[str, str]:
    """Every case of the group; gives what each that raised said. One that does not compile leaves the others to run."""
    failed = {}
    for name, call in GROUPS[group][0](record.device()).items():
        try:
            call()
            cases.wait()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {cases.one_line(error)}"
            cases.wait()
    return failed


def main(group: str) -> int:
    cases.begin()
    why = native.obstacle(torch.device(record.device())) if group == "csrc" else None
    if why is not None:
        print(why)
        return MISSING
    failed = run(group)
    for name, words in failed.items():
        print(f"{FAULT}{name}: {words}")
    print(f"{group}: ran to its end")
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
