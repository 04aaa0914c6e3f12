"""Which modules get an adapter: by default, by name, what is left out and said, and every kind of model and task."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorapar
from lorapar.adapter.attach import load_adapter, save_adapter
from lorapar.adapter.layers import lora_parameters, masked_layers
from lorapar.adapter.proof import Snapshot, verify
from lorapar.adapter.targets import leaf, resolve
from lorapar.errors import InputError
from lorapar.partitioning.partition import Partition
from tests.architectures import MULTIMODAL, make
from tests.tiny import TARGETS, tiny_model

SIX = set(TARGETS)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
IDS = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(0))


def config(**keys: Any) -> LoraConfig:
    values: dict[str, Any] = dict(r=4, lora_alpha=8)
    return LoraConfig(**(values | keys))


def adapted(model):
    """The names of the adapted modules, as the base model has them."""
    names = (name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if ".lora_A" in name)
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    ("name", "expected", "said"),
    [
        ("llama", SIX, "12 layers adapted"),
        ("qwen3", SIX, "o_proj 22.2% (can be added to lora.target_modules)"),
        ("gemma3", SIX, "77.8% of the matrix weights"),
        ("olmo2", SIX, "83.3% of the matrix weights"),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, "100.0% of the matrix weights"),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, "8 layers adapted"),
        ("looped", SIX - {"gate_proj"}, "100.0% of the matrix weights"),
        # A hybrid has the six in its full attention alone.
        ("qwen3_5", SIX | {"o_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
         "98.9% of the matrix weights; left out: conv1d 1.1% (Conv1d, not a linear layer)"),
        ("qwen3_next", ATTENTION | {"in_proj_qkvz", "in_proj_ba", "out_proj"}, "experts 51.6% (fused parameters"),
        ("qwen3_moe", ATTENTION, "experts 79.7% (fused parameters, which lora.target_modules cannot reach yet)"),
        ("mixtral", ATTENTION, "routers 0.4% (they choose experts)"),
        ("olmoe", ATTENTION, "experts 79.7%"),
        ("gpt_oss", ATTENTION, "experts 66.8%"),
        ("gemma3_multimodal", SIX, "model.vision_tower, model.multi_modal_projector 55.2%"),
        ("qwen2_5_vl", SIX, "model.visual 79.1%"),
    ],
)  # fmt: skip
def test_the_default_and_the_line_that_says_it(name, expected, said, caplog):
    """The line's shares are those of the weights: counted here anew."""
    model = make(name)
    before = {key: parameter.numel() for key, parameter in model.named_parameters()}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is model.get_output_embeddings()
                  for p in m.parameters()}  # fmt: skip
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
    with caplog.at_level(logging.INFO, logger="lorapar"):
        attached = lorapar.attach(model, config(), start="twin")
    names = adapted(attached)
    assert {leaf(one) for one in names} == expected
    assert not any(part in one for one in names for part in ("vis", "projector", "lm_head", "embed_out", "router"))
    lines = [record.getMessage() for record in caplog.records if record.name == "lorapar"]
    assert len(lines) == 1
    assert said in lines[0]
    share = sum(before[f"{one}.weight"] for one in names) / matrices
    assert f"{len(names)} layers adapted" in lines[0]
    assert f", {share:.1%} of the matrix weights" in lines[0]


@pytest.mark.parametrize("name", ["qwen3_next", *MULTIMODAL])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
def test_plain_peft_loads_the_same_set(name, targets, tmp_path):
    model = lorapar.attach(make(name), config(target_modules=targets), start="paper")
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(make(name), tmp_path)
    assert adapted(plain) == adapted(model)
    assert adapted(load_adapter(make(name), tmp_path)) == adapted(model)
    assert torch.equal(plain(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    torch.testing.assert_close(plain(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tower_is_adapted_where_it_is_named():
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    model = make("gemma3_multimodal")
    assert tower in dict(model.named_modules())
    text = set(resolve(model, config(target_modules=["q_proj"])).modules)
    assert len(text) == 2
    assert all("language_model" in name for name in text)
    assert set(resolve(model, config(target_modules=["q_proj", tower])).modules) == {*text, tower}
    assert set(resolve(model, config(target_modules=[tower.removeprefix("model.")])).modules) == {tower}
    assert set(resolve(model, config(target_modules=r".*\.q_proj")).modules) == text
    both = r".*(vision_tower|language_model).*\.q_proj"
    assert set(resolve(model, config(target_modules=both)).modules) == {*text, tower}
    found = resolve(model, config(target_modules=["q_proj", tower]))
    assert "some in model.vision_tower as asked" in found.line
    assert adapted(lorapar.attach(model, config(target_modules=["q_proj", tower]))) == {*text, tower}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", dict(target_modules=["q_proj", "v_porj"]), "lora.target_modules: got 'v_porj', .*nearest: v_proj"),
        ("llama", dict(target_modules=["layers.7.self_attn.q_proj"]), "matches no module of the model; nearest: mod"),
        ("llama", dict(target_modules="q_proj"), r"a list takes the ends of names: \[q_proj\]\); nearest: q_proj"),
        ("llama", dict(target_modules="(q_proj"), "no regular expression"),
        ("llama", dict(exclude_modules=["q_porj"]), "exclude_modules: got 'q_porj', .*nearest: q_proj"),
        ("llama", dict(target_modules=["all-linear"]), "alone, without a list: target_modules: all-linear"),
        ("llama", dict(target_modules=[r".*q_proj"]), r"alone, without a list: target_modules: .\*q_proj"),
        ("llama", dict(target_modules="all_linear"), "nearest: all-linear"),
        ("llama", dict(target_modules=["all_linear"]), "of the model; allowed: down_proj"),
        # However deep the model, what is allowed is a few words.
        ("llama", dict(target_modules=["x.weight"]), "allowed: down_proj, gate_proj, k_proj, o_proj, q_proj, up_p"),
        ("llama", dict(exclude_modules=["q_proj", "o_proj"]), "'o_proj', which excludes none .*o_proj is none of them"),
        ("llama", dict(exclude_modules=["mlp"]), r"only holds some; use the regular expression '.\*mlp\[.\]..*'"),
        ("llama", dict(exclude_modules=r".*\.9\..*"), "exclude_modules: got .*no whole name matches .*allowed: down_"),
        ("llama", dict(exclude_modules="q_proj"), r"exclude_modules: .*ends of names: \[q_proj\]\); nearest: q_proj"),
        ("llama", dict(exclude_modules="(q_proj"), "exclude_modules: got .*no regular expression"),
        ("llama", dict(exclude_modules=TARGETS), "lora.exclude_modules: got .*, which leaves none of the 12 target"),
        ("llama", dict(layers_to_transform=[1, 2]), "lora.layers_to_transform: got 2, .*in layers 0 to 1"),
        ("llama", dict(layers_to_transform=-1), "lora.layers_to_transform: got -1"),
        ("llama", dict(layers_to_transform=0, layers_pattern="layer"), "pattern: got 'layer', .*nearest: layers"),
        ("llama", dict(layers_to_transform=0, layers_pattern="(lay"), "layers_pattern: got .*no regular expression"),
        ("llama", dict(init_lora_weights="pissa"), "init_lora_weights: got 'pissa', .*use start: pissa"),
        ("llama", dict(target_modules=["q_proj", "self_attn"]), "self_attn is a LlamaAttention; only nn.Linear"),
        ("llama", dict(rank_pattern={"q_proj": 2}), "lora.rank_pattern: not supported"),
        ("llama", dict(alpha_pattern={"q_proj": 2}), "lora.alpha_pattern: not supported"),
        ("tied", dict(target_modules=["q_proj", "lm_head"]), "lm_head is the output head"),
        ("qwen3_moe", dict(target_modules=TARGETS), "'down_proj', .*experts hold their weights as fused parameters"),
        ("mixtral", dict(target_modules=["w1"]), "'w1', .*experts hold their weights as fused parameters"),
        ("gemma3_multimodal", dict(exclude_modules=".*vision.*"), "model.vision_tower is none of them; leave it out"),
        ("qwen3_next", dict(target_modules=["q_proj", "up_proj"]), "up_proj: PEFT takes the name for fused expert"),
        ("gemma3_multimodal", dict(target_modules=["lm_head"]), "lm_head is the output head"),
    ],
)  # fmt: skip
def test_what_matches_nothing_of_use_is_refused(name, keys, message):
    model = make(name)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        lorapar.attach(model, config(**keys), start="paper")
    assert [name for name, _ in model.named_modules()] == before  # and the model is as it was


def test_gpt2_is_refused_in_one_line():
    settings = tf.GPT2Config(vocab_size=258, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    model = tf.GPT2LMHeadModel(settings)
    with pytest.raises(
        InputError, match="GPT2LMHeadModel has no layer to adapt, whose weights are in Conv1D modules; only"
    ):
        lorapar.attach(model, config())
    with pytest.raises(InputError, match="c_attn is a Conv1D; only nn.Linear"):
        lorapar.attach(model, config(target_modules=["c_attn"]))


@pytest.mark.parametrize(
    "keys",
    [
        dict(exclude_modules=["v_proj", "model.layers.0.mlp.up_proj"]),
        dict(exclude_modules=r".*\.1\.mlp\..*", target_modules=["q_proj", "up_proj", "o_proj"]),
        dict(layers_to_transform=[1], target_modules=["q_proj", "o_proj"]),
        dict(layers_to_transform=0, layers_pattern="layers", target_modules=["q_proj"]),
    ],
)
def test_exclusions_are_peft_s_and_are_counted(keys):
    model = tiny_model()
    theirs = get_peft_model(tiny_model(), config(**(dict(target_modules=TARGETS) | keys)))
    found = resolve(model, config(**keys))
    ours = lorapar.attach(model, config(**keys))
    assert adapted(ours) == adapted(theirs) == set(found.modules)
    assert f"{len(found.modules)} layers adapted" in found.line
    assert ("lora.exclude_modules" if "exclude_modules" in keys else "lora.layers_to_transform") in found.line


def vision(**keys: Any) -> dict[str, Any]:
    return dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, image_size=28, patch_size=14) | keys


TEXT: dict[str, Any] = dict(vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, num_key_value_heads=2)  # fmt: skip


def llava():
    text, tower = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**vision(num_attention_heads=2))
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=9))


def audio():
    tower = dict(model_type="qwen2_audio_encoder", d_model=64, encoder_layers=1, encoder_attention_heads=2,
                 encoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16)  # fmt: skip
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(text_config=dict(model_type="qwen2", **TEXT), audio_config=tower, audio_token_index=9)
    )


def whisper():
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(
        vocab_size=258, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_attention_heads=4, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        decoder_start_token_id=1, num_mel_bins=8, max_source_positions=16,
    ))  # fmt: skip


def mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, state_size=8))


def deepseek():
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**TEXT | dict(num_key_value_heads=4), n_routed_experts=4,
        moe_intermediate_size=64, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=8,
        v_head_dim=16, qk_nope_head_dim=8, n_group=1, topk_group=1, num_experts_per_tok=2))  # fmt: skip


def phi4():
    tower: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    return tf.Phi4MultimodalForCausalLM(tf.Phi4MultimodalConfig(
        **TEXT, pad_token_id=0, eos_token_id=1, vision_config=tower | dict(num_hidden_layers=1, image_size=28),
        audio_config=tower | dict(num_blocks=1, ext_pw_out_channel=64, nemo_conv_channels=64),
    ))  # fmt: skip


def blip():
    text = dict(vocab_size=258, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=vision(num_attention_heads=2)))


def llama4():
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**TEXT, head_dim=16, num_local_experts=4, intermediate_size_mlp=64))


@pytest.mark.parametrize(
    ("build", "expected", "said"),
    [
        (llava, SIX, "model.vision_tower, model.multi_modal_projector "),
        (audio, SIX, "model.audio_tower, model.multi_modal_projector "),
        # Speech is what this one reads: its encoder is no tower beside a language model.
        (whisper, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, "16 layers adapted"),
        # Its code multiplies by dt_proj's weight.
        (mamba, {"in_proj", "x_proj"}, "(this architecture reads the weight directly"),
        # Towers that no sub-model of the text's names, and the projectors beside them.
        (phi4, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, "left out: model.embed_tokens_extend 85.1%"),
        # The word list's layer is deep within.
        (blip, {"query", "key", "value", "dense"}, "left out: vision_model "),
        (deepseek, {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}, "PEFT takes the name"),
        (llama4, SIX | {"o_proj"}, "experts 66.4% (fused"),
    ],
)  # fmt: skip
def test_other_people_s_architectures(build, expected, said):
    found = resolve(build(), config())
    assert {leaf(name) for name in found.modules} == expected
    assert said in found.line
    assert adapted(lorapar.attach(build(), config(target_modules="all-linear"))) >= set(found.modules)


def test_a_second_adapter_goes_where_the_first_is():
    model = get_peft_model(tiny_model(), LoHaConfig(target_modules=["q_proj"]))
    names = [name.removeprefix("base_model.model.") for name in resolve(model, config()).modules]
    assert names == list(resolve(tiny_model(), config()).modules)


def test_a_bare_model_s_layers_are_counted_too():
    """Its names begin with the list of layers, where PEFT counts none."""
    model = tf.LlamaModel(tiny_model().config)
    attached = lorapar.attach(model, config(target_modules=["q_proj"], layers_to_transform=[1]))
    assert adapted(attached) == {"layers.1.self_attn.q_proj"}


BERT: dict[str, Any] = dict(vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
PAIR = torch.tensor([0, 1])


def bert_loss(kind, **labels):
    return lambda: kind(tf.BertConfig(**BERT)), lambda model: model(input_ids=IDS, **labels).loss


def t5():
    return tf.T5ForConditionalGeneration(tf.T5Config(
        vocab_size=258, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    ))  # fmt: skip


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=28, patch_size=14
    ))  # fmt: skip


def sequential():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def hidden(model):
    return model(input_ids=IDS).last_hidden_state.square().mean()


KINDS: dict[str, tuple[str | None, Any, Callable[[], Any], Callable[[Any], Any]]] = {
    "sequential": (None, ["0", "2"], sequential, lambda model: model(torch.ones(2, 8)).square().sum()),
    "all_of_sequential": (None, "all-linear", sequential, lambda model: model(torch.ones(2, 8)).square().sum()),
    "features": ("FEATURE_EXTRACTION", ["query", "value"], lambda: tf.BertModel(tf.BertConfig(**BERT)), hidden),
    "classes": ("SEQ_CLS", ["query"], *bert_loss(tf.BertForSequenceClassification, labels=PAIR)),
    "all_of_classes": ("SEQ_CLS", "all-linear", *bert_loss(tf.BertForSequenceClassification, labels=PAIR)),
    "tokens": ("TOKEN_CLS", ["query"], *bert_loss(tf.BertForTokenClassification, labels=IDS % 2)),
    "spans": ("QUESTION_ANS", ["query"],
              *bert_loss(tf.BertForQuestionAnswering, start_positions=PAIR, end_positions=PAIR + 1)),
    "images": (None, ["q_proj", "v_proj"], vit, lambda model: model(torch.ones(2, 3, 28, 28)).logits.sum()),
    "text_to_text": ("SEQ_2_SEQ_LM", ["q", "v"], t5, lambda model: model(input_ids=IDS, labels=IDS).loss),
    "causal": ("CAUSAL_LM", ["q_proj"], tiny_model, lambda model: model(input_ids=IDS, labels=IDS).loss),
    "no_task": (None, ["q_proj"], tiny_model, lambda model: model(input_ids=IDS, labels=IDS).loss),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_attach_takes_what_get_peft_model_takes(kind, tmp_path):
    """The class, trainable parameters, loss and gradients are PEFT's; it loads again; a twin start is the base's."""
    task, targets, build, loss = KINDS[kind]
    torch.manual_seed(0)
    base = build().train()
    keys = config(target_modules=targets, task_type=task, init_lora_weights="gaussian")
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(keys))
    ours = lorapar.attach(copy.deepcopy(base), keys, start="peft")
    assert type(ours) is type(theirs)
    for (name, their), (other, our) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        assert their.requires_grad == our.requires_grad, name
        with torch.no_grad():
            our.copy_(their.normal_(0, 0.1) if "lora_B" in name else their)
    their_loss, our_loss = loss(theirs), loss(ours)
    torch.testing.assert_close(our_loss, their_loss)
    their_loss.backward()
    our_loss.backward()
    for their, our in zip(theirs.parameters(), ours.parameters()):
        assert (their.grad is None) == (our.grad is None)
        if their.grad is not None:
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-3, atol=1e-5)
    save_adapter(ours, tmp_path)
    back = load_adapter(copy.deepcopy(base), tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(back.parameters(), ours.parameters(), strict=True))
    twin = lorapar.attach(copy.deepcopy(base), keys, start="twin")
    torch.testing.assert_close(loss(twin.eval()), loss(base.eval()))


def everything_active(model):
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in lora_parameters(model).items()}
    return Partition({kind: masks for kind in ("s1", "s2", "sft", "grpo")}, {"theta": 0.9, "rank": None})


def test_a_classifier_s_head_is_trained_beside_the_partition(caplog):
    """By an optimizer of its own, and the proof takes it for no frozen base."""
    model = lorapar.attach(KINDS["classes"][2](), config(target_modules=["query"], task_type="SEQ_CLS"), start="paper")
    made = everything_active(model)
    lorapar.activate(model, made, "sft")
    before = Snapshot.take(model)
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2)
    assert "2 other trainable parameters need an optimizer of their own" in caplog.text
    heads = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    others = torch.optim.SGD(heads, lr=0.1)
    KINDS["classes"][3](model).backward()
    head = heads[0].detach().clone()
    optimizer.step()
    others.step()
    assert not torch.equal(heads[0], head)
    assert verify(model, before, made, "sft")["tensors_moved"] == 4


def test_a_tensor_that_never_got_a_gradient_is_named(caplog):
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    model = lorapar.attach(make("gemma3_multimodal"), config(target_modules=["q_proj", tower]), start="paper")
    made = everything_active(model)
    lorapar.activate(model, made, "sft")
    before = Snapshot.take(model)
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    counts = verify(model, before, made, "sft")
    assert counts["tensors"] == 6
    assert counts["tensors_moved"] == 4
    assert counts["active"] == sum(p.numel() for p in lora_parameters(model).values())
    assert "2 of 6 tensors with active elements did not move, they never got a gradient" in caplog.text
    assert f"{tower}.lora_A.default.weight" in caplog.text
    assert len(masked_layers(model)) == 3


def test_a_layer_whose_name_ends_as_a_head_s_is_trained_whole_as_peft_has_it():
    """DistilBERT's pre_classifier."""
    settings = tf.DistilBertConfig(vocab_size=100, dim=64, n_layers=1, n_heads=4, hidden_dim=64)
    model = lorapar.attach(tf.DistilBertForSequenceClassification(settings), config(task_type="SEQ_CLS"))
    assert {leaf(name) for name in adapted(model)} == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    whole = {name.split(".modules_to_save")[0] for name, p in model.named_parameters() if p.requires_grad} - {
        name for name in lora_parameters(model)
    }
    assert {leaf(name) for name in whole} == {"pre_classifier", "classifier"}
