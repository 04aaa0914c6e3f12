"""The largest batch first: found, gone through before the first step, and without a trace."""

import logging
import sys

import pytest
import torch
import trl.trainer.sft_trainer
from torch.autograd.graph import saved_tensors_hooks

import lorapar
from lorapar.adapter.layers import lora_parameters
from lorapar.training.rehearsal import longest
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_training import ROWS, fresh, grpo_config, letters, losses, sft_config
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_longest_are_found():
    assert longest([3, 9, 1, 9, 4], 3) == [1, 3, 4]
    assert longest([2], 4) == [0]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_longest_go_first_and_leave_no_trace(tmp_path, stage, caplog):
    found = []
    for first in (False, True):
        torch.manual_seed(3)
        model = lorapar.attach(tiny_model(), config(lora_dropout=0.2), start="twin")
        made = random_partition(model)
        with caplog.at_level(logging.INFO, "lorapar"):
            if stage == "sft":
                _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path), longest_first=first)
            else:
                settings = grpo_config(tmp_path, beta=0.04)
                _, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters], longest_first=first)
        found.append((losses(trained), trained.history, {n: p for n, p in lora_parameters(model).items()}))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1]):
        assert {k: v for k, v in one.items() if "time" not in k and "per_second" not in k} == {
            k: v for k, v in other.items() if "time" not in k and "per_second" not in k
        }
    assert all(torch.equal(p, found[1][2][n]) for n, p in found[0][2].items())
    said = [r.getMessage() for r in caplog.records if "went first" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(
        "sft: 4 rows of up to 7 tokens went first" if stage == "sft"
        else "grpo: prompts of up to 4 tokens with completions of 4 went first"
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_what_cannot_fit_fails_before_the_first_step(tmp_path, stage):
    """Only the very longest batch is too large, here by the number of its positions."""
    rows = ROWS.select_columns(["prompt", "completion", "answer"]).to_list()
    rows.append({"prompt": "1+1=" * 6, "completion": "2", "answer": "2"})
    rows = ROWS.from_list(rows)
    model, made = fresh()
    inner = model.get_base_model().model
    steps = []

    def refuse(module, args, given):
        width = (given.get("input_ids") if given.get("input_ids") is not None else args[0]).shape[1]
        if width > 24:
            raise torch.OutOfMemoryError(f"{width} positions")

    inner.register_forward_pre_hook(refuse, with_kwargs=True)

    def run():
        if stage == "sft":
            lorapar.sft(model, tiny_tokenizer(), rows, made, sft_config(tmp_path, seed=1))
        else:
            settings = grpo_config(tmp_path, max_completion_length=2, seed=1)
            lorapar.grpo(model, tiny_tokenizer(), rows, made, settings, [lambda prompts, **_: steps.append(1)])

    before = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    with pytest.raises(torch.OutOfMemoryError, match="positions"):
        run()
    assert steps == []
    assert all(torch.equal(p, before[n]) for n, p in lora_parameters(model).items())


class Away(saved_tensors_hooks):
    """Stands in for TRL's off-loading, which needs a GPU's streams: what is saved is copied away and back."""

    def __init__(self, *_):
        self.entered, self.saved = 0, []
        super().__init__(self.pack, torch.Tensor.clone)

    def pack(self, tensor):
        self.saved.append(tensor.numel())
        return tensor.detach().clone()

    def __enter__(self):
        self.entered += 1
        return super().__enter__()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_off_loading_covers_every_step_and_the_rehearsal(tmp_path, monkeypatch, stage):
    found, made_here = [], []

    def stand_in(model):
        made_here.append(Away())
        return made_here[-1]

    # By module: `lorapar.grpo` is the function.
    for module in (sys.modules["lorapar.training.grpo"], trl.trainer.sft_trainer):
        monkeypatch.setattr(module, "get_act_offloading_ctx_manager", stand_in)
    for off in (False, True):
        model, made = fresh()
        if stage == "sft":
            config = sft_config(tmp_path, activation_offloading=off, max_steps=3)
            _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, config, micro_batch_tokens=None)
        else:
            config = grpo_config(tmp_path, max_steps=3)
            rows = model, tiny_tokenizer(), ROWS, made, config, [letters]
            _, trained = lorapar.grpo(*rows, activation_offloading=off)
        found.append((losses(trained), {n: p.detach().clone() for n, p in lora_parameters(model).items()}))
    (away,) = made_here
    assert away.entered == 3 + 1
    assert max(away.saved) > 32
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, found[1][1][n]) for n, p in found[0][1].items())
