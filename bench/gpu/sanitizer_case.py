"""One small case of each kernel, for sanitizer.py: `python -m bench.gpu.sanitizer_case GROUP` runs a group's.

The results are held to nothing here: correctness.py and native_ops.py do that. Sizes are uneven, so that tiles stick
out of the matrices on every side.
"""

import sys
from collections.abc import Callable

import torch

import lorapar_kernels as lk
from bench.gpu import cases, native_ops, record
from bench.gpu.correctness import BF16, FP32, Case, Problem, masks_of
from bench.lora_layers import environment
from lorapar_kernels import native

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


def layers(product: str, device: str) -> None:
    for case in layer_cases(product):
        problem = Problem(case, device)
        problem.ours(masks_of(problem))


def scoring(device: str) -> None:
    for case in scored_cases():
        Problem(case, device).ours([(None, None)])
    with environment("LORAPAR_BACKEND", "triton"):
        lk.dropout_mask(torch.tensor([5], device=device), (61, 45), cases.P)


def csrc(device: str) -> None:
    why = native.obstacle(torch.device(device))
    if why is not None:
        raise RuntimeError(why)
    generator = torch.Generator().manual_seed(0)
    with environment("LORAPAR_BACKEND", "native"):
        for name, check in native_ops.CHECKS.items():
            # One of each form of the optimizer's step.
            for n in range(1037, 1043) if name == "masked_adamw" else (1037,):
                check(n, generator)[0](device)


# group -> what runs, and by what names the sanitizer would tell its kernels
GROUPS: dict[str, tuple[Callable[[str], None], tuple[str, ...]]] = {
    "plain": (lambda device: layers("plain", device), ("shrink_kernel", "output_kernel", "input_kernel",
                                                        "reduce_kernel")),
    "fused": (lambda device: layers("fused", device), ("product_kernel",)),
    "scoring": (scoring, ("_example_products_kernel", "_add_partial_sums_kernel", "_dropout_mask_kernel")),
    "csrc": (csrc, (
        "pack_mask_kernel", "unpack_mask_kernel", "combine_masks_kernel", "count_tiles_kernel", "running_sum_kernel",
        "count_mask_kernel", "weigh_kernel", "count_kernel", "equals_kernel", "keep_kernel", "tile_sums_kernel",
        "nonfinite_kernel", "step_kernel", "mask_kernel",
    )),
}  # fmt: skip


def launches(device: str) -> None:
    for product in ("plain", "fused"):
        layers(product, device)
    for case in scored_cases():
        Problem(case, device).ours([(None, None)])
    from lorapar_kernels import dropout_triton

    dropout_triton.dropout_mask(torch.empty(1, dtype=torch.int64, device=device), (61, 45), 3277)


def main(group: str) -> None:
    cases.begin()
    GROUPS[group][0](record.device())
    cases.wait()
    print(f"{group}: ran to its end")


if __name__ == "__main__":
    main(sys.argv[1])
