"""`lora_linear`, forward and backward, against the frozen layer, PEFT's layer and `addmm_` (lora_layers.py).

On a CPU 512 tokens at rank 16, on a GPU 8,192 (gpu/ asks a GPU for more); and one decoder layer of Llama-2-7B's shape
with all of its seven projections adapted. What is required of ours is in `required`.
"""

from typing import Any

import pytest
import torch

from bench.interleaved import Timed, interleave
from bench.lora_layers import Layer, launches, peak_bytes
from lorapar_kernels import lora_product
from lorapar_kernels.lora_linear import passes_for

# Largest difference over the largest value that rounding may make; bf16 has 8 bits and PEFT rounds at other places.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CPU = [
    Layer(512, 2048, n_out, 16, p, dtype, "cpu")
    for dtype in (torch.float32, torch.bfloat16)
    for n_out in (2048, 5632, 8192)
    for p in (0.0, 0.05)
]
CUDA = [
    Layer(8192, n_in, n_out, 16, p, torch.bfloat16, "cuda")
    for n_in, n_out in ((4096, 4096), (4096, 11008), (3584, 18944))
    for p in (0.0, 0.05)
]
BF16 = torch.cpu.get_capabilities()
NO_BF16 = pytest.mark.skipif(
    not (BF16.get("avx512_bf16") or BF16.get("amx_bf16")),
    reason="bf16 is emulated on this CPU, and takes minutes a case",
)
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def required(layer: Layer) -> dict[str, float]:
    """How many times as fast as another way ours has to be: a share over the frozen layer is a ratio below 1."""
    if layer.device == "cpu":
        if layer.p > 0.0:
            return {"frozen nn.Linear": 1 / 1.25}
        return {"frozen nn.Linear": 1 / 1.10} if layer.n_out > layer.n_in else {}
    if (layer.tokens, layer.rank, layer.p) == (8192, 16, 0.05):
        share = 1.08 if layer.n_out == layer.n_in else 1.05
        return {"frozen nn.Linear": 1 / share, "PEFT's layer": 1.0, "PEFT's layer, bf16": 1.0}
    return {}


@pytest.mark.parametrize(
    "layer",
    [
        *(pytest.param(layer, marks=NO_BF16 if layer.dtype == torch.bfloat16 else ()) for layer in CPU),
        *(pytest.param(layer, marks=NO_CUDA) for layer in CUDA),
    ],
    ids=lambda layer: layer.case,
)
def test_lora_linear(benchmark, report, layer):
    on_gpu = layer.device == "cuda"
    ways = layer.ways(("", *lora_product.WAYS) if on_gpu else ("",))
    for way in ways.values():
        way()
    calls = 4 if on_gpu else 1
    timed = interleave(benchmark, layer.case, ways, layer.device, rounds=7, calls=calls)
    # Where p > 0 the others draw other masks, so there is nothing to compare but ours among themselves.
    for name, result in timed.results.items():
        if name.startswith("ours") or (layer.p == 0.0 and name != "frozen nn.Linear"):
            for mine, theirs in zip(timed.results["ours"], result, strict=True):
                difference = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
                assert difference < BOUND[layer.dtype], name
    seconds = timed.median("ours")
    timed.facts = {
        "tokens": layer.tokens,
        "rank": layer.rank,
        "over_frozen_percent": {way: 100 * (timed.median(way) / timed.median("frozen nn.Linear") - 1) for way in ways},
        "frozen_tflops_per_s": layer.frozen_flops() / timed.median("frozen nn.Linear") / 1e12,
        "ours_tflops_per_s": layer.frozen_flops() / seconds / 1e12,
        "ours_least_gb_per_s": layer.least_bytes() / seconds / 1e9,
    }
    if on_gpu:
        one = torch.ones(1, 1, device="cuda")
        can_fuse = passes_for("lora_linear", one, [one]).fused
        timed.facts["product"] = lora_product.in_force(one.device, can_fuse)
        timed.facts["launches"] = {name: launches(way) for name, way in ways.items()}
        timed.facts["peak_bytes"] = {name: peak_bytes(way) for name, way in ways.items()}
    timed.required = {way: least for way, least in required(layer).items() if way in ways}
    report(timed)


@NO_CUDA
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_decoder_layer_cuda(benchmark, report, p):
    """One layer of Llama-2-7B's shape, 4 × 2,048 tokens, rank 16 on q, k, v, o, gate, up and down."""
    pytest.importorskip("peft", reason="peft is not installed")
    timed = decoder_layer(benchmark, p, "cuda", hidden=4096, mlp=11008, heads=32, batch=4, tokens=2048)
    timed.facts["peak_bytes"] = {way: peak_bytes(call) for way, call in timed.facts.pop("ways").items()}
    report(timed)


def decoder_layer(benchmark, p, device, hidden, mlp, heads, batch, tokens) -> Timed:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorapar

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_hidden_layers=1,
                         vocab_size=64, max_position_embeddings=tokens)  # fmt: skip

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        made: Any = LlamaForCausalLM(config)
        return made.to(device, dtype).requires_grad_(False)

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules="all-linear")
    x = torch.randn(batch, tokens, hidden, device=device, dtype=dtype, requires_grad=True)

    def forward_backward(network: torch.nn.Module) -> None:
        network(inputs_embeds=x, use_cache=False).logits.float().square().mean().backward()
        network.zero_grad()
        x.grad = None

    networks = {"ours": lorapar.attach(model(), lora, start="paper"), "frozen layer": model(),
                "PEFT's layers": get_peft_model(model(), lora)}  # fmt: skip
    ways = {name: lambda network=network: forward_backward(network.train()) for name, network in networks.items()}
    for way in ways.values():
        way()
    timed = interleave(benchmark, f"decoder layer {device} p={p}", ways, device, rounds=7)
    frozen = timed.median("frozen layer")
    timed.facts = {"ways": ways, "over_frozen_percent": {w: 100 * (timed.median(w) / frozen - 1) for w in ways}}
    return timed


@pytest.mark.parametrize("p", [0.05])
def test_decoder_layer_cpu(benchmark, report, p):
    """The same of SmolLM2-135M's shape, 2 × 256 tokens."""
    pytest.importorskip("peft", reason="peft is not installed")
    timed = decoder_layer(benchmark, p, "cpu", hidden=576, mlp=1536, heads=9, batch=2, tokens=256)
    timed.facts.pop("ways")
    report(timed)
