"""What each process of a launch finds out about a sharded base, beside the same model whole; run by test_sharding.py:

    torchrun --nproc_per_node 2 -m tests.lorapar.sharded base <folder of the tiny model> <base> <folder for what is found>
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lorapar
from lorapar.adapter.attach import attach, load_adapter, save_adapter
from lorapar.adapter.layers import activate, lora_parameters
from lorapar.adapter.merging import merged_parameters
from lorapar.adapter.proof import AdaptersDiffer, FrozenElementsChanged, Snapshot, verify
from lorapar.distributed import processes, sharding
from lorapar.errors import InputError
from lorapar.model.load import load_model
from lorapar.recipe.sections import ModelConfig
from tests.lorapar.test_adapter import config, random_partition

BATCH = torch.arange(2, 26).view(2, 12) * 7 % 250
ROWS = [
    {"input_ids": list(range(3 + i, 12 + 2 * i)), "labels": [-100] * 4 + list(range(7 + i, 12 + 2 * i))}
    for i in range(6)
]


def load(folder: str, base: str, shard: bool) -> nn.Module:
    keys = {"dtype": "float32", "device": "cpu"}
    return load_model(ModelConfig(folder, **keys), None if base == "fp32" else base, shard)


def activated(model: nn.Module, dropout: float = 0.0):
    lora = config()
    lora.lora_dropout = dropout
    model = attach(model, lora, start="twin")
    activate(model, random_partition(model), "sft")
    return model.train()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=BATCH, labels=BATCH).loss


def gradients(model: nn.Module, rounds: int = 3) -> list[torch.Tensor]:
    """The loss and the adapter's gradients of the last of `rounds`; siblings are computed together from the second."""
    for number in range(rounds):
        model.zero_grad()
        torch.manual_seed(number)
        loss = loss_of(model)
        loss.backward()
    grads = [sharding.local(p.grad).clone() for p in lora_parameters(model).values() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *grads]


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


def answers(model: nn.Module, rank: int) -> list[list[int]]:
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
    before = torch.get_rng_state()
    model = load(folder, base, shard=True)
    whole = load(folder, base, shard=False)
    torch.manual_seed(0)
    found["sharded"] = sharding.is_sharded(model), sharding.is_sharded(whole)
    parts = {name: p for name, p in model.named_parameters() if sharding.is_part(p)}
    theirs = dict(whole.named_parameters())
    found["share"] = sum(sharding.local(p).nbytes for p in parts.values()) / sum(theirs[n].nbytes for n in parts)
    found["parts"] = sorted(parts)
    found["whole"] = sorted(theirs.keys() - parts.keys())
    del before

    model, whole = activated(model), activated(whole)
    torch.manual_seed(5)
    loss_of(model)
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    found["stream"] = torch.equal(stream, torch.get_rng_state())
    found["plain"] = off_by(gradients(model), gradients(whole))
    for reentrant in (False, True):
        for one in (model, whole):
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found[f"checkpointing {reentrant}"] = off_by(gradients(model), gradients(whole))
    for one in (model, whole):
        one.gradient_checkpointing_disable()
        one.disable_input_require_grads()
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    found["dropout"] = off_by(gradients(model), gradients(whole))
    with torch.no_grad():
        found["evaluation"] = off_by([loss_of(model), model(BATCH).logits], [loss_of(whole), whole(BATCH).logits])
    found["answers"] = answers(model, rank), answers(whole, rank)

    ours, other = (lorapar.score(one, None, ROWS, batch_size=2) for one in (model, whole))
    found["scores"] = off_by([ours[name] for name in sorted(other)], [other[name] for name in sorted(other)])
    merged, expected = ({n: t.clone() for n, t in merged_parameters(one)} for one in (model, whole))
    found["merged"] = list(merged) == list(expected) and all(torch.equal(merged[n], expected[n]) for n in expected)
    found["gathered after"] = sum(sharding.local(p).nbytes for _, p in model.named_parameters() if sharding.is_part(p))

    made = random_partition(model)
    taken, counted = [], []
    for one in (model, whole):
        taken.append(Snapshot.take(one))
        optimizer = lorapar.PartitionedAdamW(one, lr=1e-3)
        torch.manual_seed(0)
        loss_of(one).backward()
        optimizer.step()
        one.zero_grad()
        counted.append(verify(one, taken[-1], made, "sft"))
    found["proof"] = counted
    found["stepped"] = off_by(*([p.detach() for p in lora_parameters(one).values()] for one in (model, whole)))

    if rank == 0:  # alone: a collective would wait for the other
        save_adapter(model, out / "adapter", start="twin")
        found["state"] = sum(".lora_" in name for name in model.state_dict())
    processes.wait()
    again = load_adapter(load(folder, base, shard=True), out / "adapter")
    activate(again, made, "sft")
    found["loaded"] = off_by(gradients(again, 1), gradients(whole.eval().train(), 1)) if False else None
    first = next(p for p in lora_parameters(again).values() if p.requires_grad)
    found["same adapter"] = all(
        torch.equal(a, b) for a, b in zip(lora_parameters(again).values(), lora_parameters(model).values())
    )

    if rank == 1:
        with torch.no_grad():
            first_lora = next(iter(lora_parameters(model).values()))
            kept = first_lora.clone()
            mask = made.active("sft")[next(iter(lora_parameters(model)))]
            first_lora[mask] += 1.0
    found["adapters differ"] = raised(lambda: verify(model, taken[0], made, "sft"), AdaptersDiffer)
    if rank == 1:
        with torch.no_grad():
            first_lora.copy_(kept)
            sharding.local(next(p for _, p in model.named_parameters() if sharding.is_part(p))).view(torch.uint8)[0] ^= 1
    found["base changed"] = raised(lambda: verify(model, taken[0], made, "sft"), FrozenElementsChanged)

    # The other way round: sharded with its adapter there, and a start that reads the base.
    late = activated(load(folder, base, shard=False))
    sharding.shard(late, torch.device("cpu"))
    found["attached before"] = off_by(gradients(late), gradients(activated(load(folder, base, shard=False))))
    started = [attach(load(folder, base, shard=shard), config(), start="pissa") for shard in (True, False)]
    found["pissa"] = off_by(*([p.detach() for p in lora_parameters(one).values()] for one in started))
    found["int8"] = raised(lambda: load(folder, "int8", shard=True), InputError)
    return found


def of_adapter(folder: str, base: str, out: Path) -> dict:
    """A user's own loop, in which the adapter is sharded too."""
    rank, found = processes.rank(), {}
    model, whole = (activated(load(folder, base, shard=False)) for _ in range(2))
    made = random_partition(whole)
    mesh = dist.init_device_mesh("cpu", (processes.count(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    taken = [Snapshot.take(one) for one in (model, whole)]
    optimizers = [lorapar.PartitionedAdamW(one, lr=1e-3, weight_decay=0.1) for one in (model, whole)]
    for step in range(3):
        for one, optimizer in zip((model, whole), optimizers):
            torch.manual_seed(step)
            loss_of(one).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = lora_parameters(model), lora_parameters(whole)
    found["stepped"] = off_by([p.full_tensor() for p in ours.values()], [p.detach() for p in theirs.values()])
    found["proof"] = [verify(one, before, made, "sft") for one, before in zip((model, whole), taken)]
    found["empty"] = sum(sharding.local(p).numel() == 0 for p in ours.values())
    found["state bytes"] = [sum(processes.gather(optimizers[0].state_bytes())), optimizers[1].state_bytes()]
    state = optimizers[0].state_dict()
    optimizers[0].load_state_dict(state)
    found["whole state"] = raised(lambda: optimizers[0].load_state_dict(optimizers[1].state_dict()), InputError)
    found["other part"] = raised(lambda: optimizers[0].load_state_dict(state | {"part": [0, 7]}), InputError)
    with torch.no_grad():
        if rank == 0:
            name, part = next((n, sharding.local(p)) for n, p in ours.items() if not p.requires_grad or True)
            still = ~sharding.local_part(made.active("sft")[name], ours[name])
            part[still] += 1.0
    found["inactive changed"] = raised(lambda: verify(model, taken[0], made, "sft"), FrozenElementsChanged)
    return found


if __name__ == "__main__":
    what, folder, base, out = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {"base": of_base, "adapter": of_adapter}[what](folder, base, Path(out))
    (Path(out) / f"{processes.rank()}.json").write_text(json.dumps(found))
    processes.wait()
    dist.destroy_process_group()
