"""Tiny random models under the names that PEFT's tests ask the hub for, in the form of the hub's cache.

They have the architecture that the name says and nothing of the model's weights, which the tests do not look at; both
runs of the tests take the same.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.tiny import tiny_tokenizer

SMALL: dict[str, Any] = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SMALL | dict(num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256)
OPT = SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256)
GPT2 = dict(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4)
BERT = SMALL | dict(intermediate_size=48, max_position_embeddings=256)
T5 = dict(vocab_size=300, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
MOE = LLAMA | dict(num_experts_per_tok=2)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", OPT),
    "facebook/opt-125m": ("OPTForCausalLM", "OPTConfig", OPT),
    "facebook/opt-350m": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM", "BloomConfig", dict(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | {"head_dim": 8, "sliding_window": 16}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM", "GptOssConfig", MOE | {"head_dim": 8, "num_local_experts": 4}),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", MOE | {"num_local_experts": 4}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration", "BartConfig",
        dict(vocab_size=300, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256)),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", LLAMA | {"pad_token_id": 0}),
}  # fmt: skip


def write_stand_ins(cache: Path) -> None:
    """Write each model of MODELS that `cache` lacks, with a tokenizer of bytes."""
    for name, (architecture, config, keys) in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "stand-in"
        if (folder / "refs" / "main").is_file():
            continue
        torch.manual_seed(0)
        model = getattr(tf, architecture)(getattr(tf, config)(**keys))
        model.save_pretrained(snapshot)
        tiny_tokenizer().save_pretrained(snapshot)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("stand-in", encoding="utf-8")
        assert json.loads((snapshot / "config.json").read_text(encoding="utf-8"))["architectures"] == [architecture]
