"""The plan's work: steps as TRL counts them, tokens as the model sees them, operations as torch counts them; hours."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaModel

from lorapar.memory.advice import work_lines
from lorapar.memory.needs import Lengths, Row, cache_bytes, describe, lengths_of
from lorapar.memory.work import (
    AS_LIMITS,
    UNLABELLED,
    Passes,
    Rates,
    Work,
    decoded_bytes,
    flops,
    grpo_work,
    hours,
    sft_work,
    works,
)
from lorapar.model.locate import resolve
from lorapar.pipeline.running import labelled_rows
from lorapar.recipe.reading import load_recipe, parse
from lorapar.training.sft import micro_batches
from lorapar.training.trainer import PartitionedTrainer
from tests.architectures import make, save
from tests.tiny import TARGETS, tiny_model

from .driver import lorapar, recipe_values, refused, succeeds, write_recipe

ROOT = Path(__file__).parents[2]
OFF = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def recipe_of(folder, **sections):
    values = recipe_values(folder)
    for stage in ("sft", "grpo"):
        values[stage].pop("max_steps")
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return parse(values)


def lengths(count, system, prompt=5, whole=8):
    return Lengths(prompt, whole, "a test", tuple(Row(prompt, whole, system, "train") for _ in range(count)))


def reported(trainer):
    """The steps that TRL's trainer would take."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (10, {"per_device_train_batch_size": 4, "num_train_epochs": 1}),
        (10, {"per_device_train_batch_size": 4, "num_train_epochs": 1, "dataloader_drop_last": True}),
        (33, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3}),
        (33, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 0.5}),
        (3, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32}),
        (9, {"per_device_train_batch_size": 4, "max_steps": 7}),
        (9, {"per_device_train_batch_size": 2, "packing": True, "max_length": 20, "num_train_epochs": 1}),
    ],
)
def test_steps_of_sft_are_those_that_trl_reports(tiny, tiny_folder, tmp_path, rows, keys):
    ids = Dataset.from_dict({"input_ids": [[5] * 8] * rows, "labels": [[-100] * 5 + [5] * 3] * rows})
    config = trl.SFTConfig(output_dir=str(tmp_path), **OFF, **keys)
    trainer = trl.SFTTrainer(model=tiny[0], args=config, train_dataset=ids, processing_class=tiny[1])
    recipe = recipe_of(tiny_folder, sft={"per_device_train_batch_size": 8, **keys})
    assert sft_work(recipe, lengths(rows, 1), describe(recipe)).steps == reported(trainer)


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (10, {"num_generations": 4, "num_train_epochs": 1}),
        (11, {"num_generations": 2, "num_train_epochs": 2, "gradient_accumulation_steps": 3}),
        (10, {"num_generations": 4, "num_iterations": 3, "steps_per_generation": 2, "num_train_epochs": 1}),
        (13, {"num_generations": 2, "generation_batch_size": 8, "gradient_accumulation_steps": 4,
              "num_train_epochs": 1.5}),
        (10, {"num_generations": 4, "max_steps": 5}),
    ],
)  # fmt: skip
def test_steps_of_grpo_are_those_that_trl_reports(tiny, tiny_folder, tmp_path, rows, keys):
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **keys}
    config = trl.GRPOConfig(output_dir=str(tmp_path), max_completion_length=4, **OFF, **keys)
    prompts = Dataset.from_dict({"prompt": ["abcde"] * rows})
    trainer = trl.GRPOTrainer(model=tiny[0], reward_funcs=lambda completions, **_: [0.0] * len(completions),
                              args=config, train_dataset=prompts, processing_class=tiny[1])  # fmt: skip
    recipe = recipe_of(tiny_folder, grpo=keys)
    assert grpo_work(recipe, lengths(rows, 2), describe(recipe)).steps == reported(trainer)


def test_tokens_are_those_that_go_through_the_model(tiny_folder, tmp_path, monkeypatch):
    """In every stage of a run: rows without padding, whole completions, the policy's and the reference's
    log-probabilities taken apart, and generations that serve several steps."""
    values = recipe_values(tiny_folder)
    values["score"] = {"examples": 8, "batch_size": 3}
    for stage, keys in {
        "sft": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
                "max_steps": -1},
        "grpo": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 7,
                 "rollout_batch_size": 8, "generation_kwargs": {"min_new_tokens": 6}},
    }.items():  # fmt: skip
        values[stage] = {**values[stage], "longest_first": False, **keys}
    recipe_file = write_recipe(tmp_path / "r.yaml", values)
    recipe = load_recipe(recipe_file, [("output_dir", str(tmp_path / "run"))])
    model = describe(recipe)
    counted = {work.stage: work for work in works(recipe, lengths_of(recipe, labelled_rows(recipe)), model)}
    forward, seen = LlamaModel.forward, []

    def noting(self, input_ids=None, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), *input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", noting)
    # A look at a few tokens, whether the logits are finite, which the plan leaves out.
    monkeypatch.setattr(PartitionedTrainer, "check_finite", lambda *_: None)
    counts = {}
    for stage in ("label", "score", "partition", "sft", "grpo", "evaluate"):
        seen.clear()
        succeeds(stage, recipe_file, "--output_dir", tmp_path / "run")
        # Of two tokens: what the head is held against once. Scoring looks without gradients whether batches may be.
        counts[stage] = [(grad, rows, width) for grad, rows, width in seen if width != 2 and (grad or stage != "score")]

    def total(stage, chosen):
        return sum(rows * width for grad, rows, width in counts[stage] if chosen(grad, width))

    for stage, work in counted.items():
        # Scoring pads by less than a twentieth, which is not counted.
        off = work.trained.tokens / 20 if stage == "score" else 0.5
        assert total(stage, lambda grad, width: grad) == pytest.approx(work.trained.tokens, abs=off), stage
    for stage in ("grpo", "evaluate"):
        work = counted[stage]
        assert total(stage, lambda grad, width: not grad and width > 1) == pytest.approx(work.forward.tokens, abs=0.5)
    decoding = [rows for grad, rows, width in counts["grpo"] if not grad and width == 1]
    assert (sum(decoding), len(decoding)) == (counted["grpo"].decoded.tokens, counted["grpo"].decoding[0])
    assert 0 < total("evaluate", lambda grad, width: width == 1) <= counted["evaluate"].decoded.tokens
    # The same from the folder's own labels.
    assert list(counted.values()) == works(recipe, lengths_of(recipe, labelled_rows(recipe)), model)


def test_batches_in_parts_are_those_of_the_trainer(tiny_folder):
    widths = [random.Random(7).randint(3, 60) for _ in range(50)]
    rows = tuple(Row(2, width, 1, "train") for width in widths)
    recipe = recipe_of(tiny_folder, sft={"per_device_train_batch_size": 8, "micro_batch_tokens": 100})
    work = sft_work(recipe, Lengths(2, 60, "a test", rows), describe(recipe))
    order, there = random.Random(0).sample(widths, len(widths)), 0
    for start in range(0, len(order), 8):
        batch = order[start : start + 8]
        mask = torch.tensor([[1] * width + [0] * (max(batch) - width) for width in batch])
        there += sum(
            part["input_ids"].numel() for part in micro_batches({"input_ids": mask, "attention_mask": mask}, 100)
        )
    assert work.trained.tokens == pytest.approx(3 * there)


@pytest.mark.parametrize("recomputes", [False, True])
def test_operations_are_those_that_torch_counts(tiny_folder, recomputes):
    """A forward and backward of the tiny model under PEFT's LoRA, to within rotary embeddings."""
    recipe = recipe_of(tiny_folder, start="paper")
    model = describe(recipe)
    peft_model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=TARGETS))
    base = peft_model.get_base_model()
    base.set_attn_implementation("eager")
    base.enable_input_require_grads()
    if recomputes:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(3, 40, dtype=torch.long)
    passes = Passes(120, 3 * 40**2, 120)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peft_model.eval()(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(sum(flops(Work("grpo", forward=passes), model)), rel=0.005)
    with FlopCounterMode(display=False) as counter:
        peft_model.train()(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = sum(flops(Work("sft", trained=passes, recomputes=recomputes), model))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_of_experts_the_active_ones_are_counted(name, tmp_path):
    """Two of four, fused into one parameter or not."""
    save(name, tmp_path / name)
    recipe = recipe_of(tmp_path / name)
    found, made = describe(recipe), make(name)
    met = 0
    for path, parameter in made.named_parameters():
        if parameter.dim() >= 2 and "embed" not in path and "lm_head" not in path:
            met += parameter.numel() // (2 if ".experts." in path else 1)
    assert (found.met, found.all_experts) == (met, False)
    assert found.head == made.lm_head.weight.numel()


def test_experts_are_all_counted_where_the_configuration_does_not_say(tmp_path, monkeypatch):
    save("mixtral", tmp_path / "mixtral")
    monkeypatch.setattr("lorapar.adapter.targets._active_share", lambda model: None)
    recipe = recipe_of(tmp_path / "mixtral", lora={"r": 2})
    found = describe(recipe)
    assert found.all_experts
    assert work_lines([], found, Rates())[-2].startswith("every expert is counted for every token")


def test_decoding_reads_the_weights_as_they_are_held_and_the_cache(tiny_folder):
    recipe = recipe_of(tiny_folder, grpo={"max_steps": 1, "gradient_accumulation_steps": 2})
    model = describe(recipe)
    work = grpo_work(recipe, lengths(9, 2), model)
    # 8 completions of 6 tokens behind 5, five of them by steps that see 6 to 10 tokens.
    assert work.decoding[0] == 5
    cache = 8 * sum(range(6, 11)) * cache_bytes(model, 1, 1)
    table_of_words = tiny_model().get_input_embeddings().weight.nbytes  # not the head's too
    assert decoded_bytes(work, model) == 5 * (model.weights - table_of_words + 4 * model.elements) + cache
    four = describe(recipe_of(tiny_folder, lora={"r": 4, "base": "nf4"}))
    assert decoded_bytes(work, four) < decoded_bytes(work, model)


def test_hours_are_operations_by_the_rate_and_decoding_the_longer_of_two(tiny_folder):
    recipe = recipe_of(tiny_folder, grpo={"max_steps": 3})
    model = describe(recipe)
    work = grpo_work(recipe, lengths(9, 2), model)
    dense, decoding = flops(work, model)
    reading = decoded_bytes(work, model)
    assert hours(work, model, Rates()) == (None, None)
    assert hours(work, model, Rates(tflops=2)) == (pytest.approx(dense / 2e12 / 3600), None)
    assert hours(work, model, Rates(gbytes=3)) == (None, pytest.approx(reading / 3e9 / 3600))
    assert hours(work, model, Rates(2, 3)) == (pytest.approx(dense / 2e12 / 3600), pytest.approx(reading / 3e9 / 3600))
    slow = 1e-9 * decoding / reading
    assert hours(work, model, Rates(slow, 3))[1] == pytest.approx(decoding / (slow * 1e12) / 3600)
    # No decoding takes no time, whatever is said.
    assert hours(dataclasses.replace(work, decoded=Passes(), decoding=(0, 0)), model, Rates(2))[1] == 0


def test_what_grpo_takes_apart_adds_passes(tiny_folder):
    def looked(**keys):
        recipe = recipe_of(tiny_folder, grpo={"beta": 0.0, "max_steps": 4, **keys})
        return grpo_work(recipe, lengths(9, 2), describe(recipe)).forward.tokens

    assert looked() == 4 * 4 * 5
    assert looked(beta=0.1) == looked() + 4 * 4 * 11
    # Generated for two steps, a completion is of an older policy in the second.
    assert looked(num_iterations=2) == 2 * 4 * (5 + 11)
    assert looked(steps_per_generation=2) == 4 * 4 * (5 + 11)


def test_unlabelled_rows_bound_the_work(tiny_folder):
    """A probe asks the model, so a plan does not label: no stage has more than all rows."""
    labelled = recipe_of(tiny_folder)
    unlabelled = recipe_of(tiny_folder, label={"voters": ["probe"]})
    assert labelled_rows(unlabelled) is None
    exact, bound = (works(r, lengths_of(r, labelled_rows(r)), describe(r)) for r in (labelled, unlabelled))
    for less, more in zip(exact, bound):
        assert UNLABELLED in more.at_most
        assert UNLABELLED not in less.at_most
        assert less.rows <= more.rows
        assert less.steps <= more.steps
        assert sum(flops(less, describe(labelled))) <= sum(flops(more, describe(labelled)))
    assert f"score, sft, grpo, evaluate: {UNLABELLED}" in work_lines(bound, describe(unlabelled), Rates())


def test_data_elsewhere_is_bounded_by_limits_or_not_counted(tiny_folder):
    away = {"sources": [{"name": "somebody/elsewhere"}], "max_prompt_length": 20}
    steps = recipe_of(tiny_folder, data=away, sft={"max_steps": 5, "max_length": 50}, grpo={"max_steps": 6},
                      evaluate={"limit": 3})  # fmt: skip
    assert labelled_rows(steps) is None
    of_sft, of_grpo = works(steps, lengths_of(steps), describe(steps))[1:3]
    assert (of_sft.steps, of_sft.trained.tokens, of_grpo.steps) == (5, 5 * 4 * 50, 6)
    assert of_sft.rows is None
    assert AS_LIMITS in of_sft.at_most
    assert of_grpo.trained.tokens == 6 * 4 * (20 + 6)
    epochs = recipe_of(tiny_folder, data=away, sft={"max_length": 50})
    lines = work_lines(works(epochs, lengths_of(epochs), describe(epochs)), describe(epochs), Rates())
    assert any(line.startswith("sft, grpo, evaluate: how many rows there are is not known") for line in lines)
    assert re.fullmatch(r"sft( +\?){6}", lines[3])
    assert re.fullmatch(r"all +\?", lines[6])
    sized = {"sources": [{"name": "somebody/elsewhere", "size": 30}], "max_prompt_length": 20}
    counted = recipe_of(tiny_folder, data=sized, sft={"max_length": 50, "num_train_epochs": 1})
    assert works(counted, lengths_of(counted), describe(counted))[1].steps == 8


def test_a_data_sets_own_column_of_that_name_is_no_label(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "system": 1}\n')
    recipe = recipe_of(tiny_folder, data={"sources": [{"name": str(tmp_path / "rows.jsonl")}], "held_out": 0})
    assert lengths_of(recipe).rows[0].system is None


def test_the_verb_says_which_options_give_hours(recipe_file):
    code, out, err = lorapar("plan", recipe_file, "--vram", "100GB")
    assert code == 0, err
    assert "hours, say what the machine sustains: --tflops (TFLOP/s), --gbytes (GB/s, for decoding)" in out
    assert "compute h" not in out
    _, some, _ = lorapar("plan", recipe_file, "--vram", "100GB", "--tflops", "2.5")
    assert re.search(r"^sft .* \d\S*$", some, re.MULTILINE)
    assert re.search(r"^grpo .* \? +\?$", some, re.MULTILINE)
    assert "for all hours, say what the machine sustains: --gbytes (GB/s, for decoding)" in some
    _, out, _ = lorapar("plan", recipe_file, "--vram", "100GB", "--tflops=2.5", "--gbytes", "20")
    assert "say what the machine sustains" not in out
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Work of each stage"))
    assert all(len(line) <= 120 for line in lines[first:])
    for line in lines[first + 2 : first + 7]:
        *_, computing, decoding, whole = (float(cell.lstrip("≤").replace(",", "")) for cell in line.split()[1:])
        assert computing + decoding == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("option", ["tflops", "gbytes"])
@pytest.mark.parametrize("value", ["0", "-3", "fast", "nan", "inf", ""])
def test_what_is_no_rate_is_refused(recipe_file, option, value):
    refused("plan", recipe_file, f"--{option}={value}", says=(f"--{option}", f"got {value!r}", "above 0"), alone=True)


def test_misspelt_and_unfinished_options_are_refused(recipe_file):
    refused("plan", recipe_file, "--tflop", "3", says=("tflop",), alone=True)
    refused("plan", recipe_file, "--gbytes", says=("--gbytes",), alone=True)
    refused("run", recipe_file, "--tflops", "3", says=("--tflops",), alone=True)


def test_a_group_that_does_not_divide_a_generation_is_refused(tiny_folder):
    recipe = recipe_of(tiny_folder, grpo={"num_generations": 3})
    with pytest.raises(Exception, match="grpo.num_generations: got 3, which must divide the 4 completions"):
        grpo_work(recipe, lengths(9, 2), describe(recipe))


def test_plain_lora_scores_nothing(tiny_folder):
    recipe = recipe_of(tiny_folder, partition={"selection": "all"})
    assert works(recipe, lengths(9, 1), describe(recipe))[0] == Work("score", 0, 0)


@pytest.mark.slow
def test_the_page_s_table_of_llama_2_7b_on_gsm8k(gsm8k, tmp_path):
    """Of the recipe in examples/, with the model's configuration and no weights; SmolLM2's tokenizer stands in."""
    transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    transformers.AutoTokenizer.from_pretrained(resolve("smollm2-135m")).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    sources = [
        {"name": str(gsm8k / "train.jsonl"), "held_out": 0},
        {"name": str(gsm8k / "test.jsonl"), "held_out": True},
    ]
    recipe = load_recipe(ROOT / "examples" / "gsm8k_llama2_7b.yaml",
                         [("model.name", str(tmp_path)), ("data.sources", json.dumps(sources))])  # fmt: skip
    lengths = lengths_of(recipe, labelled_rows(recipe))
    # As on a machine with a GPU, where TRL's head makes its tiles again in the backward.
    model = dataclasses.replace(describe(recipe), device="cuda")
    lines = work_lines(works(recipe, lengths, model), model, Rates(tflops=300, gbytes=3000))
    assert "\n".join(line.rstrip() for line in lines) in (ROOT / "docs" / "memory.md").read_text()
