"""Bytes that each process of a launch sends in a training step, counted at its network interface.

    python -m bench.wire                                # two processes; SmolLM2-135M's shapes, random weights in bf16
    python -m bench.wire --processes 4 --layers 4       # a ring of four; fewer layers take less memory and time

Every process gets a network namespace of its own, joined to the others by cables (veth) and a bridge, so that what
`tx_bytes` of its interface counts is what would leave a machine. That takes root: `ip netns add`. Steps are of one
short row, as what is sent does not depend on the rows. Two steps come first, and the next ones are counted.

The table has what docs/distributed.md predicts beside it. Measured is more by TCP's headers and acknowledgements.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lorapar
from lorapar.adapter.layers import activate, lora_parameters, masks_by_parameter
from lorapar.distributed import processes, sharding
from lorapar.distributed.exchange import GradientExchange

from .training_cases import TARGETS

ACTIVE = 0.4
FIRST, COUNTED = 2, 4  # steps
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def base(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def adapted(model: nn.Module) -> nn.Module:
    return lorapar.attach(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), start="paper").train()


def activated(model: nn.Module) -> GradientExchange:
    """The exchange of a partition that has 40 % of the elements active."""
    parameters = lora_parameters(model)
    masks = {name: torch.rand(parameter.shape) < ACTIVE for name, parameter in parameters.items()}
    sets: dict[str, Any] = dict.fromkeys(("s1", "s2", "sft", "grpo"), masks)
    activate(model, lorapar.Partition(sets, {"theta": 0.9, "rank": None}), "sft")
    return GradientExchange(
        {parameters[name]: mask for name, mask in masks_by_parameter(model).items() if mask is not None}
    )


def backward(model: nn.Module) -> None:
    ids = torch.arange(2, 18)[None]
    model(input_ids=ids, labels=ids).loss.backward()


def bytes_a_step(step: Callable[[], object]) -> float:
    for _ in range(FIRST):
        step()
    processes.wait()
    before = int(SENT.read_text())
    for _ in range(COUNTED):
        step()
    processes.wait()
    return (int(SENT.read_text()) - before) / COUNTED


def measure(layers: int) -> dict[str, tuple[float, float]]:
    """{case: (bytes a step as predicted, as measured)} of this process."""
    count = processes.count()
    ring, gather = 2 * (count - 1) / count, (count - 1) / count
    found = {}

    model = adapted(base(layers))
    elements = sum(parameter.numel() for parameter in lora_parameters(model).values())
    found["DDP, every element"] = (
        ring * 4 * elements,
        bytes_a_step(functools.partial(backward, DistributedDataParallel(model))),
    )

    model = adapted(base(layers))
    exchange = activated(model)

    def step(times: int = 1) -> None:
        for _ in range(times):
            backward(model)
        exchange.average()

    exchanged = ring * 4 * (exchange.elements + len(exchange.masks))
    found[f"exchange, {exchange.elements / elements:.1%} active"] = exchanged, bytes_a_step(step)

    model = base(layers)
    blocks = sum(parameter.nbytes for block in sharding.decoder_blocks(model) for parameter in block.parameters())
    sharding.shard(model, torch.device("cpu"))
    model = adapted(model)
    exchange = activated(model)
    of_base = 2 * gather * blocks
    found["FSDP2"] = of_base + exchanged, bytes_a_step(step)
    found["FSDP2, two micro-batches a step"] = 2 * of_base + exchanged, bytes_a_step(functools.partial(step, 2))
    peft_model: Any = model
    peft_model.enable_input_require_grads()
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    found["FSDP2, gradient checkpointing"] = of_base + exchanged, bytes_a_step(step)
    return found


def work(rank: int, count: int, layers: int) -> None:
    dist.init_process_group("gloo", init_method="tcp://10.78.0.1:29500", rank=rank, world_size=count)
    everybody = processes.gather(measure(layers))
    if rank == 0:
        print(json.dumps(everybody))
    processes.wait()
    dist.destroy_process_group()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect(hub: str, names: list[str]) -> None:
    """A bridge in one namespace, and a cable from it to eth0 of each of the others."""
    ip("-n", hub, "link", "add", "bridge", "type", "bridge")
    ip("-n", hub, "link", "set", "bridge", "up")
    for number, name in enumerate(names):
        ip("link", "add", f"to{number}", "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("-n", hub, "link", "set", f"to{number}", "master", "bridge", "up")
        ip("-n", name, "address", "add", f"10.78.0.{number + 1}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", name, "link", "set", link, "up")


def run(count: int, layers: int) -> list[dict[str, tuple[float, float]]]:
    """What each process found, each in a namespace of its own."""
    hub, names = f"wire{os.getpid()}", [f"wire{os.getpid()}-{number}" for number in range(count)]
    made: list[str] = []
    workers: list[subprocess.Popen[str]] = []
    try:
        for name in (hub, *names):
            ip("netns", "add", name)
            made.append(name)
        connect(hub, names)
        for rank, name in enumerate(names):
            words = [sys.executable, "-m", "bench.wire", "--processes", str(count), "--layers", str(layers)]
            workers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *words, "--rank", str(rank)],
                    stdout=subprocess.PIPE, text=True,
                    env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                )
            )  # fmt: skip
        said = [worker.communicate()[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise SystemExit("a process failed")
        return json.loads(said[0].splitlines()[-1])
    finally:
        for worker in workers:
            worker.kill()
        for name in made:
            ip("netns", "delete", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30, help="decoder blocks; SmolLM2-135M has 30")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.rank, options.processes, options.layers)
        return
    everybody = run(options.processes, options.layers)
    print(f"{options.processes} processes, {options.layers} blocks; bytes that a process sends in a step\n")
    print("| | predicted | measured | measured / predicted | / DDP |\n|---|---|---|---|---|")
    dense = everybody[0]["DDP, every element"][1]
    for case in everybody[0]:
        predicted = everybody[0][case][0]
        # The one that sends most: a ring's rounds are as long as the longest.
        measured = max(found[case][1] for found in everybody)
        print(f"| {case} | {predicted:,.0f} | {measured:,.0f} | {measured / predicted:.3f} | {measured / dense:.3f} |")


if __name__ == "__main__":
    main()
