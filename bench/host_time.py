"""What Python takes of a decoder layer of Llama-2-7B's shape, forward and backward, measured with no GPU.

    python -m bench.host_time [--rounds N] [--profile WAY]

Hidden 4096, MLP 11008, 2,048 tokens, bf16; LoRA of rank 16 on all seven projections, dropout 0.05, fp32 factors as PEFT
makes them, and for ours masks that keep 40 %. Every tensor is on the meta device, where torch's operations do on the
host what they do there for a GPU, but for the launch: they find their implementation, check shapes, allocate, and note
what the backward needs. Most of torch's meta operations are shadowed by others in Python, made for tracing, 10 to 200
times as slow; those are taken out, so this is a process of its own. Attention is transformers' eager one, since SDPA's
operations are in Python alone. Our launches are replaced by nothing and counted:

    kept      a `Launch`, which calls the compiled kernel: C_CALL seconds
    triton    by Triton's own launcher: TRITON seconds

Torch's own launches are counted in a pass of their own, and charged in a second figure, TORCH seconds each. PEFT's
dropout is charged as the one operation that it is on a GPU; on the meta device it would be four.
"""

import argparse
import contextlib
import cProfile
import importlib
import json
import pkgutil
import pstats
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorapar_kernels import triton_kernels

C_CALL, TRITON, TORCH = 6e-6, 18e-6, 4e-6
HIDDEN, MLP, HEADS, TOKENS, RANK, P, ACTIVE = 4096, 11008, 32, 2048, 16, 0.05, 0.4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS, PEFT, FROZEN = "ours", "PEFT's layers", "frozen"
CALLS = 20  # a round
# Operations that put nothing on a GPU, beside views.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view",
             "_reshape_alias"}  # fmt: skip


def fast_meta() -> None:
    """Put Python's meta operations out of the way, for the rest of the process: C++'s lie beneath them."""
    torch._meta_registrations._meta_lib_dont_use_me_use_register_meta._destroy()  # type: ignore[attr-defined]


class Launches:
    """Counts our launches in place of making them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        launching = importlib.import_module("lorapar_kernels.triton_kernels.launch")
        for found in pkgutil.iter_modules(triton_kernels.__path__):
            module = importlib.import_module(f"lorapar_kernels.triton_kernels.{found.name}")
            if "launch" in module.__dict__:
                module.__dict__["launch"] = self.by_triton
        launching.Launch.__call__ = self.kept
        # The meta device passes for a GPU on which the kernels run.
        importlib.import_module("lorapar_kernels.lora_linear").__dict__["triton_obstacle"] = lambda device: None
        # A mask on the meta device has no values, and stands for one with an active element in each stripe.
        importlib.import_module("lorapar_kernels.tiles").__dict__["_stripes"] = lambda active: None
        is_autocast_enabled = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda kind: is_autocast_enabled("cuda")

    def by_triton(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.counts["triton"] += 1

    # A function of the class is handed the Launch; a bound method is not.
    def kept(self, grid: tuple[int, ...], *arguments: Any) -> None:
        self.counts["kept"] += 1


class TorchLaunches(TorchDispatchMode):
    """Counts torch's operations that would put a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in NO_LAUNCH:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def one_operation(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of torch's dropout, which is one operation forward and one backward on a GPU."""
    return x * (1.0 / (1.0 - p)) if training and p > 0.0 else x


def bare() -> nn.Module:
    """The decoder layer, frozen."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=HEADS, num_hidden_layers=1,
                         vocab_size=64)  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False).train()


def network(way: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    import lorapar
    from lorapar.adapter.layers import masked_layers

    layer: Any = bare()
    lora = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=P, target_modules=TARGETS)
    if way == FROZEN:
        return layer
    if way == PEFT:
        return get_peft_model(layer, lora).get_base_model()
    made = lorapar.attach(layer, lora, start="peft")
    for one in masked_layers(made).values():
        a, b, _ = one.factors("default")
        # As `activate` sets them, which takes no meta tensors; every stripe has an active element.
        one.mask_a, one.mask_b = torch.empty_like(a, dtype=torch.bool), torch.empty_like(b, dtype=torch.bool)
    return made.get_base_model()


def decoder(layer: nn.Module) -> Callable[[], None]:
    """Forward and backward of the whole layer."""
    x, dy = meta(1, TOKENS, HIDDEN).requires_grad_(), meta(1, TOKENS, HIDDEN)
    rotary = meta(1, TOKENS, HIDDEN // HEADS), meta(1, TOKENS, HIDDEN // HEADS)
    mask = meta(1, 1, TOKENS, TOKENS)

    def step() -> None:
        out: Any = layer(x, attention_mask=mask, position_embeddings=rotary)
        torch.autograd.backward(out if isinstance(out, Tensor) else out[0], dy)

    return step


def projections(layer: Any) -> Callable[[], None]:
    """Forward and backward of the seven projections alone, in the layer's order."""
    attention, mlp = layer.self_attn, layer.mlp
    x, x_o, x_mlp, x_down = (meta(1, TOKENS, size).requires_grad_() for size in (HIDDEN, HIDDEN, HIDDEN, MLP))
    calls = [(attention.q_proj, x), (attention.k_proj, x), (attention.v_proj, x), (attention.o_proj, x_o),
             (mlp.gate_proj, x_mlp), (mlp.up_proj, x_mlp), (mlp.down_proj, x_down)]  # fmt: skip
    dys = [meta(1, TOKENS, size) for size in (*[HIDDEN] * 4, MLP, MLP, HIDDEN)]

    def step() -> None:
        torch.autograd.backward([module(given) for module, given in calls], dys)

    return step


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@contextlib.contextmanager
def dropout_of_one_operation() -> Iterator[None]:
    before = torch.nn.functional.dropout
    torch.nn.functional.dropout = one_operation
    try:
        yield
    finally:
        torch.nn.functional.dropout = before


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """{case: {way: {"seconds": of each round, "launches": ..., "torch": ...}}}, the ways in turns."""
    launches, found = Launches(), {}
    for case, step_of in (("projections", projections), ("decoder layer", decoder)):
        networks = {way: network(way) for way in (OURS, PEFT, FROZEN)}
        steps = {way: step_of(network) for way, network in networks.items()}
        found[case] = {way: {"seconds": []} for way in steps}
        for way, step in steps.items():
            for _ in range(3):
                step()
            launches.counts.clear()
            forget(networks[way])
            with TorchLaunches() as counted:
                step()
            found[case][way] |= {"launches": dict(launches.counts), "torch": sum(counted.counts.values()),
                                 "operations": dict(counted.counts.most_common())}  # fmt: skip
        for _ in range(rounds):
            for way, step in steps.items():
                found[case][way]["seconds"].append(seconds(step, networks[way]))
    return found


def seconds(step: Callable[[], None], layer: nn.Module) -> float:
    """CPU seconds of this thread for one step, the least of CALLS: other work on the machine takes its caches away."""
    taken = []
    for _ in range(CALLS):
        forget(layer)
        began = time.thread_time()
        step()
        taken.append(time.thread_time() - began)
    return min(taken)


def forget(layer: nn.Module) -> None:
    """Without gradients, as at a step's beginning: the first one is taken as it is."""
    for parameter in layer.parameters():
        parameter.grad = None


def charged(seconds: float, launches: dict[str, int], of_torch: int = 0) -> float:
    """Seconds with what launching takes; of_torch: torch's launches, where they are charged too."""
    return seconds + launches.get("kept", 0) * C_CALL + launches.get("triton", 0) * TRITON + of_torch * TORCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", choices=(OURS, PEFT, FROZEN), help="where a decoder layer's time goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fast_meta()
    with dropout_of_one_operation():
        if given.profile is None:
            print(json.dumps(measure(given.rounds)))
            return
        Launches()
        step = decoder(network(given.profile))
        step()
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(CALLS):
            step()
        profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
