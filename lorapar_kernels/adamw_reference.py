"""AdamW on the active elements of one parameter, in plain PyTorch: what csrc is held to, to the bit."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import TILE

LOW32, LOW64 = (1 << 32) - 1, (1 << 64) - 1
SCALE_1, SCALE_2 = 127.0**2, 255.0**4


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of both moments, and of the arithmetic, for a parameter of this dtype."""
    return torch.promote_types(dtype, torch.float32)


class Settings(NamedTuple):
    """What all tensors of a step share."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    stochastic: bool
    seed: int


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & LOW64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & LOW64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & LOW64
    return x ^ x >> 31


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, in int64: the products wrap, and their low words are right all the same."""
    x = (x ^ x >> 16) * 0x7FEB352D & LOW32
    x = (x ^ x >> 15) * 0x846CA68B & LOW32
    return x ^ x >> 16


def random_bits(seed: int, step: int, tensor: int, element: Tensor, stream: int) -> Tensor:
    """32 random bits (int64) for each element's number; stream 0 is the parameter's, 1 both moments'."""
    key = _splitmix64((_splitmix64((seed + step) & LOW64) + tensor) & LOW64)
    first = _mixed(element & LOW32 ^ (key & LOW32))
    return _mixed(first ^ (key >> 32) ^ _mixed(2 * (element >> 32) + stream & LOW32))


def _to_bfloat16_at_random(values: Tensor, random: Tensor) -> Tensor:
    bits = values.view(torch.int32).to(torch.int64) + (random & 0xFFFF)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def decode_moments(codes_1: Tensor, codes_2: Tensor, scales: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """The moments in fp32 that 8-bit codes stand for; `tile` is each active element's."""
    c, square = codes_1.float(), codes_2.float().square()
    return c * c.abs() * (scales[0, tile] / SCALE_1), square * square * (scales[1, tile] / SCALE_2)


def _sqrt(values: Tensor) -> Tensor:
    """The nearest root, as csrc's: torch's own fp32 roots on a CPU (MKL's) are a unit off in one of six."""
    return values.double().sqrt().to(values.dtype)


def _encode(values: Tensor, power: int, scale: float, tile: Tensor, largest: Tensor, random: Tensor) -> Tensor:
    """Codes of non-negative values, rounded up or down with `random` (16 bits); `largest` is written."""
    largest.zero_().scatter_reduce_(0, tile, values, "amax")
    of = largest[tile]
    target = values / of * scale
    low = (_sqrt(target) if power == 2 else _sqrt(_sqrt(target))).floor()
    if power == 2:
        share = (target - low * low) / (2.0 * low + 1.0)
    else:
        low_2, high_2 = low * low, (low + 1.0) * (low + 1.0)
        share = (target - low_2 * low_2) / (high_2 * high_2 - low_2 * low_2)
    codes = low + (random < share * 65536.0)
    # Tiles of zeros only, and with an infinity or NaN, decode to zeros and to NaN whatever the codes.
    return torch.where((of > 0.0) & of.isfinite(), codes, 1.0)


def encode_moments(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor, tile: Tensor, random: Tensor):
    """The reverse of `decode_moments`: gives int8 and uint8 codes, writes `scales`."""
    one = _encode(exp_avg.abs(), 2, SCALE_1, tile, scales[0], random & 0xFFFF).clamp_(max=127.0)
    two = _encode(exp_avg_sq, 4, SCALE_2, tile, scales[1], random >> 16)
    valid = (scales[1, tile] > 0.0) & scales[1, tile].isfinite() & (exp_avg_sq > 0.0)
    two = torch.where(valid, two.clamp(2.0, 255.0), two)
    valid = (scales[0, tile] > 0.0) & scales[0, tile].isfinite()
    return torch.where(valid & (exp_avg < 0.0), -one, one).to(torch.int8), two.to(torch.uint8)


def masked_adamw_reference(
    param: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None,
    compensation: Tensor | None,
    grad_scale: Tensor | None,
    settings: Settings,
    number: int,
) -> None:
    """One parameter's step, in place; `number` is its place in the list.

    Gathers, computes and scatters, so it moves more bytes than the fused step. Each line is one operation of csrc's.
    """
    beta1, beta2 = settings.betas
    # Row-major positions, whatever the strides of the three.
    active = mask.reshape(-1).nonzero().squeeze(1)
    dtype = state_dtype(param.dtype)
    phi, gradient = param.take(active).to(dtype), grad.take(active).to(dtype)
    if compensation is not None:
        phi += compensation
    factor = -1.0 if settings.maximize else 1.0
    gradient = gradient * (factor if grad_scale is None else grad_scale * factor)
    random = partial(random_bits, settings.seed, settings.step, number, active)
    m, v = (exp_avg, exp_avg_sq) if scales is None else decode_moments(exp_avg, exp_avg_sq, scales, active // TILE)
    # torch.lerp's two forms, so that a weight of 1 gives the gradient itself.
    difference, weight = gradient - m, torch.tensor(1.0 - beta1, dtype=dtype)
    m = m + weight * difference if weight < 0.5 else gradient - difference * (1.0 - weight)
    v = v * beta2 + gradient * (1.0 - beta2) * gradient
    root = _sqrt(v) * (1.0 / math.sqrt(1.0 - beta2**settings.step)) + settings.eps
    phi = phi * (1.0 - settings.lr * settings.weight_decay) + m / root * (-settings.lr / (1.0 - beta1**settings.step))
    if scales is not None:
        m, v = encode_moments(m, v, scales, active // TILE, random(1))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    rounded = _to_bfloat16_at_random(phi, random(0)) if settings.stochastic else phi.to(param.dtype)
    if compensation is not None:
        compensation.copy_(phi - rounded)
    # Both write the active elements and no others; the first is twice as fast.
    if param.is_contiguous():
        param.view(-1).index_copy_(0, active, rounded)
    else:
        param.index_put_(mask.nonzero(as_tuple=True), rounded)
