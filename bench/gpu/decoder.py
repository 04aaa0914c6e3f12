"""One decoder layer of Llama-2-7B's shape, forward and backward: 4 × 2,048 tokens, rank 16 on all seven projections.

Hidden 4096, MLP 11008, 32 heads; dropout 0.05, element masks that keep 40 %. The frozen layer, ours as lorapar makes it
(attach, a partition of random scores, activate) with each product, and PEFT's with fp32 and bf16 factors; on a bf16
base, and on a 4-bit one where bitsandbytes is installed. Then q, k, v and gate, up alone: lora_linear_grouped, which
reads x once for all, against one lora_linear each.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lorapar_kernels as lk
from bench.gpu import cases, record, timing
from bench.gpu.correctness import Case, Problem, four_bit, masks_of
from bench.lora_layers import FROZEN, OURS, PEFT, PEFT_NARROW, Layer, environment, forced_product
from lorapar_kernels import lora_product

HIDDEN, MLP, HEADS, BATCH, LENGTH = 4096, 11008, 32, 4, 2048
# 64 columns are the least that bitsandbytes dequantises rightly on every CPU.
SMALL = (64, 64, 2, 1, 12)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLD = (OURS["plain"], OURS["fused"], PEFT, PEFT_NARROW)
SECONDS = 15.0
Way = Callable[[], tuple[Tensor, ...]]


def sizes() -> tuple[int, int, int, int, int]:
    return SMALL if record.rehearsal() else (HIDDEN, MLP, HEADS, BATCH, LENGTH)


def groups() -> dict[str, tuple[int, ...]]:
    hidden, mlp, *_ = sizes()
    return {"gate, up": (mlp,) * 2} | ({} if record.rehearsal() else {"q, k, v": (hidden,) * 3})


def launches(device: str) -> None:
    hidden, mlp, _, batch, length = sizes()
    for n_in, n_out in ((hidden, hidden), (hidden, mlp), (mlp, hidden)):
        tokens, dtype = batch * length, torch.bfloat16
        cases.launch_layer(Layer(tokens, n_in, n_out, cases.RANK, cases.P, dtype, device, cases.ACTIVE))
        # A 4-bit base is opaque.
        problem = Problem(Case("add", tokens, n_in, (n_out,)), device)
        problem.ours(masks_of(problem))
    for n_outs in groups().values():
        for product in lora_product.WAYS:
            problem = Problem(Case("grouped", batch * length, hidden, n_outs, product=product), device)
            problem.ours(masks_of(problem))


def main() -> None:
    cases.begin()
    decoder(f"decoder layer p={cases.P}, bf16 base", quantised=False)
    for name, n_outs in groups().items():
        group(name, n_outs)
    case = f"decoder layer p={cases.P}, 4-bit base"
    if importlib.util.find_spec("bitsandbytes"):
        decoder(case, quantised=True)
    else:
        record.skipped(case, "bitsandbytes is not installed")


# The whole layer


def bare(quantised: bool) -> nn.Module:
    """The layer within a model of one, whose embedding is not used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, heads, _, length = sizes()
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_hidden_layers=1,
                         vocab_size=64, max_position_embeddings=length)  # fmt: skip
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


def decoder(case: str, quantised: bool) -> None:
    if not cases.enough_time(case, SECONDS):
        return
    hidden, _, _, batch, length = sizes()
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, length, hidden, device=record.device(), dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def forward_backward(network: Any, product: str = "") -> tuple[Tensor, ...]:
        leaves = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
        with forced_product(product):
            y = network.model(inputs_embeds=x, use_cache=False).last_hidden_state
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    ways: dict[str, Way] = {}
    for name, make in makers(quantised).items():
        try:
            network = make().train()
        except Exception as error:
            told = record.wrong if name == "ours" else record.skipped
            told(f"{case} | {name}", f"{type(error).__name__}: {cases.one_line(error)}")
            continue
        of_ours = products() if name == "ours" and not quantised else ("plain",)
        for product in of_ours:
            way = OURS[product] if name == "ours" else name
            ways[way] = lambda network=network, product=product: forward_backward(network, product)
    cases.tried(case, ways)
    facts = {"tokens": batch * length, "hidden": hidden}
    # A network that cannot be captured costs its replays alone, so these come last. Two calls are 600 launches, and a
    # queue holds about a thousand before a launch waits.
    medians = timing.say(case, timing.times(ways, ("events", "host"), calls=2), **facts)
    cases.say_over(case, medians, FROZEN, TOLD)
    for name, way in ways.items():
        record.result(f"{case} | {name} [peak memory]", "B", timing.peak_bytes(way), way=name)
    if record.rehearsal():
        return
    replayed = timing.say(case, timing.times(ways, ("graph",)), **facts)
    for name, percent in timing.over(replayed, FROZEN, "graph").items():
        headline = f"{case}: {name} over {FROZEN}, by replay" if name in TOLD else None
        record.result(f"{case} | {name} over {FROZEN} [replay]", "%", percent, headline=headline, way=name)


def products() -> tuple[str, ...]:
    """In a rehearsal the last alone: an interpreted decoder layer takes a second."""
    return cases.products()[-1:] if record.rehearsal() else cases.products()


def makers(quantised: bool) -> dict[str, Callable[[], nn.Module]]:
    """Each with a base of its own, of the same values; PEFT puts its layers into the model it is given."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        record.skipped("decoder layer | ours and PEFT's", str(error))
        return {FROZEN: lambda: bare(quantised)}
    lora = LoraConfig(r=cases.RANK, lora_alpha=2 * cases.RANK, lora_dropout=cases.P, target_modules=TARGETS)
    return {
        FROZEN: lambda: bare(quantised),
        "ours": lambda: of_lorapar(quantised, lora),
        PEFT: lambda: of_peft(quantised, lora, wide=True),
        PEFT_NARROW: lambda: of_peft(quantised, lora, wide=False),
    }


# A group of one x alone


def group(name: str, n_outs: tuple[int, ...]) -> None:
    hidden, _, _, batch, length = sizes()
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

    def grouped(product: str) -> tuple[Tensor, ...]:
        with forced_product(product):
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
        ways[f"{OURS[product]}, one by one"] = lambda product=product: apart(product)
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
