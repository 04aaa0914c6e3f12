"""Memory switches of SFT: a batch in parts, with the losses and gradients of the whole; what a switch needs."""

import pytest
import torch

import lorapar
from bench.memory_case import measure
from bench.training_cases import SHAPES, Case
from lorapar.doctor import doctor
from lorapar.memory.switches import SWITCHES
from lorapar.training.sft import micro_batches
from tests.lorapar.driver import refused, succeeds
from tests.lorapar.test_quantised import needs_bnb
from tests.lorapar.test_training import ROWS, differences, fresh, losses, sft_config
from tests.tiny import tiny_tokenizer


def padded(*lengths, left=False):
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "other": torch.tensor([3.0])}
    return {n: t.flip(1) if left and t.shape == mask.shape else t for n, t in batch.items()}


@pytest.mark.parametrize(
    ("lengths", "tokens", "rows", "widths"),
    [
        ((4, 4, 4, 4), 8, [2, 2], [4, 4]),
        ((4, 4, 4), 8, [2, 1], [4, 4]),
        ((9, 1, 1, 1), 6, [1, 3], [9, 1]),
        ((1, 9, 1), 100, [3], [9]),
        ((3, 2, 5), 1, [1, 1, 1], [3, 2, 5]),
    ],
)
def test_parts_hold_every_row_once_and_are_cut_at_their_longest(lengths, tokens, rows, widths):
    batch = padded(*lengths)
    parts = micro_batches(batch, tokens)
    assert [len(part["input_ids"]) for part in parts] == rows
    assert [part["labels"].shape[1] for part in parts] == widths
    assert all(torch.equal(part["other"], batch["other"]) for part in parts)
    found = [row[row > 0].tolist() for part in parts for row in part["input_ids"]]
    assert found == [row[row > 0].tolist() for row in batch["input_ids"]]
    assert [int(part["attention_mask"].sum()) for part in parts] == [
        sum(lengths[sum(rows[:i]) : sum(rows[: i + 1])]) for i in range(len(rows))
    ]


def test_what_cannot_be_cut_is_left_whole():
    batch = padded(3, 5, left=True)
    assert micro_batches(batch, 1)[0] is batch
    batch = padded(3, 5)
    (whole,) = micro_batches(batch, None)
    assert whole is batch
    packed = {"input_ids": torch.ones(1, 9), "position_ids": torch.arange(9)[None]}
    assert micro_batches(packed, 1) == [packed]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_in_parts_is_training_on_the_batch(tmp_path, accumulated, checkpointing):
    results = []
    for tokens in (None, 12, 1):
        model, made = fresh()
        keys = dict(gradient_accumulation_steps=accumulated, gradient_checkpointing=checkpointing, max_steps=3)
        config = sft_config(tmp_path, **keys)
        _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, config, micro_batch_tokens=tokens)
        results.append((losses(trained), model))
    for values, model in results[1:]:
        assert values == pytest.approx(results[0][0], rel=1e-5)
        assert differences(model, results[0][1]) < 1e-5


def test_a_loss_that_is_no_sum_over_tokens_is_not_taken_in_parts(tmp_path):
    """A model that takes no count of tokens, as Gemma 4 and much code of the hub: each part's loss would be a mean."""
    results = []
    for counts in (True, False):
        model, made = fresh()
        model.get_base_model().accepts_loss_kwargs = counts
        config = sft_config(tmp_path, max_steps=3)
        given = "auto" if not counts else None
        trainer, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, config, micro_batch_tokens=given)
        assert trainer.micro_batch_tokens is None
        results.append((losses(trained), model))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert differences(results[1][1], results[0][1]) < 1e-5
    with pytest.raises(lorapar.InputError, match="sft.micro_batch_tokens: got 12, but this model's loss is a mean"):
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, config, micro_batch_tokens=12)
    trainer.micro_batch_tokens = 1
    with pytest.raises(lorapar.InputError, match="sft.micro_batch_tokens: got 1, but this model's loss is a mean"):
        trainer.training_step(trainer.model, padded(3, 5), None)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("use_liger_kernel", "pip install 'lorapar[liger]'"),
        ("padding_free", "needs flash-attn, which is not installed"),
        ("activation_offloading", "needs a GPU, the model is on cpu"),
    ],
)
def test_a_switch_that_cannot_be_on_is_refused_with_the_remedy(changed_recipe, tmp_path, monkeypatch, key, says):
    monkeypatch.setattr("lorapar.memory.switches.importlib.util.find_spec", lambda name: None)
    refused(
        "run", changed_recipe(sft={key: True}), "--output_dir", tmp_path / "run", says=(f"sft.{key}", says), alone=True
    )
    assert not (tmp_path / "run").exists()


def test_smaller_parts_go_on_with_a_run_that_is_there(finished, changed_recipe):
    """As docs/memory.md says, and as the advice after running out of memory needs."""
    log = succeeds("run", changed_recipe(sft={"micro_batch_tokens": 64}), "--output_dir", finished)
    assert "sft: done before, skipped" in log
    assert "started" not in log


def test_vllm_is_asked_for_by_its_extra(changed_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lorapar.memory.switches.importlib.util.find_spec", lambda name: None)
    says = ("grpo.use_vllm: got true, but it needs vllm", "pip install 'lorapar[vllm]'")
    refused("run", changed_recipe(grpo={"use_vllm": True}), "--output_dir", tmp_path / "run", says=says, alone=True)


def test_doctor_names_each_switch():
    said = doctor().split("what runs on cuda")[0]
    for switch in (*SWITCHES, "sft.micro_batch_tokens"):
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [switch]]
        assert len(line.split()) > 1
    assert "512 tokens at once" in said


@needs_bnb
@pytest.mark.parametrize("way", ["ours", "trl"])
@pytest.mark.parametrize(("stage", "batch"), [("sft", 1), ("grpo", 4)])
def test_a_case_of_the_gpu_comparison_runs_at_a_small_shape(monkeypatch, way, stage, batch):
    small = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32000}  # fmt: skip
    monkeypatch.setitem(SHAPES, "small", small)
    given = {"way": way, "stage": stage, "model": "small", "base": "nf4", "batch": batch, "length": 64, "steps": 2}
    found = measure(Case(**given, prompt=32, trainer={"gradient_checkpointing": True}))
    assert len(found["losses"]) == 2
    assert found["tokens_per_second"] > 0
    assert found["peak_bytes_above_model"] > 0


@pytest.mark.slow
def test_losses_of_50_steps_are_those_of_trl_and_peft():
    """On the real model, with every switch that a CPU has on: recomputing, parts of a batch, answers' logits alone."""
    case = {"batch": 2, "length": 14, "prompt": 4, "steps": 50, "active": 1.0}
    theirs = measure(Case(way="trl", **case))
    ours = measure(Case(way="ours", **case, micro_batch_tokens=14, trainer={"gradient_checkpointing": True}))
    assert len(ours["losses"]) == 50
    # The rows are random tokens, seen once: the loss falls a little, and every step of it is compared.
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert max(theirs["losses"]) - min(theirs["losses"]) > 0.05
