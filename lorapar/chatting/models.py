"""The base and each stage's result in one load of the model: their prompts, and their answers token by token."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from ..adapter.attach import load_adapter, saved_shapes
from ..adapter.layers import ADAPTER, check_fits, masked_layers
from ..data.tokens import check_known
from ..errors import InputError
from ..model.generate import stop_tokens, until
from ..model.positions import positions_of
from .streaming import tokens_of

BASE = "base"
UNFINISHED = "\ufffd"  # what decoding makes of a character whose last bytes are not there yet


class Models:
    """A base and the adapters of the stages in `folder`, by the stages' names."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, stages: Sequence[str]):
        """model: the base, which gets the layers. Raises InputError for an adapter that is not whole or not of it."""
        first, *later = stages
        self.names = [BASE, *stages]
        self.tokenizer = tokenizer
        self.model: PeftModel = load_adapter(model, folder / first)
        for name in later:
            _add(self.model, folder / name, name)
        self.model.eval()
        self._layers = list(masked_layers(self.model).values())
        self._adapters = {first: ADAPTER, **{name: name for name in later}}
        self._stops = stop_tokens(self.model, tokenizer)

    def switch(self, name: str) -> None:
        """Have the model compute as the base, or as a stage left it."""
        active = [self._adapters[name]] if name in self._adapters else []
        for layer in self._layers:
            layer.set_adapter(active, inference_mode=True)

    def answers(
        self,
        prompts: Mapping[str, list[int]],
        max_new_tokens: int,
        temperature: float | None,
        on_text: Callable[[dict[str, str]], None],
    ) -> dict[str, str]:
        """Each model's answer to its prompt, {name: text}, as evaluation decodes it; they take turns, a token each.

        prompts: token ids, a generation prompt included. max_new_tokens: or less where the model's positions end.
        temperature: drawn at it from torch's own random numbers; None: the likeliest token. on_text: hears after every
        round what each model has said by then, without the bytes of a character that is not complete.
        Raises InputError for a prompt that takes all positions, or has a token that the model has no embedding for.
        """
        room = {name: self._room(ids, max_new_tokens) for name, ids in prompts.items()}
        said: dict[str, list[int]] = {name: [] for name in prompts}
        streams = {
            name: tokens_of(functools.partial(self._generate, ids, room[name], temperature))
            for name, ids in prompts.items()
        }
        try:
            going = list(streams)
            while going:
                for name in list(going):
                    self.switch(name)
                    token = next(streams[name], None)
                    if token is None:
                        going.remove(name)
                    else:
                        said[name].append(token)
                on_text({name: self._text(ids).rstrip(UNFINISHED) for name, ids in said.items()})
        finally:
            for stream in streams.values():
                cast(Any, stream).close()
        return {name: self._text(ids) for name, ids in said.items()}

    def _room(self, ids: list[int], max_new_tokens: int) -> int:
        check_known(ids, self.model, self.tokenizer, "of the question")
        positions = positions_of(getattr(self.model, "config", None))
        if positions is not None and len(ids) >= positions:
            raise InputError(f"the prompt has {len(ids)} tokens, and the model's {positions} positions leave none to "
                             "answer")  # fmt: skip
        return max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(until(ids, self._stops), skip_special_tokens=True).strip()

    def _generate(self, ids: list[int], new: int, temperature: float | None, streamer: Any) -> None:
        drawn = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature is not None else {}
        self.model.generate(
            input_ids=torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.int64, device=self.model.device),
            max_new_tokens=new,
            do_sample=temperature is not None,
            eos_token_id=self._stops or None,
            pad_token_id=self.tokenizer.pad_token_id,
            # A model's own sampling settings are not the run's.
            **({"temperature": None, "top_p": None, "top_k": None} | drawn),
            streamer=streamer,
        )


def _add(model: PeftModel, folder: Path, name: str) -> None:
    """Load a second adapter beside the first, under a name of its own."""
    try:
        model.load_adapter(str(folder), adapter_name=name)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: does not fit the model or is corrupt ({error})") from error
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
    there = {parameter.replace(f".{name}.weight", f".{ADAPTER}.weight"): tensor
             for parameter, tensor in model.named_parameters() if parameter.endswith(ends)}  # fmt: skip
    # PEFT warns where names differ, and goes on with an adapter that does nothing.
    check_fits(there, saved_shapes(folder), str(folder))
