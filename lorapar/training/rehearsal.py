"""The longest samples first: what cannot fit fails in the first minute and not after hours.

Before a stage's first step its largest batch goes once through forward and backward, without a step: rows and order of
training, random numbers, logs and weights are afterwards as if it had not been. (Putting the longest rows into the
first batch would do as much, and change the order of the rows.)
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..memory.process import peak_memory_bytes

log = logging.getLogger("lorapar")
# What TRL's trainers note while they compute a loss.
LOGGED = ("_metrics", "_total_train_tokens", "_entropy_window_stats")


def longest(lengths: Sequence[int], count: int) -> list[int]:
    """The places of the `count` longest, the longest first; of equals the earlier."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])[:count]


@contextlib.contextmanager
def rehearsing(trainer: Any, model: nn.Module, what: str) -> Iterator[None]:
    """Let a trainer compute a loss and gradients, and put its logs, gradients and random state back afterwards."""
    logged = {name: copy.deepcopy(trainer.__dict__[name]) for name in LOGGED if name in trainer.__dict__}
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.maybe_activation_offload_context:
        yield
    model.zero_grad(set_to_none=True)
    trainer.__dict__.update(logged)
    peak = peak_memory_bytes() / 1e9
    log.info("%s: %s went first, forward and backward: %.2f GB at the peak", trainer.stage, what, peak)
