"""A frozen base in parts: each process holds its share of every decoder block, and a block is whole while it computes.

FSDP2 (`torch.distributed.fsdp.fully_shard`) by decoder block. The adapter stays whole in every process, so masks,
optimizer, checkpoints and proof are those of one process; embeddings, final norm and head stay whole too, as they are
used outside of a block's forward. A leaf cannot be sharded for itself: the LoRA layers read its weight without calling
it. Quantised codes of 4 bits are sharded as they are held (uint8 too, with torch 2.13), their scales stay whole.

A forward and a backward of a sharded model are collectives: every process makes as many, in the same order.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import processes

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
else:  # of a torch that was built without, nothing is an instance of these
    FSDPModule = DTensor = ()


def shard(model: nn.Module, device: torch.device) -> None:
    """Leave this process's part of every decoder block's frozen weights on `device`, and all else whole.

    model: a base or a PeftModel, on the CPU or on `device`; from the CPU blocks go to the device one at a time, so that
    the model need not fit there. Adapters may be there already or be attached afterwards. With one process it is moved
    alone.

    Raises InputError where no decoder blocks are found.
    """
    if processes.count() == 1:
        model.to(device)
        return
    base = cast(nn.Module, cast(Any, model).get_base_model()) if hasattr(model, "get_base_model") else model
    blocks = decoder_blocks(base)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # fully_shard takes the current one
    # By this name PEFT knows that a layer still computes with its whole weight.
    mesh = init_device_mesh(device.type, (processes.count(),), mesh_dim_names=("fsdp",))
    whole = _whole_parameters(base, blocks)
    for block in blocks:
        for module in block.modules():
            _keep_quant_state(module)
        block.to(device)
        for parameter in block.parameters():
            if parameter not in whole:
                parameter.requires_grad_(False)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    # One root for all blocks: in the backward each gathers its weights while the one before it computes.
    kind = type(base)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    # FSDP's class is for the parameters of a module's own, of which it has none here; PEFT saves the class's name.
    base.__class__ = kind
    # transformers' `generate` keeps the processes in step by this.
    base._is_fsdp_managed_module = True  # type: ignore[assignment]
    # The first forward is a collective: nobody sits in it while others still load.
    processes.wait()


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model is sharded, so that its forward is a collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def decoder_blocks(base: nn.Module) -> list[nn.Module]:
    """The layers that the model runs one after the other: the outermost members of its lists of modules.

    Where transformers says which classes are not to be split over devices (`_no_split_modules`), those of them alone.
    """
    members = [
        (name, block)
        for at, modules in base.named_modules()
        if isinstance(modules, nn.ModuleList)
        for name, block in modules.named_children()
        for name in [f"{at}.{name}"]
    ]
    named = getattr(base, "_no_split_modules", None) or ()
    of_class = [(name, block) for name, block in members if type(block).__name__ in named] or members
    outermost = [block for name, block in of_class if not any(name.startswith(f"{other}.") for other, _ in of_class)]
    blocks = [block for block in dict.fromkeys(outermost) if any(True for _ in block.parameters())]
    if not blocks:
        raise InputError(f"model.name: {type(base).__name__} has no list of decoder blocks, and cannot be sharded")
    return blocks


def _whole_parameters(base: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """What stays whole: the adapters', those outside of the blocks, and what several blocks share."""
    inside: dict[nn.Module, set[int | None]] = {}
    for number, block in enumerate(blocks):
        for module in block.modules():
            inside.setdefault(module, set()).add(number)
    owners: dict[nn.Parameter, set[int | None]] = {}
    whole: set[nn.Parameter] = set()
    for name, module in base.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).update(inside.get(module, {None}))
                if ".lora_" in name or ".modules_to_save" in name:
                    whole.add(parameter)
    return whole | {parameter for parameter, of in owners.items() if None in of or len(of) > 1}


def _keep_quant_state(module: nn.Module) -> None:
    """bitsandbytes keeps the scales of a 4-bit weight on the parameter and on its module; a shard is another one."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if state is not None:
        module.quant_state = state


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which it shares memory with; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of `tensor` that this process would hold, were it sharded as `like` is; all of it where that is not."""
    if not isinstance(like, DTensor):
        return tensor
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (start, length) in enumerate(zip(offset, shape)):
        # The offset of an empty part lies at the end or beyond.
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim] - length), length)
    return tensor.contiguous()


def whole_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, in which a sharded block's weights are whole while it and its parts are given.

    Every process goes through all of them. What is read of a block is gone once the next one is asked for.
    """
    gathered: list[tuple[str, FSDPModule]] = []
    if is_sharded(model):
        processes.wait()
    try:
        for name, module in model.named_modules():
            while gathered and not f"{name}.".startswith(gathered[-1][0]):
                gathered.pop()[1].reshard()
            block: Any = module
            if isinstance(block, FSDPModule):
                block.unshard()
                gathered.append((f"{name}." if name else "", block))
            yield name, module
    finally:
        while gathered:
            gathered.pop()[1].reshard()
