"""Log-probabilities of the tokens that count, a few hundred at a time, in the place of TRL's head for all of them.

TRL 1.16 scores a batch without holding its logits [B, T, V], in tiles of 4,096 tokens × 32,768 words, recomputed in the
backward. On a GPU it takes only the tokens that have a label; elsewhere it scores prompts and padding too, and a tile
with what is made from it takes gigabytes. Here the tokens with a label are picked out first and scored `tokens` at a
time, by TRL's own function, which knows each architecture's scale and cap. The result is the same, per token.

Where the head is a frozen linear layer and its output is the model's logits (held against them once), `AnswerLogProbs`
takes two products in the place of TRL's three. For a token with hidden state h, target t and p = softmax(W h),

    log p_t = z_t − logsumexp(z),    ∂ log p_t / ∂h = W_t − Σ_v p_v W_v

so the gradient's direction is made while the logits are there, and the backward only scales it.
"""

import inspect
import types
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..memory.switches import CPU_LOGPROB_TOKENS


class AnswerLogProbs(torch.autograd.Function):
    """(hidden [n, h], weight [v, h], bias [v] or None, targets [n], tokens at once) → log p, entropy, is_top1 [n].

    In fp32 at least; log p alone has a gradient, and for `hidden` alone.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tokens: int):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropies = (hidden.new_empty(len(targets), dtype=wide) for _ in range(2))
        is_top = torch.empty_like(targets, dtype=torch.bool)
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), tokens):
            span = slice(start, start + tokens)
            at = targets[span, None]
            z = torch.nn.functional.linear(hidden[span], weight, bias).to(wide)
            is_top[span] = (z.argmax(-1, keepdim=True) == at).squeeze(1)
            z -= z.logsumexp(-1, keepdim=True)
            log_probs[span] = z.gather(1, at).squeeze(1)
            p = z.exp()
            entropies[span] = -torch.linalg.vecdot(p, z)
            if direction is not None:
                direction[span] = weight[targets[span]] - p.to(weight.dtype) @ weight
        ctx.save_for_backward(direction)
        ctx.mark_non_differentiable(entropies, is_top)
        return log_probs, entropies, is_top

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        (direction,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("answers' log-probabilities have no second derivative; leave create_graph out")
        given = gradients[0]
        if direction is None or given is None:
            return (None,) * 5
        return direction * given[:, None].to(direction.dtype), None, None, None, None


class _HeadAlone:
    """What TRL's forward asks of a model, for hidden states that are there already."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def base_model(self, hidden: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


def check_head(model: PreTrainedModel) -> None:
    """InputError unless the model is a part that gives hidden states and a head that makes logits of them."""
    if model.base_model is model or model.get_output_embeddings() is None:
        raise InputError(
            f"model.name: {type(model).__name__} names no model beneath its output head (base_model_prefix, "
            "get_output_embeddings), and TRL's trainers score tokens from that model's hidden states"
        )


@torch.no_grad()
def is_plain(model: Any, forward: Any, temperature: float) -> bool:
    """Whether a causal model's logits are its linear head's output and nothing else, found on two tokens.

    `forward`: the model's, out of TRL's `add_fused_lm_head` at `temperature`. Raises InputError where something is done
    to the logits that TRL's function does not do either.
    """
    head, training = model.get_output_embeddings(), model.training
    ids = torch.tensor([[2, 3]], device=head.weight.device)
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = forward(input_ids=ids, use_cache=False).logits
    fused = forward.__func__(_HeadAlone(model), hidden, shift_labels=ids, fused_lm_head=True)
    model.train(training)
    z = logits.float() / temperature
    exact = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    # Well above the rounding of bf16 and TF32, and below what a scale or a cap does to logits of a trained model.
    if not bool(z.isfinite().all()):
        return False  # the trainer's own check says so
    if not torch.allclose(fused.log_probs.float(), exact, rtol=0, atol=0.02 * float(1 + z.abs().max())):
        raise InputError(
            f"model.name: {model.name_or_path!r} does something to its logits that TRL's trainers leave out, "
            "so that they would train on other probabilities than the model's"
        )
    plain = isinstance(head, torch.nn.Linear) and head.weight.is_floating_point()
    # To the bit: the same operation on the same numbers, and a cap shows in the last bits of small logits alone.
    return plain and torch.equal(logits, torch.nn.functional.linear(hidden, head.weight, head.bias).to(logits.dtype))


def score_answers_alone(
    model: PreTrainedModel, tokens: int | None, temperature: float = 1.0, needs_trl: bool = False
) -> None:
    """Have `model(..., labels=, fused_lm_head=True)` score the tokens with a label, `tokens` at a time.

    Args:
        model: the base model after TRL's trainer gave it a fused head. tokens: None leaves TRL's way on a GPU and takes
            `CPU_LOGPROB_TOKENS` elsewhere. temperature: what TRL's head was given. needs_trl: where the entropy is part
            of a loss, or the head runs in fp32: TRL's function alone does that.
    """
    check_head(model)
    device = next(model.parameters()).device
    if tokens is None and device.type == "cuda":
        return
    # This module is imported where TRL may not be installed.
    from trl.trainer.utils import FusedCausalLMOutput

    at_once = tokens or CPU_LOGPROB_TOKENS
    of_trl: Any = model.forward
    text = model.config.get_text_config()
    plain: bool | None = None  # found in the first call, when the model is as it will be trained

    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        router = kwargs.get("output_router_logits") or getattr(text, "output_router_logits", False)
        if not fused_lm_head or labels is None or router:
            return of_trl(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        nonlocal plain
        if plain is None:
            plain = is_plain(self, of_trl, temperature)
        num_items = kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:].to(hidden.device)
        mask = labels != -100
        some, targets = hidden[mask], labels[mask]
        head: Any = self.get_output_embeddings()
        if plain and not head.weight.requires_grad and not needs_trl:
            bias = None if head.bias is None else head.bias / temperature
            found = AnswerLogProbs.apply(some / temperature, head.weight, bias, targets, at_once)
            fields = dict(zip(("log_probs", "entropy", "is_top1"), found))
            out: Any = FusedCausalLMOutput()
        else:
            pieces = [
                of_trl.__func__(_HeadAlone(self), h[None], shift_labels=target[None], fused_lm_head=True)
                for h, target in zip(some.split(at_once), targets.split(at_once))
            ]
            out = pieces[0]
            names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            present = [name for name in names if getattr(out, name) is not None]
            fields = {name: torch.cat([getattr(piece, name)[0] for piece in pieces]) for name in present}
        for name, values in fields.items():
            setattr(out, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
        out.label_mask = mask
        out.loss = -out.log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        return out

    # `generate` checks its keywords against the model's own signature.
    forward.__signature__ = inspect.signature(of_trl.__func__)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
