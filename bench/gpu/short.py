"""One LoRA layer where the host decides: 512 and 2,048 tokens forward and backward, and a decoding step of 1 to 16.

The ways and sizes of layer.py. A decoding step is without gradient and dropout, through four layers of one shape in
turn, so that their weights do not stay in the GPU's cache from one step to the next; its times are of one layer.
"""

from collections.abc import Iterator
from typing import Any

import torch

import lorapar_kernels as lk
from bench.gpu import cases, record, timing
from bench.lora_layers import (
    ADDMM,
    FROZEN,
    OURS,
    PEFT,
    PEFT_NARROW,
    SCALING,
    Layer,
    Made,
    Way,
    forced_product,
    peft_layer,
)
from lorapar_kernels import lora_product

TOLD = ("ours plain", "ours fused", PEFT, PEFT_NARROW, ADDMM)
TOKENS, SMALL_TOKENS = (2048, 512), (12,)
STEPS, SMALL_STEPS = (1, 2, 4, 8, 16), (1, 2)
# Four weights of 4096² in bf16 are 134 MB, an H200's cache holds 60.
LAYERS = 4
SECONDS = 4.0


def layers(device: str) -> Iterator[Layer]:
    small = record.rehearsal()
    for p in (cases.P, 0.0):
        for tokens in SMALL_TOKENS if small else TOKENS:
            for n_in, n_out in cases.shapes()[: 1 if small else None]:
                yield Layer(tokens, n_in, n_out, cases.RANK, p, torch.bfloat16, device, cases.ACTIVE)


def steps(device: str) -> Iterator[Layer]:
    small = record.rehearsal()
    for n_in, n_out in cases.shapes()[: 1 if small else None]:
        for tokens in SMALL_STEPS if small else STEPS:
            yield Layer(tokens, n_in, n_out, cases.RANK, 0.0, torch.bfloat16, device, cases.ACTIVE)


def launches(device: str) -> None:
    for layer in layers(device):
        cases.launch_layer(layer)
    for layer in steps(device):
        made = Made(layer)
        for product in lora_product.WAYS:
            decoding(made, product)()


def main() -> None:
    cases.begin()
    device = record.device()
    at_p = list(layers(device))
    for layer in (layer for layer in at_p if layer.p > 0.0):
        measure(layer)
    for layer in steps(device):
        decode(layer)
    for layer in (layer for layer in at_p if layer.p == 0.0):
        measure(layer)


def measure(layer: Layer) -> None:
    case = cases.label(layer)
    if not cases.enough_time(case, SECONDS):
        return
    made = Made(layer)
    ways = {FROZEN: made.frozen(), **cases.ours(made), **cases.peft_ways(case, made)}
    ways |= {ADDMM: made.addmm()} if layer.p == 0.0 else {}
    results = cases.tried(case, ways)
    cases.compared(case, made, ways, results)
    medians = timing.say(case, timing.times(ways), tokens=layer.tokens, n_in=layer.n_in, n_out=layer.n_out, p=layer.p)
    cases.say_over(case, medians, FROZEN, TOLD if layer.p > 0.0 else (OURS["plain"], ADDMM))


def decoding(made: Made, product: str) -> Way:
    """Ours, one step of one layer."""
    mask_a, mask_b = made.masks

    def way() -> Any:
        with torch.no_grad(), forced_product(product):
            return (lk.lora_linear(made.x, made.base.weight, made.a, made.b, SCALING, mask_a=mask_a, mask_b=mask_b),)

    return way


def ways_of_step(case: str, made: Made) -> dict[str, Way]:
    @torch.no_grad()
    def frozen() -> Any:
        return (made.base(made.x),)

    ways: dict[str, Way] = {FROZEN: frozen}
    ways |= {OURS[product]: decoding(made, product) for product in cases.products()}
    try:
        for name, dtype in ((PEFT, torch.float32), (PEFT_NARROW, torch.bfloat16)):
            layer = peft_layer(made.base, made.a, made.b, 0.0, dtype).eval()

            @torch.no_grad()
            def of_peft(layer: Any = layer) -> Any:
                return (layer(made.x),)

            ways[name] = of_peft
    except Exception as error:
        record.skipped(f"{case} | {PEFT}", f"{type(error).__name__}: {cases.one_line(error)}")
    a, b = (factor.detach().to(torch.bfloat16) for factor in (made.a, made.b))

    @torch.no_grad()
    def addmm() -> Any:
        return ((made.x @ made.base.weight.t()).addmm_(made.x @ a.t(), b.t(), alpha=SCALING),)

    return ways | {ADDMM: addmm}


def decode(layer: Layer) -> None:
    case = f"decoding {layer.tokens}, {layer.n_in}→{layer.n_out}"
    if not cases.enough_time(case, SECONDS):
        return
    each = [Made(layer) for _ in range(LAYERS)]
    # What cannot run, or differs, is left out by the first layer; the others are built alike.
    ways = ways_of_step(case, each[0])
    cases.compared(case, each[0], ways, cases.tried(case, ways))
    apart = [ways, *(ways_of_step(case, one) for one in each[1:])]

    def all_of(name: str) -> Way:
        return lambda: [of_layer[name]() for of_layer in apart]  # type: ignore[return-value]

    found = timing.times({name: all_of(name) for name in ways}, rounds=9)
    for of in found.values():
        for kind, seconds in of.items():
            of[kind] = [one / LAYERS for one in seconds]
    medians = timing.say(case, found, tokens=layer.tokens, n_in=layer.n_in, n_out=layer.n_out)
    cases.say_over(case, medians, FROZEN, TOLD if layer.tokens in (1, 16) else ())
