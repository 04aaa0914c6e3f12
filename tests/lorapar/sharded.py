"""What each process of a launch finds out about a sharded model beside the same model whole; test_sharding.py runs it:

torchrun --nproc_per_node 2 -m tests.lorapar.sharded base <tiny model's folder> fp32 <folder for what is found>
"""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapar
from lorapar.adapter.attach import attach, load_adapter, save_adapter
from lorapar.adapter.layers import activate, lora_parameters, masked_layers
from lorapar.adapter.merging import merged_parameters
from lorapar.adapter.proof import AdaptersDiffer, FrozenElementsChanged, Snapshot, verify
from lorapar.distributed import processes, sharding
from lorapar.errors import InputError
from lorapar.model.load import load_model
from lorapar.model.quantised import quantisation
from lorapar.recipe.sections import ModelConfig
from tests.architectures import ARCHITECTURES, make
from tests.lorapar.test_adapter import config, random_partition

BATCH = torch.arange(2, 26).view(2, 12) * 7 % 250
ROWS = [
    {"input_ids": list(range(3 + i, 12 + 2 * i)), "labels": [-100] * 4 + list(range(7 + i, 12 + 2 * i))}
    for i in range(6)
]


def load(folder: str, base: str, shard: bool) -> nn.Module:
    return load_model(ModelConfig(folder, dtype="float32", device="cpu"), None if base == "fp32" else base, shard)


def activated(model: Any, start: Any = "twin", **keys: Any) -> Any:
    model = attach(model, config(**{"lora_dropout": 0.1, **keys}), start=start)
    activate(model, random_partition(model), "sft")
    return model.train()


def loss_of(model: Any, ids: torch.Tensor = BATCH) -> torch.Tensor:
    torch.manual_seed(7)  # of the dropout
    return model(input_ids=ids, labels=ids).loss


def gradients(model: Any) -> list[torch.Tensor]:
    """The loss and the adapter's gradients of this process's own batch, in the third round: siblings are computed
    together from the second."""
    own = BATCH if processes.is_main() else BATCH.flip(1).view(3, 8)
    for _ in range(3):
        model.zero_grad()
        loss = loss_of(model, own)
        loss.backward()
    grads = [sharding.local(p.grad).clone() for p in lora_parameters(model).values() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *grads]


def factors(model: Any) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in lora_parameters(model).values()]


def parts_of(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if sharding.is_part(parameter)}


def bytes_of(parts: dict[str, nn.Parameter]) -> int:
    return sum(sharding.local(parameter).nbytes for parameter in parts.values())


def evaluated(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        loss = loss_of(model)
        logits = model.eval()(BATCH).logits
    model.train()
    return [loss, logits]


def let_go(model: Any) -> bool:
    """Whether the weight that a layer computes with has memory in its forward, and none after it."""
    layer, seen = model.get_base_model().model.layers[0].mlp.up_proj, []
    hook = layer.register_forward_hook(
        lambda *_: seen.append((layer.base_layer.weight, layer.base_layer.weight.untyped_storage().nbytes()))
    )
    loss_of(model).backward()
    model.zero_grad()
    hook.remove()
    return seen[0][1] > 0 and seen[0][0].untyped_storage().nbytes() == 0


def off_by(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, as a share of each tensor's largest element."""
    assert len(ours) == len(theirs) > 1
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(ours, theirs))


def raised(call, kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


def answers(model: Any, rank: int) -> list[list[int]]:
    """Greedy answers that end after one token in process 0 and after up to twelve in process 1."""
    ids = BATCH[:, rank:6].contiguous()
    model.eval()
    free = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=None)
    stop = int(free[0, ids.shape[1]]) if rank == 0 else 257
    ended = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=12,
                           eos_token_id=stop)  # fmt: skip
    model.train()
    return [*free.tolist(), *ended.tolist()]


def of_base(folder: str, base: str, out: Path) -> dict:
    """A sharded base under a whole adapter."""
    rank, found = processes.rank(), {}
    model, whole = (load(folder, base, shard=shard) for shard in (True, False))
    found["sharded"] = sharding.is_sharded(model), sharding.is_sharded(whole)
    parts, theirs = parts_of(model), dict(whole.named_parameters())
    found["share"] = bytes_of(parts) / sum(theirs[name].nbytes for name in parts)
    found["in parts"], found["whole"] = sorted(parts), sorted(theirs.keys() - parts.keys())

    model, whole = activated(model), activated(whole)
    found["gradients"] = off_by(gradients(model), gradients(whole))
    found["siblings"] = [
        [layer._siblings.mode for layer in masked_layers(one).values() if layer._siblings] for one in (model, whole)
    ]
    for reentrant in (False, True):
        for one in (model, whole):
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found["reentrant" if reentrant else "not reentrant"] = off_by(gradients(model), gradients(whole))
    for one in (model, whole):
        one.gradient_checkpointing_disable()
        one.disable_input_require_grads()
    found["evaluated"] = off_by(evaluated(model), evaluated(whole))
    found["answers"] = answers(model, rank), answers(whole, rank)
    found["let go"] = let_go(model)
    scores = [lorapar.score(one, None, ROWS, batch_size=2) for one in (model, whole)]
    found["scores"] = off_by(*([of[name] for name in sorted(scores[1])] for of in scores))
    merged, expected = ({name: tensor.clone() for name, tensor in merged_parameters(one)} for one in (model, whole))
    found["merged"] = list(merged) == list(expected) and all(torch.equal(merged[n], expected[n]) for n in expected)

    made, before = random_partition(model), [Snapshot.take(one) for one in (model, whole)]
    for one in (model, whole):
        loss_of(one).backward()
        lorapar.PartitionedAdamW(one, lr=1e-3).step()
        one.zero_grad()
    found["stepped"] = off_by(*(factors(one) for one in (model, whole)))
    found["proof"] = [verify(one, taken, made, "sft") for one, taken in zip((model, whole), before)]
    if rank == 0:  # alone: a collective would wait for the other
        save_adapter(model, out / "adapter", start="twin")
        found["class"] = json.loads((out / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
        found["state"] = sum(".lora_" in name for name in model.state_dict())
    processes.wait()
    again = load_adapter(load(folder, base, shard=True), out / "adapter")
    found["loaded"] = off_by(factors(again), factors(model))
    found["same answers"] = answers(again, rank) == answers(model, rank)

    name, parameter = next(iter(lora_parameters(model).items()))
    active = made.active("sft")[name]
    with torch.no_grad():
        parameter[active] += rank
        found["adapters differ"] = raised(lambda: verify(model, before[0], made, "sft"), AdaptersDiffer)
        parameter[active] -= rank
        if rank == 1:
            sharding.local(next(iter(parts_of(model).values()))).view(torch.uint8)[0] ^= 1
    found["base changed"] = raised(lambda: verify(model, before[0], made, "sft"), FrozenElementsChanged)

    # The other way round: sharded with its adapter there. And a start that reads the base.
    late, whole = (activated(load(folder, base, shard=False)) for _ in range(2))
    weights = [weakref.ref(p) for name, p in late.named_parameters() if ".layers." in name and ".lora_" not in name]
    stream = torch.get_rng_state()
    sharding.shard(late, torch.device("cpu"))
    found["stream"] = torch.equal(stream, torch.get_rng_state())
    gc.collect()
    found["kept"] = sum(weight() is not None for weight in weights)
    found["attached before"] = off_by(gradients(late), gradients(whole))
    started = [attach(load(folder, base, shard=shard), config(), start="pissa") for shard in (True, False)]
    found["pissa"] = off_by(*(factors(one) for one in started))
    found["int8"] = raised(lambda: load(folder, "int8", shard=True), InputError)
    return found


def of_stored(folder: str, base: str, out: Path) -> dict:
    """4-bit bases that come in other ways: from a checkpoint that is quantised, and with codes in a floating dtype."""
    whole, found = load(folder, "nf4", shard=False), {}
    if processes.is_main():
        whole.save_pretrained(out / "quantised")
        AutoTokenizer.from_pretrained(folder).save_pretrained(out / "quantised")
    processes.wait()
    whole = activated(whole)
    settings = quantisation("nf4", torch.float32)
    settings.bnb_4bit_quant_storage = torch.float32
    floating = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", quantization_config=settings,
                                                    device_map={"": "cpu"})  # fmt: skip
    sharding.shard(floating, torch.device("cpu"))
    quantised = load(str(out / "quantised"), "nf4", shard=True)
    expected = {name: tensor.clone() for name, tensor in merged_parameters(whole)}
    for name, model in (("floating", floating), ("quantised", quantised)):
        model = activated(model)
        found[name] = off_by(gradients(model), gradients(whole))
        found[f"{name} merged"] = all(torch.equal(tensor, expected[of]) for of, tensor in merged_parameters(model))
    return found


def of_adapter(folder: str, base: str, out: Path) -> dict:
    """A user's own loop, in which the adapter is sharded too."""
    rank, found = processes.rank(), {}
    # Four rows over three processes: one has none.
    model, whole = (activated(load(folder, base, shard=False), "paper") for _ in range(2))
    made = random_partition(whole)
    mesh = init_device_mesh("cpu", (processes.count(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    taken = [Snapshot.take(one) for one in (model, whole)]
    optimizers = [lorapar.PartitionedAdamW(one, lr=1e-3, weight_decay=0.1) for one in (model, whole)]
    for _ in range(3):
        for one, optimizer in zip((model, whole), optimizers):
            loss_of(one).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours = lora_parameters(model)
    found["stepped"] = off_by([cast(Any, p).full_tensor().detach() for p in ours.values()], factors(whole))
    found["proof"] = [verify(one, before, made, "sft") for one, before in zip((model, whole), taken)]
    found["empty"] = sum(sharding.local(p).numel() == 0 for p in ours.values())
    found["state bytes"] = [sum(processes.gather(optimizers[0].state_bytes())), optimizers[1].state_bytes()]
    state = optimizers[0].state_dict()
    optimizers[0].load_state_dict(state)
    found["whole state"] = raised(lambda: optimizers[0].load_state_dict(optimizers[1].state_dict()), InputError)
    found["other part"] = raised(lambda: optimizers[0].load_state_dict(state | {"part": [0, 7]}), InputError)
    with torch.no_grad():
        if rank == 0:
            name, part = next((n, sharding.local(p)) for n, p in ours.items())
            still = ~sharding.local_part(made.active("sft")[name], ours[name])
            part[still] += 1.0
    found["inactive changed"] = raised(lambda: verify(model, taken[0], made, "sft"), FrozenElementsChanged)
    return found


def of_architectures(folder: str, base: str, out: Path) -> dict:
    """How many blocks each architecture has, and how far its loss and gradients are off."""
    found = {}
    for name in ARCHITECTURES:
        model, whole = (activated(make(name), target_modules=None) for _ in range(2))
        try:
            sharding.shard(model, torch.device("cpu"))
        except InputError as error:
            found[name] = str(error)
            continue
        model.to("cpu")  # as trainers do
        blocks = sum(isinstance(module, FSDPModule) for module in model.modules()) - 1
        found[name] = [blocks, off_by(gradients(model), gradients(whole))]
    return found


if __name__ == "__main__":
    what, folder, base, out = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {"base": of_base, "adapter": of_adapter, "stored": of_stored, "architectures": of_architectures}[what](
        folder, base, Path(out)
    )
    (Path(out) / f"{processes.rank()}.json").write_text(json.dumps(found))
    processes.wait()
    dist.destroy_process_group()
