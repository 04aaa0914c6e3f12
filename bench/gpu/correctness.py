"""Every variant that the later steps launch, against float64 on the same device: y, dX, dA and dB.

The largest cases first, since those are the ones whose speed is told. Each case is one line: its worst relative error,
‖ours − exact‖ / ‖exact‖, with the error of each result beside it, against the bounds of
tests/kernels/test_lora_linear.py. Outputs come out of memory that holds NaN, so an unwritten one shows; an element
outside a mask must be exactly zero. Last: equal calls give equal bits, and a device or stream that is not the current
one serves as well.
"""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lorapar_kernels as lk
from bench.gpu import cases, record, timing
from bench.lora_layers import SCALING, forced_product
from lorapar_kernels.dropout import threshold_of

# ‖ours − exact‖ / ‖exact‖; rounding the factors is no part of it, as they hold values of x's dtype.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
BF16, FP32 = torch.bfloat16, torch.float32
EXAMPLES = 8
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """form: "linear", one layer; "grouped", several of one x; "add", an opaque base; "4-bit", bitsandbytes' base;
    "scored", the scoring pass; "forward", no gradient. n_outs: of each layer; masks: see cases.masks."""

    form: str
    tokens: int
    n_in: int
    n_outs: tuple[int, ...]
    rank: int = cases.RANK
    p: float = cases.P
    masks: str = "elements"
    dtype: torch.dtype = BF16
    factors: torch.dtype = FP32
    product: str = "plain"

    @property
    def name(self) -> str:
        sizes = f"{self.n_in}→{'+'.join(map(str, self.n_outs))} T={self.tokens} r={self.rank} p={self.p}"
        dtypes = "/".join(str(dtype)[6:] for dtype in dict.fromkeys((self.dtype, self.factors)))
        form = f"{self.form} {self.product}" if self.form in ("linear", "grouped", "forward") else self.form
        return f"{form} {sizes} masks={self.masks} {dtypes}"

    @property
    def problem(self) -> tuple[Any, ...]:
        """What the exact results depend on."""
        form = self.form if self.form in ("4-bit", "scored") else ""
        return form, self.tokens, self.n_in, self.n_outs, self.rank, self.p, self.dtype, self.factors


def every_case() -> Iterator[Case]:
    """In the order in which they tell most."""
    small = record.rehearsal()
    shapes, tokens = cases.shapes(), cases.tokens()
    (n_in, n_out), wide = shapes[0], shapes[1][1]
    of_layer = [(p, a, b) for p in (cases.P, 0.0) for a, b in (shapes[:1] if small else shapes)]
    every = [Case("linear", tokens, a, (b,), p=p, masks=m) for p, a, b in of_layer for m in ("elements", "none")]
    every += [Case("linear", tokens, n_in, (n_out,), masks="tiles")]
    every += [Case("linear", tokens, wide, (n_in,))]
    for outs in ((n_out,) * 3, (wide,) * 2)[: 1 if small else None]:
        every += [Case("grouped", tokens, n_in, outs, p=p) for p in (cases.P, 0.0)]
    # Fewer tokens go in more parts, so other kernels add up; 300 are no multiple of a tile.
    fewer = (12,) if small else (2048, 512, 300)
    every += [Case("linear", t, a, (b,), p=p) for t in fewer for p, a, b in of_layer]
    ranks = (8,) if small else (8, cases.RANK, 64)
    every += [Case("linear", 13 if small else 300, n_in, (n_out,), r, factors=f) for r in ranks for f in (FP32, BF16)]
    # In float32 few terms a sum: the bound is of rounding, and grows with their number.
    narrow, outs = (n_in, (n_out,)) if small else (512, (768,))
    every += [Case("linear", 20 if small else 300, narrow, outs, p=p, dtype=FP32) for p in (cases.P, 0.0)]
    steps = (1, 2) if small else (1, 2, 4, 8, 16)
    every += [Case("forward", t, a, (b,), p=0.0) for a, b in shapes[: 1 if small else None] for t in steps]
    for case in dict.fromkeys(every):
        yield case
        yield dataclasses.replace(case, product="fused")
    for shape in ((n_in, (n_out,)), (n_in, (wide,)), (wide, (n_in,)))[: 1 if small else None]:
        yield Case("add", tokens, *shape)
        yield Case("4-bit", tokens, *shape)
    for shape in ((n_in, (n_out,)), (wide, (n_in,))):
        yield Case("scored", tokens, *shape, rank=8, p=0.0, masks="none")


class Problem:
    """The inputs of a case."""

    def __init__(self, case: Case, device: str):
        on: dict[str, Any] = {"device": device}
        torch.manual_seed(case.tokens + case.n_in)
        self.case, n_in, rank = case, case.n_in, case.rank

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, **on).mul_(scale).to(case.dtype)

        self.x = draw(case.tokens, n_in)
        self.weights = [draw(n_out, n_in, scale=n_in**-0.5) for n_out in case.n_outs]
        self.lora_as = [draw(rank, n_in, scale=n_in**-0.5).to(case.factors) for _ in case.n_outs]
        self.lora_bs = [draw(n_out, rank, scale=0.1).to(case.factors) for n_out in case.n_outs]
        self.dys = [draw(case.tokens, n_out) for n_out in case.n_outs]
        self.seeds = [torch.randint(2**62, (1,), **on) if case.p else None for _ in case.n_outs]
        self.scalings = [SCALING + i for i in range(len(case.n_outs))]
        step = -(-case.tokens // EXAMPLES)
        self.offsets = torch.tensor([*range(0, case.tokens, step), case.tokens])
        self.base: Any = None
        if case.form == "4-bit":
            from lorapar_kernels.bnb_weights import dequantised

            self.base = four_bit(self.weights[0])
            self.weights = [dequantised(self.base, case.dtype).clone()]

    def ours(self, masks: list[tuple[Tensor | None, Tensor | None]]) -> Named:
        """Each layer's y, dA and dB, and dX."""
        case = self.case
        x = self.x.detach().requires_grad_()
        as_, bs = ([factor.detach().requires_grad_() for factor in of] for of in (self.lora_as, self.lora_bs))
        (a, b), (mask_a, mask_b), weight = (as_[0], bs[0]), masks[0], self.weights[0]
        options: dict[str, Any] = {"mask_a": mask_a, "mask_b": mask_b, "dropout_p": case.p, "seed": self.seeds[0]}
        with forced_product(case.product):
            if case.form == "scored":
                sums = lk.ScoreSums.zeros_like(a, b)
                examples = lk.Examples.of(self.offsets, x.device)
                y = lk.lora_linear_scored(x, weight, a, b, SCALING, examples, sums)
                (dx,) = torch.autograd.grad(y, x, self.dys[0])
                totals = {name: total.double() + rest for name, total, rest in zip(sums._fields, sums, sums.rests)}
                return {"y": y.detach(), "dx": dx, **totals}
            if case.form == "forward":
                with torch.no_grad():
                    return {"y": lk.lora_linear(x, weight, a, b, SCALING, **options)}
            if case.form == "grouped":
                masks_a, masks_b = zip(*masks)
                ys = lk.lora_linear_grouped(x, self.weights, as_, bs, self.scalings, mask_as=masks_a, mask_bs=masks_b,
                                            dropout_p=case.p, seeds=self.seeds)  # fmt: skip
            elif case.form == "linear":
                ys = [lk.lora_linear(x, weight, a, b, SCALING, **options)]
            elif case.form == "add":
                ys = [lk.lora_add(F.linear(x, weight), x, a, b, SCALING, **options)]
            else:
                from lorapar_kernels.bnb_weights import FrozenProduct

                y: Any = FrozenProduct.apply(x, self.base)
                ys = [lk.lora_add(y, x, a, b, SCALING, **options)]
            dx, *of_factors = torch.autograd.grad(ys, [x, *as_, *bs], self.dys)
        n = len(ys)
        named = {"dx": dx}
        for i, y in enumerate(ys):
            named |= {f"y{i}": y.detach(), f"da{i}": of_factors[i], f"db{i}": of_factors[n + i]}
        return named

    def exact(self) -> Named:
        """The same in float64 by the formulas of lora_linear.py's header, without masks."""
        case, x = self.case, self.x.double()
        named: Named = {}
        dx = torch.zeros_like(x)
        each = zip(self.weights, self.lora_as, self.lora_bs, self.dys, self.seeds, self.scalings)
        for i, (weight, a, b, dy, seed, scaling) in enumerate(each):
            weight, a, b, dy = (t.double() for t in (weight, a, b, dy))
            keep = 1.0 if seed is None else lk.dropout_mask(seed, x.shape, case.p).double().div_(1.0 - case.p)
            dropped = x * keep
            s, ds = dropped @ a.t(), scaling * dy @ b
            y = (x @ weight.t()).addmm_(s, b.t(), alpha=scaling)
            if case.form == "scored":
                return {"y": y, "dx": dy @ weight + ds @ a, **self._sums(x, a, b, dy, s, ds)}
            dx.addmm_(dy, weight).add_((ds @ a).mul_(keep))
            named |= {f"y{i}": y, f"da{i}": ds.t() @ dropped, f"db{i}": scaling * dy.t() @ s}
        return named | {"dx": dx, "y": named["y0"]}

    def _sums(self, x: Tensor, a: Tensor, b: Tensor, dy: Tensor, s: Tensor, ds: Tensor) -> Named:
        """Σ Gφ and Σ (Gφ)² over examples, of A and B."""
        sums = [torch.zeros_like(factor) for factor in (a, a, b, b)]
        for start, end in itertools.pairwise(self.offsets.tolist()):
            rows = slice(start, end)
            for place, phi, g in ((0, a, ds[rows].t() @ x[rows]), (2, b, SCALING * dy[rows].t() @ s[rows])):
                gphi = g * phi
                sums[place] += gphi
                sums[place + 1] += gphi * gphi
        return dict(zip(lk.ScoreSums._fields, sums))


def four_bit(weight: Tensor) -> Any:
    """A bitsandbytes NF4 layer of this weight, dequantised to its dtype, as a checkpoint of that dtype is."""
    import bitsandbytes as bnb

    nn: Any = bnb.nn
    made = nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    made.weight = nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return made.to(weight.device).requires_grad_(False)


def masks_of(problem: Problem) -> list[tuple[Tensor | None, Tensor | None]]:
    return [cases.masks(problem.case.masks, a, b) for a, b in zip(problem.lora_as, problem.lora_bs)]


def missing(case: Case) -> str | None:
    """Why a case cannot run here."""
    if case.form == "4-bit" and not importlib.util.find_spec("bitsandbytes"):
        return "bitsandbytes is not installed"
    if case.product not in cases.products():
        return "Triton's kernels do not run here"
    return None


def launches(device: str) -> None:
    from lorapar_kernels.triton_kernels import dropout as dropout_triton

    for case in every_case():
        # On the meta device nothing can be quantised; what a 4-bit base leaves to us is what any opaque one does.
        problem = Problem(dataclasses.replace(case, form="add") if case.form == "4-bit" else case, device)
        problem.ours(masks_of(problem))
        if case.p > 0.0:
            # Of the reference.
            dropout_triton.dropout_mask(torch.empty(1, dtype=torch.int64, device=device), problem.x.shape,
                                        threshold_of(case.p))  # fmt: skip


def main() -> None:
    cases.begin()
    exact: tuple[tuple[Any, ...], Problem, Named] | None = None
    show_poison()
    for case in every_case():
        why = missing(case)
        if why is not None:
            record.skipped(case.name, why)
            continue
        if not cases.enough_time(case.name, 6.0):
            continue
        try:
            if exact is None or exact[0] != case.problem:
                exact = None
                problem = Problem(case, record.device())
                exact = case.problem, problem, problem.exact()
            _, problem, wanted = exact
            # Of the same problem, but perhaps another form, masks and product.
            problem.case = case
            check(problem, wanted)
            cases.wait()
        except Exception as error:
            record.wrong(case.name, f"{type(error).__name__}: {cases.one_line(error)}")
            cases.wait()
    exact = None
    repeated()
    replayed()
    elsewhere()


def check(problem: Problem, wanted: Named) -> None:
    case, masks = problem.case, masks_of(problem)
    with cases.poisoned():
        found = problem.ours(masks)
    errors, outside = {}, 0
    for name, ours in found.items():
        mask = None
        if name.startswith(("da", "db")):
            mask = masks[int(name[2:])][name[1] == "b"]
        exact = wanted[name]
        if mask is not None:
            outside += int(ours.masked_fill(mask, 0.0).count_nonzero())
            exact = exact * mask
        errors[name] = float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    # NaN is worse than any error.
    worst = max(errors.values(), key=lambda error: error if error == error else float("inf"))
    if outside:
        record.wrong(case.name, f"{outside} elements outside a mask are not zero", **errors)
    elif not worst <= BOUND[case.dtype]:
        record.wrong(case.name, f"relative error {worst:.3g}, of at most {BOUND[case.dtype]:g}", **errors)
    else:
        record.result(case.name, "relative error", worst, bound=BOUND[case.dtype], **errors)


def show_poison() -> None:
    """That what is allocated really holds NaN, or the cases below would show less than they say."""
    with cases.poisoned():
        shares = [
            float(torch.empty(n, device=record.device()).isnan().float().mean())
            for n in ((64,) if record.rehearsal() else (64, 1 << 24))
        ]
    if min(shares) < 1.0:
        record.wrong("memory filled with NaN", "an output that nothing wrote need not show", share=min(shares))
    else:
        record.result("memory filled with NaN", "share", 1.0)


def repeated() -> None:
    """Equal calls give equal bits."""
    for case in of_each_form():
        problem = Problem(case, record.device())
        masks = masks_of(problem)
        one, two = (problem.ours(masks) for _ in range(2))
        told(f"equal calls, equal bits: {case.name}", one, two)


def of_each_form() -> list[Case]:
    tokens, (n_in, n_out) = cases.tokens(), cases.shapes()[0]
    return [
        *(Case("linear", tokens, n_in, (n_out,), product=product) for product in cases.products()),
        *(Case("grouped", tokens, n_in, (n_out,) * 3, product=product) for product in cases.products()),
        Case("scored", tokens, n_in, (n_out,), rank=8, p=0.0, masks="none"),
    ]


def replayed() -> None:
    """A graph captured of a call, forward and backward, gives at its replay the bits of a call: of an x and of dropout
    seeds that have changed since."""
    if record.rehearsal():
        record.skipped("a captured graph", "this is a CPU")
        return
    for case in of_each_form():
        if case.form == "scored":
            continue
        problem, found = Problem(case, record.device()), {}
        masks = masks_of(problem)
        name = f"captured and replayed, equal bits: {case.name}"
        try:
            graph = timing.captured(lambda problem=problem, masks=masks, found=found: found.update(problem.ours(masks)))
        except RuntimeError as error:
            record.wrong(name, cases.one_line(error))
            cases.wait()
            continue
        problem.x.normal_()
        for seed in problem.seeds:
            assert seed is not None
            seed.random_()
        wanted = problem.ours(masks)
        graph.replay()
        cases.wait()
        told(name, wanted, found)


def told(name: str, one: Named, two: Named) -> None:
    different = {key: cases.differing(one[key], two[key].to(one[key].device)) for key in one}
    if any(different.values()):
        record.wrong(name, f"{sum(different.values())} elements differ", **different)
    else:
        record.result(name, "elements", 0.0)


def elsewhere() -> None:
    """On a second device while the first is the current one; where there is one device, on a side stream."""
    if record.rehearsal():
        record.skipped("a second device or a side stream", "this is a CPU")
        return
    tokens, (n_in, n_out) = 300, cases.shapes()[0]
    for product in cases.products():
        case = Case("linear", tokens, n_in, (n_out,), product=product)
        problem = Problem(case, record.device())
        masks = masks_of(problem)
        here = problem.ours(masks)
        if torch.cuda.device_count() > 1:
            other = Problem(case, "cuda:1")
            for name in ("x", "weights", "lora_as", "lora_bs", "dys", "seeds"):
                setattr(other, name, _to(getattr(problem, name), "cuda:1"))
            there = other.ours([(_to(a, "cuda:1"), _to(b, "cuda:1")) for a, b in masks])
            told(f"on cuda:1 while cuda:0 is current: {case.name}", here, there)
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                there = problem.ours(masks)
            torch.cuda.synchronize()
            told(f"on a side stream: {case.name}", here, there)


def _to(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_to(one, device) for one in value]
    return None if value is None else value.to(device)
