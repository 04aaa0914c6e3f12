"""BackPACK's way: its extension SumGradSquared on every LoRA layer, beside the ordinary backward.

For a linear layer over sequences it makes every example's [out, in] product of the layer before it squares and sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .opacus_way import importance_of, summed_loss
from .released_script import trainable


def extended(model: nn.Module) -> nn.Module:
    """The PeftModel with BackPACK's hooks on its LoRA layers; they stay, so give it a model of its own."""
    from backpack import extend  # pyright: ignore[reportMissingImports]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" in name:
            extend(module)
    return model


def score(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """|g φ − ½ F φ²| by parameter name; the model is `extended`, in eval mode; batches are padded ids and labels."""
    from backpack import backpack  # pyright: ignore[reportMissingImports]
    from backpack.extensions import SumGradSquared  # pyright: ignore[reportMissingImports]

    factors = trainable(model)
    gradient = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    square = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    for ids, labels in batches:
        model.zero_grad()
        with backpack(SumGradSquared()):
            summed_loss(model(input_ids=ids, use_cache=False).logits, labels).backward()
        for name, factor in factors.items():
            assert factor.grad is not None
            gradient[name] += factor.grad
            square[name] += factor.sum_grad_squared  # type: ignore[attr-defined]
            del factor.sum_grad_squared  # type: ignore[attr-defined]
    model.zero_grad()
    return importance_of(factors, gradient, square, sum(len(ids) for ids, _ in batches))
