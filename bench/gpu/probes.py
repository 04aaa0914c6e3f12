"""Four questions to the GPU's own products and memory, whose answers decide the next design of the layer.

beta = 1     A product onto a written buffer (addmm_) against one into an empty one. Expanding first and letting the
             base's product add to it (y <- s · S Bᵀ, y += x Wᵀ) saves one pass over y, if beta = 1 costs less than that
             pass.
K + e        A product whose inner dimension is longer by LoRA's rank, 16 and 64, against one without. If that costs its
             share e / K, x and S (and W and B) stored beside each other make the expand almost free.
K = 16       The expand as cuBLAS does it, y += S Bᵀ: its bytes a second against those of a copy of y. At a copy's speed
             no kernel of ours can do that step faster; only leaving it out helps.
write        The same into an empty buffer (beta = 0), as expanding first would: half of those bytes.

Each at 8,192 tokens and the three shapes of the layer's step, in bf16, by graph replay where it works, else by events.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases, record, timing

EXTRA = (16, 64)
Way = Callable[[], object]


def main() -> None:
    cases.begin()
    for n_in, n_out in cases.shapes():
        case = f"{n_in}→{n_out} T={cases.tokens()}"
        if cases.enough_time(case, 4.0):
            ask(case, cases.tokens(), n_in, n_out)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=record.device())


def ask(case: str, tokens: int, n_in: int, n_out: int) -> None:
    torch.manual_seed(0)
    x, weight, dy = draw(tokens, n_in), draw(n_out, n_in), draw(tokens, n_out)
    y, dx, other = draw(tokens, n_out), draw(tokens, n_in), draw(tokens, n_out)
    s, b = draw(tokens, cases.RANK), draw(n_out, cases.RANK)
    # y = x Wᵀ and dX = dY W; alpha keeps what is added to again and again within bf16's range.
    ways: dict[str, Way] = {
        "x Wᵀ": lambda: torch.mm(x, weight.t(), out=y),
        "x Wᵀ, beta = 1": lambda: y.addmm_(x, weight.t(), alpha=1e-3),
        "dY W": lambda: torch.mm(dy, weight, out=dx),
        "dY W, beta = 1": lambda: dx.addmm_(dy, weight, alpha=1e-3),
        "copy of y": lambda: y.copy_(other),
        "y += S Bᵀ": lambda: y.addmm_(s, b.t(), alpha=1e-3),
        "y = S Bᵀ": lambda: torch.mm(s, b.t(), out=y),
    }
    for extra in EXTRA:
        longer_x, longer_w = draw(tokens, n_in + extra), draw(n_out, n_in + extra)
        longer_dy, taller_w = draw(tokens, n_out + extra), draw(n_out + extra, n_in)
        ways[f"x Wᵀ, K + {extra}"] = lambda a=longer_x, w=longer_w: torch.mm(a, w.t(), out=y)
        ways[f"dY W, K + {extra}"] = lambda a=longer_dy, w=taller_w: torch.mm(a, w, out=dx)
    # Into the same buffers, so another result is no slower for having to find memory.
    medians = timing.say(case, timing.times(ways, ("graph", "events")), tokens=tokens, n_in=n_in, n_out=n_out)
    # The first shape's are headlines.
    told = (n_in, n_out) == cases.shapes()[0]
    taken = {name: of["graph"] if "graph" in of else of["events"] for name, of in medians.items()}
    kinds = {name: "graph" if "graph" in of else "events" for name, of in medians.items()}
    for product, inner in (("x Wᵀ", n_in), ("dY W", n_out)):
        percent(case, f"{product}, beta = 1", product, taken, kinds, told)
        for extra in EXTRA:
            share = 100 * extra / inner
            percent(case, f"{product}, K + {extra}", product, taken, kinds, told, share_percent=share)
    flops = 2 * tokens * n_in * n_out
    for product in ("x Wᵀ", "dY W"):
        record.result(f"{case} | {product} [rate]", "FLOP/s", flops / taken[product])
    size = y.numel() * y.element_size()
    moved = {"copy of y": 2 * size, "y += S Bᵀ": 2 * size, "y = S Bᵀ": size}
    rates = {name: count / taken[name] for name, count in moved.items()}
    for name, rate in rates.items():
        record.result(f"{case} | {name} [bandwidth]", "B/s", rate, percent_of_copy=100 * rate / rates["copy of y"],
                      headline=f"{case}: {name}, bytes a second" if told and name != "copy of y" else None)  # fmt: skip


def percent(case: str, name: str, base: str, taken: dict[str, float], kinds: dict[str, str], told: bool,
            **facts: Any) -> None:  # fmt: skip
    record.result(f"{case} | {name} over {base}", "%", 100 * (taken[name] / taken[base] - 1),
                  headline=f"{case}: {name} over {base}" if told else None, timed_by=kinds[name], **facts)  # fmt: skip
