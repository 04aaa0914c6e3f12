"""Log-probabilities of the tokens that count, a few hundred at a time, in the place of TRL's head for all of them.

TRL 1.16 scores a batch without holding its logits [B, T, V], in tiles of 4,096 tokens × 32,768 words, recomputed in the
backward. On a GPU it takes only the tokens that have a label; elsewhere it scores prompts and padding too, and a tile
with what is made from it takes gigabytes. Here the tokens with a label are picked out first and scored `tokens` at a
time, by TRL's own function, which knows each architecture's scale and cap. The result is the same, per token.
"""

import inspect
import types
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Tokens scored at once where the recipe says nothing; measured in bench/LOG.md. On a GPU TRL's own tiles are left.
CPU_TOKENS = 256


class _HeadAlone:
    """What TRL's forward asks of a model, for hidden states that are there already."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def base_model(self, hidden: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


def score_answers_alone(model: PreTrainedModel, tokens: int | None) -> None:
    """Have `model(..., labels=, fused_lm_head=True)` score the tokens with a label, `tokens` at a time.

    Args:
        model: the base model after TRL's trainer gave it a fused head. tokens: None leaves TRL's way on a GPU and takes
            `CPU_TOKENS` elsewhere.
    """
    device = next(model.parameters()).device
    if tokens is None and device.type == "cuda":
        return
    at_once = tokens or CPU_TOKENS
    of_trl: Any = model.forward

    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        router = kwargs.get("output_router_logits") or getattr(self.config, "output_router_logits", False)
        if not fused_lm_head or labels is None or router:
            return of_trl(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:].to(hidden.device)
        mask = labels != -100
        pieces = [
            of_trl.__func__(_HeadAlone(self), h[None], shift_labels=target[None], fused_lm_head=True)
            for h, target in zip(hidden[mask].split(at_once), labels[mask].split(at_once))
        ]
        out = pieces[0]
        for field in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            if getattr(out, field) is not None:
                values = torch.cat([getattr(piece, field)[0] for piece in pieces])
                setattr(out, field, values.new_zeros(mask.shape).masked_scatter(mask, values))
        out.label_mask = mask
        out.loss = -out.log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        return out

    # `generate` checks its keywords against the model's own signature.
    forward.__signature__ = inspect.signature(of_trl.__func__)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
