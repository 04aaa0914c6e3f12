"""A language model small enough that a whole run takes seconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <pad>, <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of chat_tokenizer, from 258 on.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")


def chat_tokenizer(template: str = CHATML, eos: str = "<|endoftext|>", more: tuple[str, ...] = ()):
    """The tiny tokenizer with a chat template and its tokens; as with many base models, its EOS ends no turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([*CHAT_TOKENS, *more], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


def tiny_model(seed: int = 0, vocabulary: int = 258) -> LlamaForCausalLM:
    """Every linear layer has 64 columns: real widths are multiples of 64; bitsandbytes (0.50.2) does not dequantise
    others rightly on every CPU (lorapar/adapter/layers_bnb.py)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.14,
    )
    return LlamaForCausalLM(config)


def save_tiny_model(folder: Path) -> None:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
