"""AdamW over the active elements of each parameter: the others have no state and are never written.

For the active elements, step t, g the gradient (−g to maximise), as torch.optim.AdamW:

    φ ← φ − lr · weight_decay · φ
    m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
    φ ← φ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

Shapes: params, grads and masks as the parameter; m and v are 1-D, one entry an active element, in flat
row-major order: 8 bytes an active element, none for the rest. They are fp32 (fp64 beside an fp64 parameter)
and so is the arithmetic; a bf16 or fp16 parameter is rounded once, when it is written.

Departure from the paper's script, which zeroes the gradients of frozen elements and lets AdamW decay them:
here frozen means untouched, bit for bit.

Trade-off: this reference gathers, computes and scatters, so it moves more bytes than a fused kernel would.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import always, choose


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of both moments, and of the arithmetic, for a parameter of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def masked_adamw_reference(
    param: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One parameter's step, in place, with torch.optim.AdamW's operations in its order."""
    beta1, beta2 = betas
    # Row-major positions, whatever the strides of the three.
    active = mask.reshape(-1).nonzero().squeeze(1)
    phi = param.take(active).to(exp_avg.dtype)
    gradient = grad.take(active).to(exp_avg.dtype)
    if maximize:
        gradient.neg_()
    phi.mul_(1.0 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    phi.addcdiv_(exp_avg, root, value=-lr / (1.0 - beta1**step))
    # Both write the active elements and no others; the first is twice as fast.
    if param.is_contiguous():
        param.view(-1).index_copy_(0, active, phi.to(param.dtype))
    else:
        param.index_put_(mask.nonzero(as_tuple=True), phi.to(param.dtype))


def _check(i: int, param: Tensor, grad: Tensor, mask: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    shape = list(param.shape)
    if not param.is_floating_point():
        raise ValueError(f"params[{i}] must be of a floating-point dtype, got {param.dtype}")
    if list(grad.shape) != shape or not grad.is_floating_point():
        raise ValueError(f"grads[{i}] must be floating-point {shape}, got {grad.dtype} {list(grad.shape)}")
    if list(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(f"masks[{i}] must be torch.bool {shape}, got {mask.dtype} {list(mask.shape)}")
    dtype, active = state_dtype(param.dtype), int(torch.count_nonzero(mask))
    for name, moment in (("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
        if list(moment.shape) != [active] or moment.dtype != dtype:
            raise ValueError(
                f"{name}[{i}] must be {dtype} [{active}], one entry an active element, "
                f"got {moment.dtype} {list(moment.shape)}"
            )


@torch.no_grad()
def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    """One AdamW step on the active elements of every parameter, in place on params, exp_avgs and exp_avg_sqs.

    Args:
        params, grads, masks: lists of one length; grads[i] and masks[i] (bool) of params[i]'s shape.
        exp_avgs, exp_avg_sqs: 1-D, masks[i].sum() entries each, fp32 (fp64 for an fp64 parameter); zeros at
        first. step: the number of this step, from 1 on.

    An element outside its mask is not written, whatever it, its gradient or the decay are. Raises ValueError
    naming the argument; all are checked before anything is written.
    """
    choose("masked_adamw", {"reference": always})
    lists = {"grads": grads, "masks": masks, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must hold {len(params)} tensors, one a parameter, got {len(tensors)}")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an int of at least 1, got {step!r}")
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    each = list(zip(params, grads, masks, exp_avgs, exp_avg_sqs, strict=True))
    for i, tensors in enumerate(each):
        _check(i, *tensors)
    for tensors in each:
        masked_adamw_reference(*tensors, step, lr, betas, eps, weight_decay, maximize)
