"""AdamW that owns state for active elements only, and writes nothing else.

The released script zeroes gradients in a hook and steps torch's AdamW, whose weight decay and moments still move what
is "frozen". Here an inactive element has no moments and is never written (paper section 3.4, taken at its word).
"""

import hashlib
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

import lorapar_kernels as lk
from lorapar_kernels.bitmask import TILE

from ..adapter.layers import lora_parameters, masks_by_parameter
from ..distributed import processes
from ..distributed.sharding import is_part, local, local_part
from ..errors import InputError

log = logging.getLogger("lorapar")
MOMENTS = ("fp32", "8bit")
ROUNDING = ("nearest", "stochastic", "compensated")
# What holds an entry for each active element, or for each tile of them.
PACKED = ("exp_avg", "exp_avg_sq", "scales", "compensation")


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW) over the active elements of an activated model.

    `state[p]` holds "step" (a 0-d fp32 tensor, as torch keeps it) and the packed moments "exp_avg" and "exp_avg_sq",
    1-D fp32 of the parameter's active elements in row-major order: 8 bytes an active element. With 8-bit moments they
    are int8 and uint8, about 2 bytes, with "scales" for each tile of 512 elements.

    Of an adapter that is sharded (FSDP2, `fully_shard` over the whole activated model) it steps on this process's part:
    make it after the model is sharded.

    It takes the adapter alone. A head that PEFT trains whole beside it (task_type SEQ_CLS and the like) needs an
    optimizer of its own, which a warning says.

    Args:
        model: after `lorapar.activate`. Its masks are taken now; activating another stage needs a new optimizer.
        lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW; one parameter group.
        moments: "fp32" or "8bit".
        rounding: of bf16 and fp16 parameters: "nearest"; "stochastic", up or down without bias (bf16); "compensated",
            what is left out is kept ("compensation", 2 bytes an active element) and added at the next step.
        skip_nonfinite: where the gradient of an active element is infinite or NaN, leave out the step.
        seed: of the random bits of stochastic rounding and of 8-bit moments.

    `state_dict()` carries a digest of the masks; `load_state_dict` refuses a state of another partition, and one of
    another part of a sharded adapter (another process, or number of processes). A state may be loaded on another
    device, and whether csrc's library is there or not; it keeps the form of its moments and rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        maximize: bool = False,
        moments: str = "fp32",
        rounding: str = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name}: got {value}, expected a finite number of at least 0")
        for name, value, allowed in (("moments", moments, MOMENTS), ("rounding", rounding, ROUNDING)):
            if value not in allowed:
                raise InputError(f"{name}: got {value!r}, allowed: {', '.join(allowed)}")
        parameters, masks = lora_parameters(model), masks_by_parameter(model)
        inactive = [name for name, mask in masks.items() if mask is None]
        if inactive:
            raise InputError(f"{inactive[0]}: no stage is active; call lorapar.activate(model, partition, stage) first")
        others = [
            n for n, p in model.named_parameters() if p.requires_grad and n not in parameters and ".lora_" not in n
        ]
        if others:
            log.warning("PartitionedAdamW takes the adapter alone; %d other trainable parameters need an optimizer of "
                        "their own: %s", len(others), ", ".join(others[:3]))  # fmt: skip
        self.partition_digest = _digest(masks)
        # Of a sharded adapter, which part this is of how many.
        sharded = any(map(is_part, parameters.values()))
        self.part = [processes.rank(), processes.count()] if sharded else None
        if sharded and skip_nonfinite:
            raise InputError("skip_nonfinite: a process sees its own part of a sharded adapter; leave the key out")
        self._masks = {
            parameter: lk.index_mask(local_part(masks[name], parameter))  # type: ignore[arg-type]
            for name, parameter in parameters.items()
        }
        # The same in every process, also where this one's part has nothing active.
        trained = [parameter for name, parameter in parameters.items() if masks[name].any()]  # type: ignore[union-attr]
        _check_rounding(rounding, trained)
        group = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, moments=moments,
                     rounding=rounding, skip_nonfinite=skip_nonfinite, seed=seed)  # fmt: skip
        self._prepared: tuple[Any, Any] = (None, None)
        super().__init__(trained, group)

    @torch.no_grad()
    def step(self, closure=None, grad_scale: Tensor | None = None):  # type: ignore[override]
        """One update of the active elements of every parameter that has a gradient.

        grad_scale: one fp32 element that multiplies the gradients (a clipping factor, the inverse of a loss scale).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self._initial_state(parameter, group))
                    by_step.setdefault(int(state["step"]) + 1, []).append(parameter)
            if group["skip_nonfinite"] and len(by_step) > 1:
                raise InputError(f"skip_nonfinite: got parameters at {len(by_step)} steps, expected all at one")
            for step, parameters in by_step.items():
                self._step_together(group, step, parameters, grad_scale)
        return loss

    def _step_together(
        self, group: dict[str, Any], step: int, parameters: list[nn.Parameter], grad_scale: Tensor | None
    ):
        states = [self.state[parameter] for parameter in parameters]
        # Another stage of training, a loaded state or another device brings other tensors.
        tensors = [
            id(tensor)
            for state, parameter in zip(states, parameters)
            for tensor in (local(parameter), state["exp_avg"])
        ]
        key = (parameters[0].device, tensors)
        if key != self._prepared[0]:
            packed = {name: [state[name] for state in states] if name in states[0] else None for name in PACKED}
            prepared = lk.PreparedAdamW(
                [local(parameter) for parameter in parameters],
                [self._index(parameter) for parameter in parameters],
                packed["exp_avg"],  # type: ignore[arg-type]
                packed["exp_avg_sq"],  # type: ignore[arg-type]
                scales=packed["scales"],
                compensations=packed["compensation"],
            )
            self._prepared = key, prepared
        done = self._prepared[1].step(
            [local(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
            step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            skip_nonfinite=group["skip_nonfinite"],
            stochastic=group["rounding"] == "stochastic",
            seed=group["seed"],
        )
        if done:
            torch._foreach_add_([state["step"] for state in states], 1)  # pyright: ignore[reportPrivateImportUsage]

    def _index(self, parameter: nn.Parameter) -> lk.MaskIndex:
        """The parameter's mask, where the parameter is now: a model may be moved after its optimizer was made."""
        index = self._masks[parameter]
        if index.words.device != parameter.device:
            moved = index._replace(words=index.words.to(parameter.device), before=index.before.to(parameter.device))
            index = self._masks[parameter] = moved
        return index

    def _initial_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        count, eight = self._masks[parameter].active, group["moments"] == "8bit"
        wide = torch.promote_types(parameter.dtype, torch.float32)
        dtypes = {"exp_avg": torch.int8 if eight else wide, "exp_avg_sq": torch.uint8 if eight else wide}
        if group["rounding"] == "compensated":
            dtypes["compensation"] = parameter.dtype
        state = {key: torch.zeros(count, dtype=dtype, device=parameter.device) for key, dtype in dtypes.items()}
        if eight:
            state["scales"] = torch.zeros(2, -(-local(parameter).numel() // TILE), device=parameter.device)
        return {"step": torch.tensor(0.0), **state}

    def state_bytes(self) -> int:
        """Bytes held now for active elements: 8 each once every parameter has stepped, about 2 with 8-bit moments."""
        return sum(state[key].nbytes for state in self.state.values() for key in PACKED if key in state)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"partition": self.partition_digest, "part": self.part}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        given = state_dict.get("partition")
        if given != self.partition_digest:
            raise InputError(
                f"optimizer state: it belongs to partition {str(given)[:12]}, the model's is "
                f"{self.partition_digest[:12]}; resume with the partition that the checkpoint was made with"
            )
        if state_dict.get("part") != self.part:
            saved, here = (
                "a whole adapter" if part is None else f"part {part[0]} of {part[1]} of a sharded adapter"
                for part in (state_dict.get("part"), self.part)
            )
            raise InputError(f"optimizer state: it belongs to {saved}, this process holds {here}")
        rest = {key: value for key, value in state_dict.items() if key not in ("partition", "part")}
        # A state of an earlier version lacks the newer settings.
        group = {**self.defaults, **rest["param_groups"][0]}
        super().load_state_dict(rest | {"param_groups": [group]})
        # torch casts state to the parameter's dtype; moments have types of their own.
        saved = [rest["state"].get(number) for number in group["params"]]
        for parameter, state in zip(self.param_groups[0]["params"], saved):
            for key in PACKED:
                if state and key in state:
                    self.state[parameter][key] = state[key].to(parameter.device, copy=True)


def _check_rounding(rounding: str, parameters: list[nn.Parameter]) -> None:
    allowed = {"nearest": None, "stochastic": (torch.bfloat16,), "compensated": (torch.bfloat16, torch.float16)}[
        rounding
    ]
    for parameter in parameters if allowed else ():
        if parameter.dtype not in allowed:  # type: ignore[operator]
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in allowed)  # type: ignore[union-attr]
            raise InputError(f"rounding: {rounding} is for {names} parameters, got {parameter.dtype}")


def _digest(masks: dict[str, Tensor | None]) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(lk.pack_mask(masks[name].cpu()).numpy().tobytes())  # type: ignore[union-attr]
    return digest.hexdigest()
