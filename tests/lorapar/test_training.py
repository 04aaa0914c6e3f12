"""Both stages on TRL's trainers: what moves, what does not, accumulation, autocast, resuming, the reference."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import GRPOConfig, SFTConfig

import lorapar
import lorapar_kernels as lk
from lorapar.adapter.attach import load_adapter, save_adapter
from lorapar.adapter.layers import lora_parameters, masked_layers
from lorapar.adapter.proof import FrozenElementsChanged
from lorapar.errors import InputError
from lorapar.progress import TrainingProgress
from lorapar.training.trainer import CHOICES, last_checkpoint, save_stage, take_choices
from lorapar_kernels import lora_product
from tests.lorapar.test_adapter import TOKENS, config, logits, random_partition
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = Dataset.from_list(
    [
        {"prompt": f"{i}+{j}=", "completion": str(i + j), "answer": str(i + j), "system": 1 + (i + j) % 2}
        for i in range(8)
        for j in range(6)
    ]
)


def fresh(start="twin", share=0.4, dtype=torch.float32):
    model = lorapar.attach(tiny_model().to(dtype), config(), start=start)
    return model, random_partition(model, share)


def sft_config(folder, **keys):
    defaults = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
                    weight_decay=0.1, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
                    use_cpu=True)  # fmt: skip
    return SFTConfig(**(defaults | keys))


def grpo_config(folder, **keys):
    defaults = dict(output_dir=str(folder), max_steps=3, per_device_train_batch_size=8, num_generations=4,
                    max_completion_length=4, learning_rate=1e-2, weight_decay=0.1, bf16=False,
                    gradient_checkpointing=False, logging_steps=1, save_strategy="no", use_cpu=True)  # fmt: skip
    return GRPOConfig(**(defaults | keys))


def letters(completions, **_):
    """A dense reward that random text earns: the share of low bytes."""
    return [sum(ord(c) < 100 for c in text) / max(len(text), 1) for text in completions]


def losses(trained):
    return [entry["loss"] for entry in trained.history if "loss" in entry]


def learnt(trained):
    """The last quarter's mean loss is below the first quarter's."""
    values = losses(trained)
    quarter = len(values) // 4
    return sum(values[-quarter:]) < sum(values[:quarter])


def differences(one, two):
    pairs = zip(lora_parameters(one).values(), lora_parameters(two).values())
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def moved_outside(model, before, made, stage):
    masks = made.active(stage)
    return sum(int(((p.detach() != before[n]) & ~masks[n]).sum()) for n, p in lora_parameters(model).items())


def test_sft_moves_every_active_element_and_no_other(tmp_path):
    model, made = fresh()
    before = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=24))
    assert moved_outside(model, before, made, "sft") == 0
    active = sum(int(m.sum()) for m in made.active("sft").values())
    tensors = len(before)
    assert trained.verified == {"active": active, "moved": active, "tensors": tensors, "tensors_moved": tensors}
    assert trained.optimizer_state_bytes == 8 * active
    assert trained.rows == ROWS["system"].count(1)
    assert learnt(trained)


def test_grpo_moves_active_elements_and_no_other(tmp_path):
    model, made = fresh()
    before = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    _, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, beta=0.04), [letters])
    assert moved_outside(model, before, made, "grpo") == 0
    assert trained.verified["moved"] > 0.9 * trained.verified["active"]
    assert trained.optimizer_state_bytes == 8 * trained.verified["active"]


def test_reference_is_the_adapter_as_it_came(tmp_path):
    """With β ≠ 0 the first step's KL is zero against stage 1's adapter; against the base it would not be."""
    model, made = fresh(start="paper")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    came = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    trainer, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, beta=0.04), [letters])
    kl = [entry["kl"] for entry in trained.history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-6
    for name, before in came.items():
        assert torch.equal(trainer.model.get_parameter(name.replace(".default.", ".ref.")), before)


def test_accumulation_of_eight_times_one_equals_one_times_eight(tmp_path):
    results = []
    for batch, steps in ((8, 1), (1, 8)):
        model, made = fresh()
        keys = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=3)
        _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
        results.append((losses(trained), model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert differences(results[0][1], results[1][1]) < 1e-4


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        model, made = fresh()
        keys = dict(gradient_checkpointing=on)
        _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
        results.append((losses(trained), model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert differences(results[0][1], results[1][1]) < 1e-5


def test_clipping_is_by_the_norm_of_active_gradients(tmp_path, monkeypatch):
    """As the optimizer is handed them: unclipped they have the norm that was logged, clipped the norm asked for."""
    seen = []

    def before_the_step(self, args, state, control, model=None, **_):
        seen.append({n: p.grad.clone() for n, p in lora_parameters(model).items()})

    monkeypatch.setattr(TrainingProgress, "on_pre_optimizer_step", before_the_step)
    logged = []
    for limit in (1e-3, 1e9):
        model, made = fresh()
        _, trained = lorapar.sft(
            model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_grad_norm=limit, max_steps=1)
        )
        logged.append(next(e["grad_norm"] for e in trained.history if "grad_norm" in e))
    masks = made.active("sft")
    norms = [torch.cat([grads[n][masks[n]] for n in masks]).norm().item() for grads in seen]
    assert norms == pytest.approx([1e-3, logged[1]], rel=1e-4)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert logged[1] > 1e-2
    assert not any(bool(grads[n][~masks[n]].any()) for grads in seen for n in masks)
    # What an adapter without masks would be clipped by is another norm.
    plain, _ = fresh()
    loss = plain(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    whole = torch.cat([p.grad.reshape(-1) for p in lora_parameters(plain).values()]).norm()
    part = torch.cat([p.grad[masks[n]] for n, p in lora_parameters(plain).items()]).norm()
    assert part < 0.95 * whole


@pytest.mark.parametrize("start", ["paper", "twin"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_after_a_trainer_disabling_merging_and_unmerging_are_exact(tmp_path, stage, start):
    expected = logits(tiny_model())
    model, made = fresh(start=start)
    if stage == "sft":
        trainer, _ = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path))
    else:
        trainer, _ = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, beta=0.04), [letters])
    trained = logits(model)
    assert (trained - expected).abs().max() > 0.01
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with trainer.model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), trained)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), trained, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    if any(layer.merged for layer in masked_layers(model).values()):
        model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_trains_fp32_factors(tmp_path, dtype):
    model, made = fresh(dtype=dtype)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, bf16=True, max_steps=24))
    assert learnt(trained)
    assert trained.verified["moved"] > 0.99 * trained.verified["active"]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_resumed_equals_uninterrupted(tmp_path, stage):
    """Four steps in one go; and two, a new process's worth of loading, and two more."""
    keys = dict(save_strategy="steps", save_steps=2, max_steps=4, seed=3)

    def run(model, made, folder, **extra):
        if stage == "sft":
            return lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(folder, **(keys | extra)), resume=True)
        settings = grpo_config(folder, beta=0.04, **(keys | extra))
        return lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters], resume=True)

    whole, made = fresh()
    run(whole, made, tmp_path / "whole")
    cut, made = fresh()
    # The learning rate falls to zero at max_steps, so the interrupted run is told the same end and stopped before it.
    (tmp_path / "cut").mkdir()
    source = tmp_path / "whole" / "checkpoint-2"
    source.rename(tmp_path / "cut" / "checkpoint-2")
    again, _ = fresh()
    _, trained = run(again, made, tmp_path / "cut")
    assert trained.resumed_from == "checkpoint-2"
    assert trained.verified["moved"] > 0
    assert differences(whole, again) < 1e-6
    assert differences(whole, cut) > 1e-4


@pytest.fixture
def chosen(monkeypatch):
    """What a GPU has had chosen for it; and what is chosen in another process, which has chosen nothing yet."""
    monkeypatch.setattr(lora_product, "_chosen", {})
    monkeypatch.setattr(lora_product, "_given", {})
    choices = {"H100": {"forward bfloat16 512+ tokens 64x64+64x8:float32": "fused"}}

    def another_process():
        lora_product._given.clear()
        assert lk.product_choices() == {}

    lk.set_product_choices(choices)
    return choices, another_process


def test_the_products_chosen_go_with_the_checkpoints_and_are_taken_on_resuming(tmp_path, chosen, monkeypatch):
    choices, another_process = chosen
    model, made = fresh()
    keys = dict(save_strategy="steps", save_steps=2)
    lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=2, **keys))
    assert json.loads((tmp_path / CHOICES).read_text()) == choices
    another_process()
    again, _ = fresh()
    _, trained = lorapar.sft(again, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys), resume=True)
    assert trained.resumed_from == "checkpoint-2"
    assert lk.product_choices() == choices
    # A new start takes none; nor is a run that ends within a checkpoint without its record.
    another_process()
    lorapar.sft(fresh()[0], tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=1))
    assert lk.product_choices() == {}
    lk.set_product_choices(choices)
    (tmp_path / CHOICES).unlink()

    def ends(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "on_save", ends)
    with pytest.raises(KeyboardInterrupt):
        lorapar.sft(fresh()[0], tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=2, **keys))
    assert json.loads((tmp_path / CHOICES).read_text()) == choices


@pytest.mark.parametrize("text", ["{", "[]", '{"H100": {"kind": "cublas"}}', '{"H100": 1}', "\\ud800"])
def test_a_file_that_is_no_record_of_choices_costs_a_line_of_the_log(tmp_path, chosen, text, caplog):
    another_process = chosen[1]
    another_process()
    (tmp_path / CHOICES).write_text(text)
    with caplog.at_level("WARNING", "lorapar"):
        take_choices(tmp_path)
    assert lk.product_choices() == {}
    assert len(caplog.records) == 1
    assert f"{CHOICES}: passed over, products are timed again" in caplog.text


def test_where_nothing_was_chosen_nothing_is_written(tmp_path):
    assert lk.product_choices() == {}
    model, made = fresh()
    settings = sft_config(tmp_path, save_strategy="steps", save_steps=2)
    lorapar.sft(model, tiny_tokenizer(), ROWS, made, settings, resume=True)
    assert not list(tmp_path.rglob(CHOICES))


def test_checkpoints_carry_the_partition_and_load_with_plain_peft(tmp_path):
    model, made = fresh()
    keys = dict(save_strategy="steps", save_steps=2)
    lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
    folder = tmp_path / "checkpoint-4"
    assert lorapar.Partition.load(folder / "lorapar_partition.safetensors").hash == made.hash
    assert json.loads((folder / "lorapar.json").read_text())["partition"] == made.hash
    names = set(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    assert names == set(config().target_modules)
    assert "lora-par" in (tmp_path / "README.md").read_text()
    assert "2507.20999" in (tmp_path / "README.md").read_text()


def test_a_checkpoint_of_another_partition_is_refused(tmp_path):
    model, made = fresh()
    keys = dict(save_strategy="steps", save_steps=2)
    lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
    again, _ = fresh()
    other = random_partition(again, seed=5)
    with pytest.raises(InputError, match="checkpoint-4: made with partition"):
        lorapar.sft(again, tiny_tokenizer(), ROWS, other, sft_config(tmp_path, **keys), resume=True)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    model, made = fresh()
    keys = dict(save_strategy="steps", save_steps=2)
    trainer, _ = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
    assert last_checkpoint(tmp_path, trainer, made).name == "checkpoint-4"
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_checkpoint(tmp_path, trainer, made).name == "checkpoint-2"
    state.unlink()
    assert last_checkpoint(tmp_path, trainer, made).name == "checkpoint-2"


def test_saved_stage_holds_only_what_vllm_and_peft_know(tmp_path, tiny_folder):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = lorapar.attach(AutoModelForCausalLM.from_pretrained(tiny_folder), config(), start="twin")
    made = random_partition(model)
    settings = grpo_config(tmp_path / "grpo", beta=0.04)
    trainer, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters])
    save_stage(trainer, tmp_path / "grpo", {"stage": "grpo"}, trained)
    names = load_file(tmp_path / "grpo" / "adapter_model.safetensors")
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)
    assert not (tmp_path / "grpo" / "ref").exists()
    back = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "grpo")
    assert differences(back, model) == 0


def test_both_stages_in_turn_keep_the_first_s_only_elements(tmp_path):
    """S1-only elements end stage 2 as stage 1 left them."""
    model = lorapar.attach(tiny_model(), config(), start="twin")
    flags = [random_partition(model, 0.5, seed).active("sft") for seed in (0, 1)]
    made = lorapar.Partition({"s1": flags[0], "s2": flags[1], "sft": flags[0], "grpo": flags[1]}, {"theta": 0.9})
    lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path / "sft"))
    middle = copy.deepcopy({n: p.detach() for n, p in lora_parameters(model).items()})
    save_adapter(model, tmp_path / "middle", start="twin")
    lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path / "grpo"), [letters])
    for name, parameter in lora_parameters(model).items():
        only = flags[0][name] & ~flags[1][name]
        assert torch.equal(parameter[only], middle[name][only])


def test_long_rows_are_left_out_and_counted(tmp_path):
    model, made = fresh()
    rows = ROWS.select_columns(["prompt", "completion", "answer"]).to_list()
    rows.append({"prompt": "x" * 60, "completion": "y", "answer": "y"})
    _, trained = lorapar.sft(
        model, tiny_tokenizer(), Dataset.from_list(rows), made, sft_config(tmp_path, max_length=32)
    )
    assert trained.left_out == {"longer_than_max_length": 1}
    assert trained.rows == len(rows) - 1
    with pytest.raises(InputError, match="sft.max_length: got 2, shorter than every row"):
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_length=2))


def test_no_row_of_the_system_is_refused(tmp_path):
    model, made = fresh()
    with pytest.raises(InputError, match="no train row is labelled System 2"):
        lorapar.grpo(
            model, tiny_tokenizer(), ROWS.filter(lambda r: r["system"] == 1), made, grpo_config(tmp_path), [letters]
        )


def test_a_learning_rate_that_moves_nothing_is_found_out(tmp_path):
    model, made = fresh()
    with pytest.raises(FrozenElementsChanged, match="not one of"):
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, learning_rate=1e-30, weight_decay=0.0))


def test_dropout_is_in_the_layers_and_off_in_evaluation(tmp_path):
    model = lorapar.attach(tiny_model(), config(lora_dropout=0.4), start="paper")
    layer = next(iter(masked_layers(model).values()))
    x = torch.randn(4, 64)
    model.train()
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))
    assert math.isclose(layer.lora_dropout["default"].p, 0.4)


@pytest.mark.parametrize(
    ("rate", "steps", "where"),
    [(1e30, 3, "step 2 of 3: the loss is nan"), (1e30, 1, "after step 1: the model's logits are not finite")],
)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_learning_rate_that_ends_in_numbers_that_are_not_finite_is_named(tmp_path, stage, rate, steps, where):
    model, made = fresh()
    keys = dict(learning_rate=rate, max_steps=steps, logging_steps=100)
    settings, rewards = (sft_config, []) if stage == "sft" else (grpo_config, [[letters]])
    with pytest.raises(InputError) as refused:
        getattr(lorapar, stage)(model, tiny_tokenizer(), ROWS, made, settings(tmp_path, **keys), *rewards)
    # Stage 2 meets it where it generates.
    where = "after step 1: the model's logits" if stage == "grpo" else where
    assert str(refused.value).startswith(f"{stage}.learning_rate: got {rate:g}: {where}"), refused.value


def test_one_gradient_that_is_not_a_number_ends_training_before_it_is_used(tmp_path):
    model, made = fresh()
    parameter = list(lora_parameters(model).values())[3]
    seen = []
    parameter.register_hook(lambda g: g * float("nan") if len(seen) == 2 else seen.append(0))
    with pytest.raises(InputError, match="the norm of the gradients is nan .* or a max_grad_norm above 0, such as 1$"):
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=6, max_grad_norm=0))
    assert all(p.isfinite().all() for p in lora_parameters(model).values())


def test_a_model_that_is_not_finite_is_not_blamed_on_the_learning_rate(tmp_path):
    model, made = fresh()
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"model.name: sft: step 1 of 3: the loss is nan before anything was trained"):
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=3))


def test_a_checkpoint_whose_weights_are_not_finite_is_neither_written_nor_gone_on_from(tmp_path):
    model, made = fresh()
    keys = dict(save_strategy="steps", save_steps=1)
    trainer, _ = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, max_steps=2, **keys))
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("inf")
    save_file(weights, path)
    assert last_checkpoint(tmp_path, trainer, made).name == "checkpoint-1"
    again, _ = fresh()
    wild = sft_config(tmp_path / "wild", learning_rate=1e30, weight_decay=1e10, **keys)
    with pytest.raises(InputError, match="after step 1: a weight of the adapter is not finite"):
        lorapar.sft(again, tiny_tokenizer(), ROWS, made, wild)
    assert not list(tmp_path.glob("wild/checkpoint-*"))
