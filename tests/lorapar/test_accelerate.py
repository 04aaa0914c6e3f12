"""`lorapar_kernels.accelerate` and `restore`: PEFT's own models with our layers in the place of theirs, and back."""

import copy
import functools
import importlib.util
import io
import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import Linear
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOTrainer, SFTTrainer

import lorapar
import lorapar_kernels as lk
from lorapar_kernels.peft_layers import FastLayer, FastLinear
from lorapar_kernels.siblings import SHARED
from tests.lorapar.test_training import ROWS, grpo_config, letters, sft_config
from tests.tiny import TARGETS, tiny_model, tiny_tokenizer

needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'lorapar[bnb]')",
)
KINDS = pytest.mark.parametrize(
    "kind", ["plain", pytest.param("nf4", marks=needs_bnb), pytest.param("int8", marks=needs_bnb)]
)
TOKENS = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(7))


def config(**keys):
    # B is random too, so that every gradient is there.
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False) | keys))


def base_of(kind, folder):
    if kind == "plain":
        return tiny_model()
    keys = {"load_in_8bit": True}
    if kind == "nf4":
        keys = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", quantization_config=BitsAndBytesConfig(**keys), device_map={"": "cpu"}
    )
    for module in model.modules():
        # PEFT's own layers cannot be compared after an evaluation that repacked their weights (AVX512-BF16).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def made(kind="plain", folder=None, **keys):
    torch.manual_seed(3)
    return get_peft_model(base_of(kind, folder), config(**keys)).train()


def step(model):
    """The loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(one, other, rel=1e-5):
    assert float((one[0] - other[0]).abs() / other[0]) < rel
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert float((one[1][name] - gradient).norm()) <= rel * float(gradient.norm()), name


def equal(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][n], g) for n, g in other[1].items())


def fast(model):
    return [name for name, module in model.named_modules() if isinstance(module, FastLayer)]


@KINDS
def test_loss_and_gradients_are_peft_s_and_restored_they_are_so_to_the_bit(kind, tiny_folder):
    model = made(kind, tiny_folder)
    parameters, names = list(model.parameters()), list(model.state_dict())
    before = step(model)
    assert lk.accelerate(model) is model
    assert len(fast(model)) == 2 * len(TARGETS)
    close(step(model), before)
    # From the second step on q, k and v are one op, whose weights share a buffer.
    close(step(model), before)
    assert model.base_model.model.model.layers[1].self_attn.q_proj._siblings.mode == SHARED
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters))
    assert lk.restore(model) is model
    assert not fast(model)
    assert equal(step(model), before)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_and_with_dropout(kind, reentrant, tiny_folder):
    """A recompute draws the bits that the first pass drew."""
    model = lk.accelerate(made(kind, tiny_folder, lora_dropout=0.3))
    model.enable_input_require_grads()
    torch.manual_seed(11)
    kept = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(11)
    close(step(model), kept, rel=1e-6 if kind == "plain" or not reentrant else 1e-5)
    torch.manual_seed(12)
    assert float((step(model)[0] - kept[0]).abs()) > 1e-4


@KINDS
def test_generation_and_evaluation(kind, tiny_folder):
    model = made(kind, tiny_folder).eval()

    def generated():
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits
            return logits, model.generate(input_ids=TOKENS[:, :5], max_new_tokens=9, do_sample=False)

    logits, tokens = generated()
    lk.accelerate(model)
    ours, our_tokens = generated()
    if kind == "int8":
        # bitsandbytes rounds x to eight bits as well in an evaluation (bnb_weights.py).
        assert 1e-4 < float((ours - logits).norm() / logits.norm()) < 0.05
    else:
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(our_tokens, tokens)
    with model.disable_adapter(), torch.no_grad():
        without = model(input_ids=TOKENS).logits
    lk.restore(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, without)
    assert torch.equal(generated()[0], logits)


@KINDS
def test_an_evaluation_between_leaves_a_gradient_and_the_weights(kind, tiny_folder):
    """bitsandbytes repacks 4-bit weights in evaluation on an AVX512-BF16 CPU, and then computes without autograd."""
    model = made(kind, tiny_folder, target_modules="all-linear")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    lk.accelerate(model)
    step(model)  # in which siblings are learned; from the next on they are one op
    before = step(model)
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    assert equal(step(model.train()), before)
    lk.restore(model)
    bases = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert all(base.support_avx512bf16_for_cpu for base in bases)
    assert (len(bases) > 0) == (kind == "nf4")


@KINDS
def test_saving_loading_and_the_adapter_s_state(kind, tiny_folder, tmp_path):
    model = lk.accelerate(made(kind, tiny_folder))
    state = get_peft_model_state_dict(model)
    before = step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(kind, tiny_folder), str(tmp_path), is_trainable=True).train()
    assert all(torch.equal(tensor, state[name]) for name, tensor in get_peft_model_state_dict(loaded).items())
    close(step(loaded), before)
    assert equal(step(lk.accelerate(loaded)), before)


@pytest.mark.filterwarnings("ignore")
@KINDS
def test_merging_is_peft_s(kind, tiny_folder):
    theirs, ours = made(kind, tiny_folder), lk.accelerate(made(kind, tiny_folder))
    for model in (theirs, ours):
        model.merge_adapter()
        model.unmerge_adapter()
    close(step(ours), step(theirs))
    alone = [model.merge_and_unload() for model in (theirs, ours)]
    assert all(torch.equal(a, b) for a, b in zip(alone[0].parameters(), alone[1].parameters()))
    assert not fast(alone[1])


def test_several_adapters_come_and_go():
    def played(model):
        outs = []
        model.add_adapter("other", config(r=3, target_modules=["q_proj", "o_proj"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".other." in name:
                nn.init.normal_(parameter, std=0.1)
        for active in ("other", ["default", "other"], "default"):
            model.base_model.set_adapter(active)
            outs.append(step(model))
        with torch.no_grad():
            mixed = model.eval()(input_ids=TOKENS, adapter_names=["default", "other", "__base__"]).logits
        model.train().delete_adapter("other")
        return [*outs, step(model)], mixed

    (theirs, their_mixed), (ours, our_mixed) = played(made()), played(lk.accelerate(made()))
    for one, other in zip(ours, theirs):
        close(one, other)
    torch.testing.assert_close(our_mixed, their_mixed, rtol=1e-5, atol=1e-5)
    # The layers that a later adapter makes are PEFT's until accelerate is called again.
    model = lk.accelerate(made())
    model.add_adapter("other", config(target_modules=["o_proj"]))
    assert not any("o_proj" in name for name in fast(model))
    assert any("o_proj" in name for name in fast(lk.accelerate(model)))


def test_every_form_of_a_model_with_lora_layers():
    mixed = get_peft_model(tiny_model(), config(), mixed=True)
    mixed.add_adapter("loha", LoHaConfig(r=2, target_modules=["q_proj", "o_proj"]))
    mixed.set_adapter(["default", "loha"])
    plain = inject_adapter_in_model(config(), tiny_model())
    for model in (mixed, plain):
        before = step(model)
        close(step(lk.accelerate(model)), before)
        assert len(fast(model)) == 2 * len(TARGETS)
        assert equal(step(lk.restore(model)), before)


def test_a_part_of_a_model_is_restored():
    model = made()
    before = step(model)
    step(lk.accelerate(model))
    lk.restore(model.base_model.model.model.layers[0].self_attn.k_proj)
    assert len(fast(model)) == 2 * len(TARGETS) - 1
    for _ in range(2):
        close(step(model), before)


def test_copies_and_pickles():
    model = lk.accelerate(made())
    before, file = step(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert len(fast(copied)) == 2 * len(TARGETS)
        assert equal(step(copied), before)
        assert not fast(lk.restore(copied))
    assert len(fast(model)) == 2 * len(TARGETS)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_with_fp32_factors_and_under_autocast(autocast):
    """x stays in bf16, where PEFT casts it up to the factors' fp32: as near to fp32 as bf16 comes."""
    model = made()
    exact = step(model)
    if not autocast:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = step(model)
        ours = step(lk.accelerate(model))
    for name, gradient in exact[1].items():
        assert ours[1][name].dtype == torch.float32
        error, their_error = ((found[1][name] - gradient).norm() / gradient.norm() for found in (ours, theirs))
        assert float(error) < max(2.0 * float(their_error), 0.06), name


def test_a_step_of_an_optimizer_that_was_there_before():
    theirs, ours = made(), made()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (theirs, ours)]
    lk.accelerate(ours)
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers):
            step(model)
            optimizer.step()
    close(step(ours), step(theirs), rel=1e-4)


def test_under_ddp(tmp_path):
    model = made()
    before = step(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            loss, found = step(lk.accelerate(wrapped))
            close((loss, {name.removeprefix("module."): gradient for name, gradient in found.items()}), before)
        assert len(fast(model)) == 2 * len(TARGETS)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_left_is_named_in_one_line(caplog):
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(30, 8), nn.Conv1d(8, 8, 3, padding=1)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, tokens):
            x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
            return self.second(self.first(x).relu())

    model = get_peft_model(Convolved(), LoraConfig(r=2, target_modules=["embed", "conv", "first", "second"]))
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["first"]))
    model.base_model.model.second.forward = functools.partial(model.base_model.model.second.forward)
    with caplog.at_level(logging.INFO, "lorapar_kernels"):
        lk.accelerate(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "accelerate: 1 LoRA layers compute with lorapar_kernels; left as PEFT's: 1 embed (PEFT's Embedding), "
        "1 conv (PEFT's Conv1d), 1 second (a forward of its own was put on it)"
    )
    tokens = torch.randint(30, (2, 5))
    model.set_adapter("dora")
    ours = model(tokens)
    torch.testing.assert_close(lk.restore(model)(tokens), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny_model(), "accelerate: the model has no LoRA layer; make one first"),
        (
            lambda: get_peft_model(tiny_model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
            "accelerate: the adapter 'default' is IA3; LoRA alone is computed here",
        ),
        (
            lambda: get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "accelerate: the adapter 'default' is PROMPT_TUNING; LoRA alone",
        ),
        (
            lambda: get_peft_model(tiny_model(), config(use_dora=True)),
            r"none of the model's LoRA layers can be taken over: 2 .*q_proj \(adapter 'default': Dora, a variant\), ",
        ),
        (
            lambda: get_peft_model(tiny_model(), config(lora_bias=True)),
            r"none of the model's LoRA layers .*q_proj \(adapter 'default': lora_bias\), ",
        ),
        (lambda: get_peft_model(tiny_model(), config(target_modules=["embed_tokens"])), "PEFT's Embedding"),
    ],
    ids=["none", "ia3", "prompt", "dora", "bias", "embedding"],
)
def test_what_has_nothing_to_accelerate_is_refused(model, says):
    given = model()
    kinds = [type(module) for module in given.modules()]
    with pytest.raises(ValueError, match=says):
        lk.accelerate(given)
    assert [type(module) for module in given.modules()] == kinds


def test_what_is_no_module_is_refused():
    for call in (lk.accelerate, lk.restore):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            call("model")


def test_twice_is_once_and_the_method_s_layers_stay(caplog):
    model = made()
    with caplog.at_level(logging.INFO, "lorapar_kernels"):
        lk.accelerate(lk.accelerate(model))
        attached = lorapar.attach(tiny_model(), config(init_lora_weights=True), start="twin")
        kinds = [type(module) for module in attached.modules()]
        lk.restore(lk.accelerate(attached))
    assert [record.getMessage() for record in caplog.records] == [
        "accelerate: 12 LoRA layers compute with lorapar_kernels",
        *["accelerate: nothing to do, all 12 LoRA layers compute with lorapar_kernels already"] * 2,
    ]
    assert [type(module) for module in attached.modules()] == kinds
    assert lk.restore(tiny_model()) is not None


def test_a_hook_of_accelerate_s_on_a_layer_calls_ours_and_then_peft_s():
    model, seen = made(), []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    class Seen(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module))
            return args, kwargs

    add_hook_to_module(layer, Seen())
    before = step(model)
    close(step(lk.accelerate(model)), before)
    assert len(fast(model)) == 2 * len(TARGETS)
    assert layer._old_forward.__func__ is FastLayer.forward
    assert equal(step(lk.restore(model)), before)
    assert layer._old_forward.__func__ is Linear.forward
    assert seen == [Linear, FastLinear, Linear]
    # The hook leaves the class's forward on the layer as it goes.
    lk.accelerate(model)
    remove_hook_from_module(layer)
    close(step(model), before)
    assert equal(step(lk.restore(model)), before)
    lk.accelerate(model)
    assert len(fast(model)) == 2 * len(TARGETS)
    close(step(model), before)


@needs_bnb
def test_a_weight_that_an_evaluation_repacked_is_left(tiny_folder, caplog):
    model = made("nf4", tiny_folder)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    lk.accelerate(model)
    assert "1 model.layers.*.mlp.up_proj (bitsandbytes repacked its 4-bit weight" in caplog.text
    assert type(layer) not in map(type, map(model.get_submodule, fast(model)))


def trained(stage, kind, folder, out, when):
    """What 20 steps of TRL's own trainer logged, and the adapter that they left; when: what accelerate is called on."""
    model = made(kind, folder)
    if when == "model":
        lk.accelerate(model)
    keys = dict(max_steps=20, learning_rate=1e-3, seed=5)
    tokenizer, rows = tiny_tokenizer(), ROWS.remove_columns("system")
    if stage == "sft":
        settings = sft_config(out, gradient_checkpointing=True, **keys)
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    else:
        settings = grpo_config(out, beta=0.04, **keys)
        rows = rows.remove_columns("completion")
        trainer = GRPOTrainer(model, letters, settings, train_dataset=rows, processing_class=tokenizer)
    for parameter in trainer.model.parameters():
        # TRL makes them bf16 beside a 4-bit base, in which two orders of one sum come out several percent apart.
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    if when == "trainer":
        lk.accelerate(trainer.model)
    assert bool(fast(trainer.model)) == (when is not None)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 20
    names = ["loss", "grad_norm", *(["reward", "kl"] if stage == "grpo" else [])]
    adapter = get_peft_model_state_dict(trainer.model, adapter_name="default")
    return [[entry[name] for entry in logged] for name in names], {n: t.detach().clone() for n, t in adapter.items()}


@pytest.mark.parametrize(
    ("stage", "kind", "when"),
    [
        ("sft", "plain", "model"),
        ("sft", "plain", "trainer"),
        ("grpo", "plain", "model"),
        pytest.param("sft", "nf4", "trainer", marks=needs_bnb),
        pytest.param("grpo", "nf4", "model", marks=needs_bnb),
    ],
)
def test_trl_s_own_trainers_lose_the_same(stage, kind, when, tiny_folder, tmp_path):
    theirs, their_adapter = trained(stage, kind, tiny_folder, tmp_path / "theirs", None)
    ours, our_adapter = trained(stage, kind, tiny_folder, tmp_path / "ours", when)
    for one, other in zip(ours, theirs):
        # GRPO's loss is what is left of advantages that nearly cancel.
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    for name, tensor in their_adapter.items():
        assert float((our_adapter[name] - tensor).norm() / tensor.norm()) < 1e-4, name


def code_of(heading):
    """The Python of the page's part that begins with `heading`."""
    text = (Path(__file__).parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text[text.index(f"**{heading}") :], flags=re.DOTALL)[0]


def test_the_page_s_lines_for_other_trainers_accelerate(monkeypatch, tmp_path, tiny_folder):
    """Stand-ins for Axolotl and LLaMA-Factory, with what the lines use of them; TRL's trainer calls the callback."""
    base, tuner, ran = ModuleType("axolotl.integrations.base"), ModuleType("llamafactory.train.tuner"), []
    base.BasePlugin, tuner.run_exp = object, lambda callbacks: ran.extend(callbacks)
    for module in (base, tuner):
        parts = module.__name__.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[0]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict = {}
    exec(code_of("Axolotl"), names)
    model = made()
    names["AccelerateLora"]().post_model_load({}, model)
    assert fast(model)
    exec(code_of("LLaMA-Factory"), {"__name__": "__main__"})
    rows, settings = ROWS.remove_columns("system"), sft_config(tmp_path, max_steps=1)
    trainer = SFTTrainer(made(), settings, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=ran)
    assert not fast(trainer.model)
    trainer.train()
    assert len(fast(trainer.model)) == 2 * len(TARGETS)
    names = {"lk": lk, "SFTTrainer": SFTTrainer, "model": str(tiny_folder), "config": settings, "rows": rows}
    exec(code_of("TRL"), names | {"lora_config": config()})
    exec(code_of("Plain"), names := {"lk": lk, "get_peft_model": get_peft_model, "LoraConfig": LoraConfig,
                                     "model": tiny_model()})  # fmt: skip
    assert len(fast(names["model"])) == 14
