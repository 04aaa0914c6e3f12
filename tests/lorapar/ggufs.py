"""Tiny models of each architecture and each tokenizer that is converted to GGUF, and an adapter that has moved."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import lorapar
from lorapar.adapter.layers import ADAPTER, masked_layers
from lorapar.exporting.gguf_tokenizer import LLAMA_3, QWEN_2
from tests.tiny import CHATML, TARGETS

# What a vocabulary is learned from: text that does not change.
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").splitlines(keepends=True)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "llama")
SIZE = 512
SMALL: dict[str, Any] = {
    "vocab_size": SIZE + 8, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.14,
}  # fmt: skip
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama, tied, with biases and an odd head": lambda: LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, head_dim=32, tie_word_embeddings=True
    ),
    "llama 3": lambda: LlamaConfig(**SMALL, rope_parameters=dict(LLAMA_3_ROPE)),
    "linear": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "yarn": lambda: Qwen2Config(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
}  # fmt: skip


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `SIZE` tokens that splits text as llama.cpp's `kind` does, with ChatML's tokens and template."""
    steps: list[Any] = {
        "gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated")],
        "smaug-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "removed", invert=True)],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN_2), "isolated")], "llama": [],
    }[kind]  # fmt: skip
    if kind == "llama":
        return _sentencepiece()
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    by_words = kind in ("gpt-2", "smollm")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)]
    )
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    # Not special, and matched in text all the same.
    made.add_tokens([AddedToken("<think>", normalized=False)])
    if kind == "llama-bpe":
        made.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>" if kind == "llama-bpe" else None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip


def _sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are ▁, one is put before a text, and what is no token is written in bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=SIZE - 259, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate([*first, *found])}
    made = Tokenizer(
        models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", fuse_unk=True,
                   byte_fallback=True)
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


# Chat templates of SentencePiece tokenizers: which begin with a token, end turns with one, or have neither.
CHATS = {
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
               "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}<|assistant|>\n",
    "words": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
}  # fmt: skip


def metaspace(scheme: str, chat: str | None = None) -> PreTrainedTokenizerFast:
    """As transformers 5 makes a SentencePiece tokenizer: a space is put before the "first" text, or "always"."""
    tokenizer = _sentencepiece()
    backend = tokenizer.backend_tokenizer
    # `Tokenizer` refuses None, which its JSON may hold.
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)  # type: ignore[arg-type]
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    tokenizer.chat_template = None if chat is None else CHATS[chat]
    return tokenizer


def save(folder: Path, architecture: str = "llama", kind: str = "gpt-2") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Norms are ones and biases zeros, which hides a wrong place.
                parameter.add_(0.3 * torch.randn_like(parameter))
            assert parameter.is_floating_point(), name
    model.save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    return folder


def moved(folder: Path | str, start: str = "twin", seed: int = 1, **keys: Any) -> PeftModel:
    """The model in `folder` in fp32 with an adapter whose factors have moved as a rank partition lets them.

    Of four slices the first has not moved, the second in A alone, the third in B alone, the last in both.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    keys = {"r": 4, "lora_alpha": 8, "target_modules": [*TARGETS, "o_proj"], **keys}
    model = lorapar.attach(base, LoraConfig(task_type="CAUSAL_LM", **keys), start=start)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in masked_layers(model).values():
            a, b, _ = layer.factors(ADAPTER)
            for i in (1, 3):
                a[i] += 0.1 * torch.randn(a[i].shape, generator=generator)
            for i in (2, 3):
                b[:, i] += 0.1 * torch.randn(b[:, i].shape, generator=generator)
    return model.eval()
