"""Greedy answers of a model to a list of prompts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_greedy(model: "PreTrainedModel") -> None:
    settings = model.generation_config
    if settings is None:
        return
    settings.do_sample = False
    # transformers warns of each of these beside do_sample=False.
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        setattr(settings, name, None)
    if settings.pad_token_id is None:
        eos = settings.eos_token_id
        settings.pad_token_id = eos[0] if isinstance(eos, list) else eos


@torch.no_grad()
def answer_greedily(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda count: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The model's most likely continuation of each prompt, as text without special tokens, in the prompts' order.

    `ids` are the prompts' tokens, a generation prompt included (`data.prompt_ids`). Prompts of like length share a
    batch, padded on the left; `on_batch` hears how many each batch held. `stopped`, asked after every token, ends it
    with what is there by then. The model's mode is left as it was.
    """
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    answers = [""] * len(ids)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            if stopped():
                break
            batch = order[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt")
            width = padded["input_ids"].shape[1]
            produced = model.generate(
                **padded.to(model.device),
                max_new_tokens=max_new_tokens,
                stopping_criteria=[lambda seen, *_, **__: torch.full((len(seen),), stopped(), device=seen.device)],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                # A model's own sampling settings mean nothing to a greedy answer, and would warn.
                temperature=None,
                top_p=None,
                top_k=None,
            )
            texts_out = tokenizer.batch_decode(produced[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts_out):
                answers[index] = text.strip()
            on_batch(len(batch))
    finally:
        model.train(training)
    return answers
