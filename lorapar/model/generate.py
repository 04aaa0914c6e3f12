"""Greedy answers of a model to a list of prompts, and the tokens that end one."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..data.tokens import turn_end_token
from ..distributed import processes
from ..distributed.sharding import is_sharded
from ..errors import InputError
from .positions import positions_of

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


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer, the same for rollouts, evaluation and what is exported.

    The tokenizer's EOS token, every one of the model's generation settings, and the token that the chat template ends
    an assistant's turn with. A base model's EOS is often another one than its chat template's.
    """
    settings = getattr(model, "generation_config", None)
    of_model = settings.eos_token_id if settings is not None else None
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ids = [tokenizer.eos_token_id, *of_model, turn_end_token(tokenizer)]
    return list(dict.fromkeys(token for token in ids if token is not None))


def set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """Put `stop_tokens` and the tokenizer's padding token into the model's generation settings, where it has any."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer) or None
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def answer_greedily(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda count: None,
    stopped: Callable[[], bool] = lambda: False,
    shared: bool = False,
) -> list[str]:
    """The model's most likely continuation of each prompt, as text without special tokens, in the prompts' order.

    `ids` are the prompts' tokens, a generation prompt included (`data.tokens.prompt_ids`); any of `stop_tokens` ends an
    answer, and so does the model's last position. Prompts of like length share a batch, padded on the left; `on_batch`
    hears how many each batch held. `stopped`, asked after every token, ends it with what is there by then. The model's
    mode is left as it was. Raises InputError for a prompt that takes all of the model's positions.

    `shared`: the processes of a launch all make this call with the same prompts and share its batches, which are those
    of one process; each returns every answer, and `on_batch` hears about how many all have answered together.
    """
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    positions = positions_of(getattr(model, "config", None))
    longest = max((len(prompt) for prompt in ids), default=0)
    if positions is not None and longest >= positions:
        raise InputError(f"a prompt has {longest} tokens, and the model's {positions} positions leave none to answer")
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    batches = _batches(order, [len(prompt) for prompt in ids], max_new_tokens, batch_size, positions)

    def limit_of(batch: list[int]) -> int:
        width = len(ids[batch[0]])
        return max_new_tokens if positions is None else min(max_new_tokens, positions - width)

    # A sharded base takes part in every process's forwards: as many batches, and as many tokens each.
    in_step = shared and is_sharded(model)
    answers: dict[int, str] = {}
    unsaid = len(ids)
    training = model.training
    model.eval()
    try:
        for batch, counts in _shared(batches, limit_of, in_step) if shared else [(batch, True) for batch in batches]:
            if stopped():
                break
            width = max(len(ids[i]) for i in batch)
            padded = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
            produced = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=limit_of(batch),
                stopping_criteria=[lambda seen, *_, **__: torch.full((len(seen),), stopped(), device=seen.device)],
                do_sample=False,
                eos_token_id=stops or None,
                pad_token_id=pad,
                # A model's own sampling settings mean nothing to a greedy answer, and would warn.
                temperature=None,
                top_p=None,
                top_k=None,
                synced_gpus=in_step,
            )
            if not counts:
                continue
            ended = [until(row, stops) for row in produced[:, width:].tolist()]
            texts_out = tokenizer.batch_decode(ended, skip_special_tokens=True)
            answers |= {index: text.strip() for index, text in zip(batch, texts_out)}
            said = min(len(batch) * (processes.count() if shared else 1), unsaid)
            unsaid -= said
            on_batch(said)
    finally:
        model.train(training)
    if shared:
        answers = {index: text for part in processes.gather(answers) for index, text in part.items()}
        if unsaid:
            on_batch(unsaid)
    return [answers.get(index, "") for index in range(len(ids))]


def _shared(
    batches: list[list[int]], limit_of: Callable[[list[int]], int], in_step: bool
) -> list[tuple[list[int], bool]]:
    """This process's batches, and whether each is to be answered.

    in_step: as many in every process, the last one's answers unused where there are fewer; and each beside batches that
    may be as long, since all go on until the longest answer of all is done.
    """
    if not in_step:
        return [(batch, True) for batch in processes.share(batches)]
    # They are in the order of their prompts' lengths, and so of their limits.
    groups = [list(group) for _, group in itertools.groupby(batches, key=limit_of)]
    return [(batch or group[-1], batch is not None) for group in groups for batch in processes.rounds(group)]


def _batches(order: list[int], lengths: list[int], new: int, size: int, positions: int | None) -> list[list[int]]:
    """Prompts in batches of `size`, in this order, the longest first; those that leave less than `new` positions beside
    others of their length alone, so that none cuts another's answer."""
    limit = float("inf") if positions is None else positions - new
    batches: list[list[int]] = []
    for i in order:
        first = lengths[batches[-1][0]] if batches else -1
        if batches and len(batches[-1]) < size and (first == lengths[i] or first <= limit):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def until(ids: list[int], stops: list[int]) -> list[int]:
    """The ids before the first that ends an answer; it need not be a special token, which decoding leaves out."""
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
