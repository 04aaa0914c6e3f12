"""AdamW that owns state for active elements only, and writes nothing else.

The released script zeroes gradients in a hook and steps torch's AdamW, whose weight decay and moments still move what
is "frozen". Here an inactive element has no moments and is never written (paper section 3.4, taken at its word).
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

import lorapar_kernels as lk

from .adapter import lora_parameters, masks_by_parameter
from .errors import InputError


class PartitionedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW) over the active elements of an activated model.

    `state[p]` holds "step" (a 0-d fp32 tensor, as torch keeps it) and the packed moments "exp_avg" and "exp_avg_sq",
    1-D fp32 of the parameter's active elements in row-major order: 8 bytes an active element.

    Args:
        model: after `lorapar.activate`. Its masks are taken now; activating another stage needs a new optimizer.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; one parameter group.

    `state_dict()` carries a digest of the masks; `load_state_dict` refuses a state of another partition.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise InputError(f"{name}: got {value}, expected at least 0")
        parameters, masks = lora_parameters(model), masks_by_parameter(model)
        inactive = [name for name, mask in masks.items() if mask is None]
        if inactive:
            raise InputError(f"{inactive[0]}: no stage is active; call lorapar.activate(model, partition, stage) first")
        self._masks = {parameter: masks[name] for name, parameter in parameters.items()}
        self.partition_digest = _digest(masks)
        trained = [parameter for parameter in parameters.values() if bool(self._masks[parameter].any())]  # type: ignore[union-attr]
        super().__init__(trained, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """One update of the active elements of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self._initial_state(parameter))
                    state["step"] += 1
                    by_step.setdefault(int(state["step"]), []).append(parameter)
            for step, parameters in by_step.items():
                states = [self.state[parameter] for parameter in parameters]
                lk.masked_adamw(
                    parameters,
                    [parameter.grad for parameter in parameters],  # type: ignore[misc]
                    [self._masks[parameter] for parameter in parameters],  # type: ignore[misc]
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    step,
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        count = int(self._masks[parameter].sum())  # type: ignore[index, union-attr]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(count, dtype=dtype, device=parameter.device),
            "exp_avg_sq": torch.zeros(count, dtype=dtype, device=parameter.device),
        }

    def state_bytes(self) -> int:
        """Bytes of the moments held now: 8 an active element once every parameter has stepped."""
        return sum(
            state[key].numel() * state[key].element_size()
            for state in self.state.values()
            for key in ("exp_avg", "exp_avg_sq")
            if key in state
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"partition": self.partition_digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        given = state_dict.get("partition")
        if given != self.partition_digest:
            raise InputError(
                f"optimizer state: it belongs to partition {str(given)[:12]}, the model's is "
                f"{self.partition_digest[:12]}; resume with the partition that the checkpoint was made with"
            )
        rest = {key: value for key, value in state_dict.items() if key != "partition"}
        super().load_state_dict(rest)
        # torch casts state to the parameter's dtype; the moments of bf16 parameters stay fp32.
        saved = [rest["state"].get(number) for number in rest["param_groups"][0]["params"]]
        for parameter, state in zip(self.param_groups[0]["params"], saved):
            for key in ("exp_avg", "exp_avg_sq") if state else ():
                self.state[parameter][key] = state[key].to(parameter.device, copy=True)


def _digest(masks: dict[str, Tensor | None]) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(lk.pack_mask(masks[name].cpu()).numpy().tobytes())  # type: ignore[union-attr]
    return digest.hexdigest()
