"""csrc's ops on the device, against the reference on the CPU, to the bit: masks, selection, AdamW, dropout.

Each op on awkward sizes first (none, one, around a word of 32 and a tile of 512, more than a grid), then on random ones
until the time is used up. Outputs come out of memory that is filled with NaN or all ones. One line an op: on how many
sizes it was right, or the first on which it was wrong.
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lorapar_kernels as lk
from bench.gpu import cases, record
from bench.lora_layers import environment
from lorapar_kernels import native
from lorapar_kernels.bitmask import TILE

AWKWARD = (0, 1, 31, 32, 33, 511, 512, 513, 9 * 512 + 100, 1_000_003)
SMALL_AWKWARD = (0, 1, 33, 513)
THETAS = [1e-3, 0.5, 0.9, 1.0]
# Seconds that random sizes of one op may take, and the largest of them.
SECONDS, LARGEST = 1.5, 300_000
SMALL_SECONDS, SMALL_LARGEST = 0.05, 2_000

Found = dict[str, Any]
Check = Callable[[int, torch.Generator], tuple[Callable[[str], Found], str]]


def masks(n: int, generator: torch.Generator) -> tuple[Callable[[str], Found], str]:
    drawn = torch.rand(n, generator=generator) < 0.4

    def run(device: str) -> Found:
        mask = drawn.to(device)
        words, index = lk.pack_mask(mask), lk.index_mask(mask)
        return {"pack": words, "unpack": lk.unpack_mask(words, mask.shape), "before": index.before,
                "active": index.active}  # fmt: skip

    return run, f"{n} elements"


def scores_of(n: int, generator: torch.Generator) -> list[Tensor]:
    """Three tensors of n elements in all, tied or over many orders of magnitude."""
    cut = sorted(random.Random(n).randrange(n + 1) for _ in range(2))
    values = torch.randn(n, generator=generator).abs()
    values = (values * 4).floor() if n % 2 else values.pow(8)
    values[:1] = 1.0
    return list(values.tensor_split(cut))


def selection(n: int, generator: torch.Generator) -> tuple[Callable[[str], Found], str]:
    n = max(n, 1)
    scores = scores_of(n, generator)
    among = [torch.rand(score.shape, generator=generator) < 0.3 for score in scores]
    inside = sum(int(mask.sum()) for mask in among)

    def run(device: str) -> Found:
        given, where = [score.to(device) for score in scores], [mask.to(device) for mask in among]
        kept = lk.top_mass(given, THETAS)
        found: Found = {f"top_mass {theta}": torch.cat(kept[i]) for i, theta in enumerate(THETAS)}
        for count in {0, inside // 2, inside}:
            found[f"top_count {count}"] = torch.cat(lk.top_count(given, count, where))
        return found

    return run, f"{n} elements"


def tile_sums(n: int, generator: torch.Generator) -> tuple[Callable[[str], Found], str]:
    rows = 1 + n % 37
    columns = 1 + n // rows
    scores = torch.rand(rows, columns, generator=generator)

    def run(device: str) -> Found:
        on_device = scores.to(device)
        tiles = (cases.TILE_A, cases.TILE_B, (1, columns), (3, 5))
        return {f"tile {tile}": lk.tile_sums(on_device, tile) for tile in tiles}

    return run, f"{rows}×{columns}"


FORMS = ("plain", "maximize", "stochastic", "compensated", "codes", "codes, stochastic")


def adamw(n: int, generator: torch.Generator) -> tuple[Callable[[str], Found], str]:
    form = FORMS[n % len(FORMS)]
    dtype = torch.bfloat16 if "stochastic" in form or form == "compensated" else torch.float32
    shapes = [(n,), (3, n // 7), (0, 4), (n % 600, 2)]
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    active = [torch.rand(shape, generator=generator) < 0.4 for shape in shapes]
    steps = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2)]

    def run(device: str) -> Found:
        mine, where = [param.clone().to(device) for param in params], [mask.to(device) for mask in active]
        counts = [int(mask.sum()) for mask in active]
        kinds = (torch.int8, torch.uint8) if "codes" in form else (torch.float32, torch.float32)
        first, second = ([torch.zeros(count, dtype=kind, device=device) for count in counts] for kind in kinds)
        optional: dict[str, Any] = {}
        if "codes" in form:
            optional["scales"] = [torch.zeros(2, -(-param.numel() // TILE), device=device) for param in mine]
        if form == "compensated":
            optional["compensations"] = [torch.zeros(count, dtype=dtype, device=device) for count in counts]
        optional |= {"grad_scale": torch.tensor(0.37, device=device), "skip_nonfinite": True}
        optional |= {"maximize": form == "maximize", "stochastic": "stochastic" in form}
        for number, grads in enumerate(steps, start=1):
            grads = [grad.to(device) for grad in grads]
            step = torch.tensor(number, device=device) if n % 2 else number
            lk.masked_adamw(mine, grads, where, first, second, step, lr=1e-2, weight_decay=0.1, seed=11, **optional)
        written = {"param": mine, "exp_avg": first, "exp_avg_sq": second}
        written |= {name: optional[name] for name in ("scales", "compensations") if name in optional}
        return {f"{name}[{i}]": tensor for name, column in written.items() for i, tensor in enumerate(column)}

    return run, f"{form}, {n} elements"


def dropout(n: int, generator: torch.Generator) -> tuple[Callable[[str], Found], str]:
    seed = torch.randint(2**62, (1,), generator=generator)

    def run(device: str) -> Found:
        return {f"p = {p}": lk.dropout_mask(seed.to(device), (n,), p) for p in (0.0, 0.05, 0.5)}

    return run, f"{n} elements"


CHECKS: dict[str, Check] = {
    "masks": masks, "selection": selection, "tile_sums": tile_sums, "masked_adamw": adamw, "dropout_mask": dropout,
}  # fmt: skip


def main() -> None:
    cases.begin()
    device = torch.device(record.device())
    obstacle = native.obstacle(device)
    for name, check in CHECKS.items():
        if obstacle is not None:
            record.skipped(f"csrc {name}", obstacle)
        elif cases.enough_time(f"csrc {name}", 3.0):
            held(f"csrc {name}", check, "native")
    if "fused" in cases.products():
        held("Triton dropout_mask", dropout, "triton")


def sizes() -> Iterator[int]:
    small = record.rehearsal()
    awkward, seconds, largest = (SMALL_AWKWARD, SMALL_SECONDS, SMALL_LARGEST) if small else (AWKWARD, SECONDS, LARGEST)
    yield from awkward
    drawn, began = random.Random(), time.perf_counter()
    while time.perf_counter() - began < seconds:
        yield int(largest ** drawn.random())


def held(name: str, check: Check, backend: str) -> None:
    """The op on every size, on the device by `backend` and on the CPU by the reference."""
    count = 0
    for n in sizes():
        run, words = check(n, torch.Generator().manual_seed(n))
        try:
            with environment("LORAPAR_BACKEND", backend), cases.poisoned(large=64 << 20, small=4):
                found = run(record.device())
                cases.wait()
        except Exception as error:
            record.wrong(name, f"{words}: {type(error).__name__}: {cases.one_line(error)}")
            # What an illegal access leaves behind is raised here, and ends the step.
            cases.wait()
            return
        with environment("LORAPAR_BACKEND", "reference"):
            wanted = run("cpu")
        for part, value in wanted.items():
            if not same(found[part], value):
                record.wrong(name, f"{words}: {part} is not the reference's")
                return
        count += 1
    record.result(name, "sizes", count)


def same(found: Any, wanted: Any) -> bool:
    """Equal in shape and every bit."""
    if not isinstance(wanted, Tensor):
        return found == wanted
    return found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)
