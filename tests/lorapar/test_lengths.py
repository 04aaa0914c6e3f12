"""Rows that are too long, for a limit of the recipe or for the model's positions: said with their number, never cut."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MptConfig, Qwen2_5_VLConfig

import lorapar
from lorapar import InputError
from lorapar.model.generate import answer_greedily
from lorapar.model.positions import positions_of
from tests.lorapar.driver import records, refused, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_tokens import run_recipe, user
from tests.lorapar.test_training import grpo_config, letters, sft_config
from tests.tiny import chat_tokenizer, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, logger="lorapar")


def short(positions=64):
    """A model with so many positions, with its adapter."""
    base = tiny_model()
    base.config.max_position_embeddings = positions
    return lorapar.attach(base, config(), start="twin")


def rows(*lengths):
    return Dataset.from_list([{"id": f"r{n}", "prompt": "a" * n, "completion": "b", "answer": "1"} for n in lengths])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LlamaConfig(max_position_embeddings=99), 99),
        # What the scaling is of stands beside it.
        (LlamaConfig(max_position_embeddings=99, rope_parameters={"rope_type": "linear", "factor": 4.0,
                                                                  "rope_theta": 1e4}), 99),
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=55), 55),
        (Qwen2_5_VLConfig(text_config={"max_position_embeddings": 44}), 44),
        (MambaConfig(), None),
        (BloomConfig(), None),
        (None, None),
    ],
)  # fmt: skip
def test_positions_by_the_configuration(given, expected):
    assert positions_of(given) == expected


def test_sft_says_how_many_rows_it_leaves_out(tmp_path, caplog):
    """TRL cuts them in silence, and the count was in a file alone."""
    data, tokenizer = rows(5, 10, 40, 90), tiny_tokenizer()
    for limit, positions, says, left in (
        (20, 64, "2 of 4 rows to train on left out: longer than sft.max_length: 20 tokens; raise it", 2),
        (None, 64, "1 of 4 rows to train on left out: longer than the model's positions: 64 tokens", 1),
        (1024, 64, "1 of 4 rows to train on left out: longer than the model's positions: 64 tokens", 1),
    ):
        model = short(positions)
        caplog.clear()
        settings = sft_config(tmp_path, max_steps=1, max_length=limit)
        made = random_partition(model, 0.4)
        trainer, trained = lorapar.sft(model, tokenizer, data, made, settings, longest_first=False)
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == "lorapar"] == [
            f"sft: {says}{'' if limit != 20 else ' to keep them'}"
            f"{'; no key changes that' if limit != 20 else ''} (the longest has 92)"
        ]
        assert trained.left_out == {"longer_than_max_length": left}
        assert max(map(len, trainer.train_dataset["input_ids"])) <= min(limit or 64, 64)
    settings = sft_config(tmp_path, packing=True, packing_strategy="wrapped", max_length=128)
    with pytest.raises(
        InputError, match="sft.max_length: got 128, expected at most the model's 64 positions with packing"
    ):
        lorapar.sft(short(), tokenizer, data, made, settings)
    settings = sft_config(tmp_path)
    with pytest.raises(InputError, match="model.name: its positions are 4, shorter than every row"):
        lorapar.sft(short(4), tokenizer, data, made, settings)


def test_scoring_refuses_them_with_their_number():
    data, tokenizer = rows(5, 40, 90), tiny_tokenizer()
    says = r"row r90: 92 tokens, more than score.max_length 20 \(2 of 3 rows are longer\); raise it"
    with pytest.raises(InputError, match=says):
        lorapar.score(short(), tokenizer, data, max_length=20)
    with pytest.raises(InputError, match=r"row r90: 92 tokens, more than the model's positions 64 \(1 of 3 rows"):
        lorapar.score(short(), tokenizer, data, max_length=200)


def test_grpo_leaves_out_prompts_without_room_for_a_completion(tmp_path, caplog):
    model, data, tokenizer = short(), rows(5, 6, 7, 8, 61, 90), tiny_tokenizer()
    settings = grpo_config(tmp_path, max_steps=1)
    made = random_partition(model, 0.4)
    trainer, trained = lorapar.grpo(model, tokenizer, data, made, settings, [letters], longest_first=False)
    said = caplog.text
    assert "grpo: 2 of 6 rows left out: grpo.max_completion_length: 4 tokens behind the prompt are more than" in said
    assert "lower it to keep them (the longest prompt has 90 tokens)" in caplog.text
    assert trained.left_out == {"no_room_for_a_completion": 2}
    assert trainer.train_dataset["id"][:] == ["r5", "r6", "r7", "r8"]
    settings = grpo_config(tmp_path, max_completion_length=60)
    with pytest.raises(InputError, match="for each of 6 rows; lower it to at most 59"):
        lorapar.grpo(model, tokenizer, data, made, settings, [letters])


def test_an_answer_ends_with_the_models_positions(caplog):
    """The same whatever the batch, and no other answer is cut for it."""
    model, tokenizer = short().eval(), tiny_tokenizer()
    ids = [[9] * n for n in (5, 58, 61, 58)]
    each = [answer_greedily(model, tokenizer, [prompt], 8, 1)[0] for prompt in ids]
    assert answer_greedily(model, tokenizer, ids, 8, 3) == each
    with torch.no_grad():
        seen = []
        forward = model.generate

        def counted(**kwargs):
            seen.append((kwargs["input_ids"].shape[1], kwargs["max_new_tokens"]))
            return forward(**kwargs)

        model.generate = counted
        answer_greedily(model, tokenizer, ids, 8, 3)
    assert seen == [(61, 3), (58, 6), (5, 8)]
    with pytest.raises(InputError, match="a prompt has 64 tokens, and the model's 64 positions leave none to answer"):
        answer_greedily(model, tokenizer, [[9] * 64], 8, 1)
    result = lorapar.evaluate(model, tokenizer, rows(5, 61, 90), max_new_tokens=8)
    assert result["n"] == {"all": 2}
    assert "evaluate: 1 of 3 rows left out: their prompt takes all of the model's 64 positions" in caplog.text
    assert "evaluate: 1 of 2 prompts leave fewer of the model's 64 positions than evaluate.max_new_tokens: 8" in (
        caplog.text
    )


def test_a_recipes_rows_are_left_out_once_and_said(tmp_path, monkeypatch):
    """Before any teacher is asked, by the configuration alone."""
    turns = [{"messages": [user(f"Q{i}" + "x" * (3000 if i < 3 else 0)), {"role": "assistant", "content": str(i)}],
              "answer": str(i), "sys": 1 + i % 2} for i in range(28)]  # fmt: skip
    recipe = run_recipe(tmp_path, chat_tokenizer(), turns)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["max_position_embeddings"] = 256
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("lorapar.model.load.load_model", None)
    folder = tmp_path / "run"
    log = succeeds("label", recipe, "--output_dir", folder)
    assert log.count("rows left out") == 1
    assert ("data: 3 of 28 rows left out: longer with their completion than the model's positions: 256 tokens "
            "(model.name)") in log  # fmt: skip
    source = next(iter(records(folder)["label"]["sources"].values()))
    assert (source["read"], source["too_long"], source["train"] + source["held_out"]) == (28, 3, 25)
    log = succeeds("label", recipe, "--output_dir", tmp_path / "two", "--data.max_prompt_length", 31)
    assert "rows left out: their prompt is longer than data.max_prompt_length: 31 tokens; raise it to keep them" in log
    says = "grpo.max_completion_length: got 256, expected less than the model's 256 positions"
    words = "run", recipe, "--output_dir", tmp_path / "three", "--grpo.max_completion_length", 256
    refused(*words, alone=True, says=(says,))
    assert not (tmp_path / "three").exists()
