"""One decoder layer of Llama-2-7B's shape, forward and backward: 8,192, 2,048 and 512 tokens, rank 16 on all seven
projections.

Hidden 4096, MLP 11008, 32 heads; dropout 0.05, element masks that keep 40 %. The frozen layer; ours as lorapar makes it
(attach, a partition of random scores, activate) with each product, and where every projection has an x of its own, so
that none share an op ("one by one"); PEFT's with fp32 and bf16 factors; the `addmm_` way, without dropout and masks. On
a bf16 base, and on a 4-bit one where bitsandbytes is installed. Of each the GPU's time, the clock's, the host's, which
is also told a LoRA layer, and of ours whether a training step that is captured as a graph gives the same bits.

Then groups of one, two and three layers of one x: lora_linear_grouped, which reads x once for all, against one
lora_linear each; and with the dropout masks of the forward kept as bits for the backward, against drawn again.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lorapar_kernels as lk
from bench.baselines.addmm import addmm_lora
from bench.gpu import cases, record, timing
from bench.gpu.correctness import Case, Problem, four_bit, masks_of
from bench.lora_layers import ADDMM, FROZEN, OURS, PEFT, PEFT_NARROW, SCALING, Layer, environment, forced_product
from lorapar_kernels import lora_product, native

HIDDEN, MLP, HEADS = 4096, 11008, 32
# Batches and their length.
BATCHES = ((4, 2048), (1, 2048), (1, 512))
# 64 columns are the least that bitsandbytes dequantises rightly on every CPU.
SMALL, SMALL_BATCHES = (64, 64, 2), ((1, 12),)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
APART = "ours, one by one"
TOLD = (OURS["plain"], OURS["fused"], APART, PEFT, PEFT_NARROW, ADDMM)
# A GPU's seconds for a case at most: of making the networks, and of timing them.
SECONDS, TIMING_SECONDS = 20.0, 10.0
STEPS = 3
Way = Callable[[], tuple[Tensor, ...]]


def sizes() -> tuple[int, int, int]:
    return SMALL if record.rehearsal() else (HIDDEN, MLP, HEADS)


def batches() -> tuple[tuple[int, int], ...]:
    return SMALL_BATCHES if record.rehearsal() else BATCHES


def groups() -> dict[str, tuple[int, ...]]:
    hidden, mlp, _ = sizes()
    every = {"o": (hidden,), "gate, up": (mlp,) * 2}
    return every | ({} if record.rehearsal() else {"q, k, v": (hidden,) * 3})


def bits_kept(kept: bool | None) -> AbstractContextManager[Any]:
    """Within the block, whether forwards keep their dropout masks as bits for the backward; None: as ours decides."""
    return nullcontext() if kept is None else mock.patch.object(cases.linear, "keeps_bits", return_value=kept)


def launches(device: str) -> None:
    hidden, mlp, _ = sizes()
    for batch, length in batches():
        tokens = batch * length
        for n_in, n_out in ((hidden, hidden), (hidden, mlp), (mlp, hidden)):
            cases.launch_layer(Layer(tokens, n_in, n_out, cases.RANK, cases.P, torch.bfloat16, device, cases.ACTIVE))
            # A 4-bit base is opaque.
            problem = Problem(Case("add", tokens, n_in, (n_out,)), device)
            problem.ours(masks_of(problem))
        # In the whole layer q, k and v are a group, whatever is timed of groups alone.
        for n_outs in {*groups().values(), (hidden,) * 3}:
            for product, kept in ((product, kept) for product in lora_product.WAYS for kept in (None, True, False)):
                problem = Problem(Case("grouped", tokens, hidden, n_outs, product=product), device)
                with bits_kept(kept):
                    problem.ours(masks_of(problem))


def main() -> None:
    cases.begin()
    decoder("bf16 base", quantised=False)
    for name, n_outs in groups().items():
        group(name, n_outs)
    if importlib.util.find_spec("bitsandbytes"):
        decoder("4-bit base", quantised=True)
    else:
        record.skipped("decoder layer, 4-bit base", "bitsandbytes is not installed")


# The whole layer


def bare(quantised: bool) -> nn.Module:
    """The layer within a model of one, whose embedding is not used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, heads = sizes()
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_hidden_layers=1,
                         vocab_size=64, max_position_embeddings=2048)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(record.device()):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).requires_grad_(False)
    if quantised:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.split(".")[-1] in TARGETS:
                model.set_submodule(name, four_bit(module.weight.detach()))
        model.is_loaded_in_4bit = True
    return model


def of_lorapar(quantised: bool, lora: Any) -> nn.Module:
    import lorapar
    from lorapar.adapter.layers import lora_parameters

    network = lorapar.attach(bare(quantised), lora, start="paper")
    # A rehearsal forces Triton's kernels, and selection has none.
    with environment("LORAPAR_BACKEND", ""):
        scores = {name: torch.rand(parameter.shape) for name, parameter in lora_parameters(network).items()}
        # The highest share a of uniform scores sums to a (2 - a) of the whole.
        made = lorapar.partition(scores, scores, theta=cases.ACTIVE * (2 - cases.ACTIVE))
        lorapar.activate(network, made, "sft")
    return network.get_base_model()


def of_peft(quantised: bool, lora: Any, wide: bool) -> nn.Module:
    from peft import get_peft_model

    made: Any = bare(quantised)
    network = get_peft_model(made, lora, autocast_adapter_dtype=wide).get_base_model()
    for parameter in network.parameters():
        if parameter.requires_grad:
            # As ours starts: products with zeros can run faster. PEFT leaves the factors of a 4-bit base in fp32.
            parameter.data = torch.randn_like(parameter, dtype=torch.float32 if wide else torch.bfloat16).mul_(0.01)
    return network


class AddmmLinear(nn.Module):
    """A projection by baselines/addmm.py: bf16 factors, no dropout, no masks."""

    def __init__(self, base: Any):
        super().__init__()
        self.base = base
        on: dict[str, Any] = {"device": record.device(), "dtype": torch.bfloat16}
        self.a = nn.Parameter(torch.randn(cases.RANK, base.in_features, **on).mul_(0.01))
        self.b = nn.Parameter(torch.randn(base.out_features, cases.RANK, **on).mul_(0.01))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight if type(self.base) is nn.Linear else self.dense
        return addmm_lora(x.reshape(-1, x.shape[-1]), weight, self.a, self.b, SCALING).view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        """A 4-bit weight in bf16."""
        from bitsandbytes import functional

        weight = self.base.weight
        return functional.dequantize_4bit(weight.data, weight.quant_state)


def of_addmm(quantised: bool) -> nn.Module:
    network = bare(quantised)
    for name in [name for name, _ in network.named_modules() if name.split(".")[-1] in TARGETS]:
        network.set_submodule(name, AddmmLinear(network.get_submodule(name)))
    return network


def one_by_one(network: nn.Module) -> nn.Module:
    """Each projection is handed an x of its own."""
    from peft.tuners.lora import LoraLayer

    def own(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0].view_as(given[0]), *given[1:]

    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_pre_hook(own)
    return network


def decoder(base: str, quantised: bool) -> None:
    name = f"decoder layer p={cases.P}, {base}"
    if not cases.enough_time(name, SECONDS):
        return
    networks: dict[str, Any] = {}
    for way, make in makers(quantised).items():
        try:
            networks[way] = make().train()
        except Exception as error:
            told = record.wrong if way.startswith("ours") else record.skipped
            told(f"{name} | {way}", f"{type(error).__name__}: {cases.one_line(error)}")
    for batch, length in batches():
        # The largest has the name that it had before there were others.
        case = name if (batch, length) == batches()[0] else f"decoder layer T={batch * length} p={cases.P}, {base}"
        if cases.enough_time(case, TIMING_SECONDS):
            time_networks(case, networks, batch, length)


def time_networks(case: str, networks: dict[str, Any], batch: int, length: int) -> None:
    torch.manual_seed(0)
    on: dict[str, Any] = {"device": record.device(), "dtype": torch.bfloat16}
    x, dy = (torch.randn(batch, length, sizes()[0], **on) for _ in range(2))
    x.requires_grad_()

    def forward_backward(network: Any, product: str = "") -> tuple[Tensor, ...]:
        leaves = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
        with forced_product(product):
            y = network.model(inputs_embeds=x, use_cache=False).last_hidden_state
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    ways: dict[str, Way] = {}
    for name, network in networks.items():
        for product in products() if name == "ours" else ("plain",):
            way = OURS[product] if name == "ours" else name
            ways[way] = lambda network=network, product=product: forward_backward(network, product)
    cases.tried(case, ways)
    facts = {"tokens": batch * length, "hidden": sizes()[0]}
    # A network that cannot be captured costs its replays alone, so these come last. Two calls are 600 launches, and a
    # queue holds about a thousand before a launch waits.
    medians = timing.say(case, timing.times(ways, ("events", "host", "clock"), calls=2), **facts)
    cases.say_over(case, medians, FROZEN)
    # A user's time, and what of it is Python's and the launches'.
    for name, percent in timing.over(medians, FROZEN, "clock").items():
        headline = f"{case}: {name} over {FROZEN}, by the clock" if name in TOLD else None
        record.result(f"{case} | {name} over {FROZEN} [clock]", "%", percent, headline=headline, way=name)
    of_host, words = {name: of["host"] for name, of in medians.items() if "host" in of}, "the host's time a LoRA layer"
    for name in (name for name in of_host if name != FROZEN and FROZEN in of_host):
        each = (of_host[name] - of_host[FROZEN]) / len(TARGETS)
        headline = f"{case}: {name}, {words}" if name in (OURS["plain"], PEFT) else None
        record.result(f"{case} | {name}, {words}", "s", each, headline=headline, way=name)
    for name, way in ways.items():
        record.result(f"{case} | {name} [peak memory]", "B", timing.peak_bytes(way), way=name)
    if record.rehearsal():
        return
    replayed = timing.say(case, timing.times(ways, ("graph",)), **facts)
    for name, percent in timing.over(replayed, FROZEN, "graph").items():
        headline = f"{case}: {name} over {FROZEN}, by replay" if name in TOLD else None
        record.result(f"{case} | {name} over {FROZEN} [replay]", "%", percent, headline=headline, way=name)
    if "ours" in networks:
        captured_step(f"{case}: a training step captured and replayed", networks["ours"], x, dy)


def captured_step(case: str, network: Any, x: Tensor, dy: Tensor) -> None:
    """Forward, backward and AdamW with its step's number in memory: a graph's replays against calls, bit for bit."""
    obstacle = native.obstacle(torch.device(record.device()))
    if obstacle is not None:
        record.skipped(case, obstacle)
        return
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    masks = [torch.rand_like(parameter) < cases.ACTIVE for parameter in parameters]
    moments = [[torch.zeros(int(mask.sum()), device=x.device) for mask in masks] for _ in range(2)]
    prepared = lk.PreparedAdamW(parameters, masks, *moments)
    number = torch.zeros((), dtype=torch.int64, device=x.device)
    written = [number, *(parameter.detach() for parameter in parameters), *moments[0], *moments[1]]
    start = [tensor.clone() for tensor in written]

    def step() -> None:
        with forced_product("plain"):
            y = network.model(inputs_embeds=x, use_cache=False).last_hidden_state
            grads = torch.autograd.grad(y, parameters, dy)
        number.add_(1)
        prepared.step(grads, number, lr=1e-3)

    def from_the_start(run: Callable[[], object]) -> list[Tensor]:
        """Of the same dropout seeds, which the layers draw from torch's generator."""
        for tensor, value in zip(written, start):
            tensor.copy_(value)
        torch.manual_seed(1)
        for _ in range(STEPS):
            run()
        cases.wait()
        return [tensor.clone() for tensor in written]

    try:
        graph = timing.captured(step)
        wanted, found = from_the_start(step), from_the_start(graph.replay)
    except RuntimeError as error:
        record.wrong(case, cases.one_line(error))
        cases.wait()
        return
    finally:
        for tensor, value in zip(written, start):
            tensor.copy_(value)
    different = sum(cases.differing(one, other) for one, other in zip(wanted, found, strict=True))
    if different:
        record.wrong(case, f"{different} elements differ after {STEPS} steps")
    else:
        record.result(case, "elements that differ", 0.0, headline=case)


def products() -> tuple[str, ...]:
    """In a rehearsal the last alone: an interpreted decoder layer takes a second."""
    return cases.products()[-1:] if record.rehearsal() else cases.products()


def makers(quantised: bool) -> dict[str, Callable[[], nn.Module]]:
    """Each with a base of its own, of the same values; PEFT puts its layers into the model it is given."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        record.skipped("decoder layer | ours and PEFT's", str(error))
        return {FROZEN: lambda: bare(quantised), ADDMM: lambda: of_addmm(quantised)}
    lora = LoraConfig(r=cases.RANK, lora_alpha=2 * cases.RANK, lora_dropout=cases.P, target_modules=TARGETS)
    return {
        FROZEN: lambda: bare(quantised),
        "ours": lambda: of_lorapar(quantised, lora),
        APART: lambda: one_by_one(of_lorapar(quantised, lora)),
        PEFT: lambda: of_peft(quantised, lora, wide=True),
        PEFT_NARROW: lambda: of_peft(quantised, lora, wide=False),
        ADDMM: lambda: of_addmm(quantised),
    }


# A group of one x alone


def group(name: str, n_outs: tuple[int, ...]) -> None:
    (hidden, _, _), (batch, length) = sizes(), batches()[0]
    case = f"{name}: {hidden}→{'+'.join(map(str, n_outs))} T={batch * length} p={cases.P}"
    if not cases.enough_time(case, 6.0):
        return
    problem = Problem(Case("grouped", batch * length, hidden, n_outs), record.device())
    masks = masks_of(problem)
    masks_a, masks_b = zip(*masks)
    x = problem.x.requires_grad_()
    as_, bs = ([factor.requires_grad_() for factor in of] for of in (problem.lora_as, problem.lora_bs))
    leaves = [x, *as_, *bs]

    def frozen() -> tuple[Tensor, ...]:
        ys = [nn.functional.linear(x, weight) for weight in problem.weights]
        return (*(y.detach() for y in ys), *torch.autograd.grad(ys, [x], problem.dys))

    def grouped(product: str, kept: bool | None = None) -> tuple[Tensor, ...]:
        with forced_product(product), bits_kept(kept):
            ys = lk.lora_linear_grouped(x, problem.weights, as_, bs, problem.scalings, mask_as=masks_a,
                                        mask_bs=masks_b, dropout_p=cases.P, seeds=problem.seeds)  # fmt: skip
            return (*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, problem.dys))

    def apart(product: str) -> tuple[Tensor, ...]:
        with forced_product(product):
            each = zip(problem.weights, as_, bs, problem.scalings, masks, problem.seeds)
            ys = [lk.lora_linear(x, weight, a, b, scaling, mask_a=mask_a, mask_b=mask_b, dropout_p=cases.P, seed=seed)
                  for weight, a, b, scaling, (mask_a, mask_b), seed in each]  # fmt: skip
            return (*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, problem.dys))

    ways: dict[str, Way] = {FROZEN: frozen}
    for product in products():
        ways[f"{OURS[product]}, grouped"] = lambda product=product: grouped(product)
        if len(n_outs) > 1:
            ways[f"{OURS[product]}, one by one"] = lambda product=product: apart(product)
    bits, drawn = "ours, bits kept", "ours, drawn again"
    ways |= {bits: lambda: grouped("plain", True), drawn: lambda: grouped("plain", False)}
    results = cases.tried(case, ways)
    of_groups = {name: result for name, result in results.items() if name != FROZEN}
    for way, result in of_groups.items():
        first = next(iter(of_groups.values()))
        worst = max(cases.difference(one, other) for one, other in zip(first, result, strict=True))
        if not worst < cases.BOUND[torch.bfloat16]:
            record.wrong(f"{case} | {way}", f"differs by {worst:.3g} of the largest value")
            del ways[way]
    del results, of_groups
    medians = timing.say(case, timing.times(ways), tokens=batch * length)
    cases.say_over(case, medians, FROZEN, tuple(ways))
    for kind in ("graph", "events"):
        if bits in medians and kind in medians.get(drawn, {}) and kind in medians[bits]:
            percent = timing.over(medians, drawn, kind)[bits]
            headline = f"{case}: {bits} over {drawn}" if kind == "graph" else None
            record.result(f"{case} | {bits} over {drawn} [{kind}]", "%", percent, headline=headline, timed_by=kind)
