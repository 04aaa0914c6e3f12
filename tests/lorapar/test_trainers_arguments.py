"""The trainers take what TRL's take: a model by name or as a plain module, a peft_config, arguments by place."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOTrainer, SFTTrainer

import lorapar
from lorapar.adapter.attach import with_our_layers
from lorapar.adapter.layers import MaskedLinear, lora_parameters, masked_layers
from lorapar.errors import InputError
from lorapar.training.grpo import PartitionedGRPOTrainer
from lorapar.training.sft import PartitionedSFTTrainer
from tests.lorapar.test_adapter import random_partition
from tests.lorapar.test_layers import needs_bnb
from tests.lorapar.test_training import ROWS, grpo_config, letters, moved_outside, sft_config
from tests.tiny import TARGETS

KEYS = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
PROMPTS = ROWS.remove_columns("completion")


def made(kind, given, folder, adapter=KEYS, **keys):
    """(our trainer, TRL's) of the same arguments, by place as far as TRL has them."""
    config = sft_config if kind == "sft" else grpo_config
    rows = (ROWS.select_columns(["prompt", "completion"]),) if kind == "sft" else (PROMPTS,)
    rewards = () if kind == "sft" else (letters,)
    order = (None, rows[0]) if kind == "sft" else (rows[0],)
    classes = (PartitionedSFTTrainer, SFTTrainer) if kind == "sft" else (PartitionedGRPOTrainer, GRPOTrainer)
    return [
        cls(given(), *rewards, config(folder / cls.__name__, max_steps=2, **keys), *order, peft_config=adapter)
        for cls in classes
    ]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("form", ["name", "module"])
def test_an_adapter_is_made_and_started_as_trl_s_is(kind, form, tiny_folder, tmp_path):
    def given():
        return str(tiny_folder) if form == "name" else AutoModelForCausalLM.from_pretrained(tiny_folder)

    ours, theirs = made(kind, given, tmp_path)
    assert all(type(layer) is MaskedLinear for layer in masked_layers(ours.model).values())
    assert KEYS._custom_modules is None
    factors, expected = lora_parameters(ours.model), lora_parameters(theirs.model)
    assert factors.keys() == expected.keys()
    # A start drawn by torch's generator, seeded by TRL.
    assert all(torch.equal(factors[name], tensor) for name, tensor in expected.items())
    ours.partition = random_partition(ours.model, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in factors.items()}
    ours.train()
    assert moved_outside(ours.model, before, ours.partition, kind) == 0
    masks = ours.partition.active(kind)
    moved = sum(int(((p.detach() != before[n]) & masks[n]).sum()) for n, p in lora_parameters(ours.model).items())
    assert moved > 0


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_every_element_active_trains_as_trl_s_trainer_does(kind, tiny_folder, tmp_path):
    ours, theirs = made(kind, lambda: str(tiny_folder), tmp_path)
    ours.partition = random_partition(ours.model, 1.1)
    ours.train()
    theirs.train()
    one, other = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)
    )
    assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_without_a_partition_training_is_refused_in_one_line(kind, tiny_folder, tmp_path):
    ours = made(kind, lambda: str(tiny_folder), tmp_path)[0]
    with pytest.raises(InputError, match=rf"partition: none is set, .* or train with lorapar.{kind}"):
        ours.train()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, "the model has no LoRA layer; attach an adapter first"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "got IA3Config"),
        (LoraConfig(r=4, use_dora=True), "lora.use_dora: not supported"),
        (LoraConfig(r=4, init_lora_weights="pissa"), "lora.init_lora_weights: got 'pissa', which changes the base"),
    ],
    ids=["none", "ia3", "dora", "pissa"],
)
def test_an_adapter_that_is_not_ours_is_refused_at_once(adapter, message, tiny_folder, tmp_path):
    with pytest.raises(InputError, match=message):
        PartitionedSFTTrainer(
            str(tiny_folder), args=sft_config(tmp_path), train_dataset=ROWS.select(range(4)), peft_config=adapter
        )


def test_a_model_with_peft_s_own_layers_is_refused_with_the_remedy(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(InputError, match="has a LoRA layer of PEFT's own; attach the adapter with lorapar.attach"):
        PartitionedSFTTrainer(
            get_peft_model(model, KEYS), args=sft_config(tmp_path), train_dataset=ROWS, processing_class=tokenizer
        )


def test_an_attached_model_is_taken_as_before(tiny_folder, tmp_path):
    model = lorapar.attach(AutoModelForCausalLM.from_pretrained(tiny_folder), KEYS, start="twin")
    rows = ROWS.select_columns(["prompt", "completion"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = PartitionedSFTTrainer(model, sft_config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    assert trainer.model is model
    assert with_our_layers(KEYS) is not KEYS


@needs_bnb
def test_a_model_by_name_in_four_bits_computes_as_ours_do_and_trains_in_fp32(tiny_folder, tmp_path):
    from lorapar.adapter.layers_bnb import MaskedLinear4bit

    trainer = PartitionedSFTTrainer(
        str(tiny_folder),
        sft_config(tmp_path, max_steps=2, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=ROWS.select_columns(["prompt", "completion"]),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=KEYS,
    )
    layers = masked_layers(trainer.model).values()
    assert all(type(layer) is MaskedLinear4bit and "forward" in layer.base_layer.__dict__ for layer in layers)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(trainer.model).values())
    trainer.partition = random_partition(trainer.model, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(trainer.model).items()}
    trainer.train()
    assert moved_outside(trainer.model, before, trainer.partition, "sft") == 0
