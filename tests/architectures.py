"""Tiny random models of many architectures, each under its function's name: `make("gemma3")`, `save("gemma3", folder)`.

All speak the byte tokenizer of tiny.py. Every linear layer of a text model has a multiple of 64 columns (see
`tiny_model`), attention windows are shorter than the tests' rows, and routers choose 2 of 4 experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .tiny import tiny_model, tiny_tokenizer

WINDOW = 8  # tokens that sliding-window attention sees
SPECIAL: dict[str, Any] = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
SIZES: dict[str, Any] = dict(
    vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
    # Logits as spread as a trained model's, so that a wrong one shows.
    initializer_range=0.14,
)  # fmt: skip
COMMON: dict[str, Any] = SIZES | SPECIAL | dict(num_key_value_heads=2, intermediate_size=64)
MIXED = ["sliding_attention", "full_attention"]
HYBRID: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=32, linear_value_head_dim=32, head_dim=32,
)  # fmt: skip


def llama() -> tf.PreTrainedModel:
    return tiny_model()


def tied() -> tf.PreTrainedModel:
    """Llama whose output head is its embedding."""
    return tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, tie_word_embeddings=True))


def qwen3() -> tf.PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**COMMON, head_dim=32))


def qwen3_5() -> tf.PreTrainedModel:
    """Every second layer's attention is linear: a convolution and a state, no keys that are kept."""
    return tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**COMMON, **HYBRID))


def qwen3_next() -> tf.PreTrainedModel:
    """Linear attention, and experts beside a shared one."""
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(
        **COMMON, **HYBRID, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4,
        num_experts_per_tok=2,
    ))  # fmt: skip


def qwen3_moe() -> tf.PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ))  # fmt: skip


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2))


def olmoe() -> tf.PreTrainedModel:
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2))


def gpt_oss() -> tf.PreTrainedModel:
    """Experts with biases, attention sinks, and a sliding window in every second layer."""
    return tf.GptOssForCausalLM(tf.GptOssConfig(
        **COMMON, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, layer_types=MIXED,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ))  # fmt: skip


def gemma2() -> tf.PreTrainedModel:
    """Soft-capped logits: cap · tanh(logits / cap)."""
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(
        **COMMON, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, layer_types=MIXED,
        final_logit_softcapping=5.0,
    ))  # fmt: skip


def _gemma3_config() -> tf.Gemma3TextConfig:
    return tf.Gemma3TextConfig(
        **COMMON, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, layer_types=MIXED
    )


def gemma3() -> tf.PreTrainedModel:
    return tf.Gemma3ForCausalLM(_gemma3_config())


def gemma3_multimodal() -> tf.PreTrainedModel:
    """A language model and a vision tower; the tower's layers are named q_proj, k_proj, v_proj like the text's."""
    vision = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        num_channels=3,
    )  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(
        text_config=_gemma3_config().to_dict(), vision_config=vision, mm_tokens_per_image=4, boi_token_index=255,
        eoi_token_index=256, image_token_index=257,
    ))  # fmt: skip


def qwen2_5_vl() -> tf.PreTrainedModel:
    """A language model with positions in three dimensions, and a vision tower."""
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
    vision = dict(
        hidden_size=64, intermediate_size=64, depth=1, num_heads=2, out_hidden_size=64, patch_size=14,
        fullatt_block_indexes=[0],
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(
        text_config=COMMON | dict(rope_parameters=rope), vision_config=vision, image_token_id=257, video_token_id=256,
        vision_start_token_id=255, vision_end_token_id=254,
    ))  # fmt: skip


def phi3() -> tf.PreTrainedModel:
    """Fused qkv_proj and gate_up_proj."""
    return tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON))


def gpt_neox() -> tf.PreTrainedModel:
    """Biases, a fused query_key_value, an MLP without a gate, a head named embed_out."""
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, **SPECIAL, intermediate_size=64))


def olmo2() -> tf.PreTrainedModel:
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**COMMON))


def granite() -> tf.PreTrainedModel:
    """Logits divided by a constant, after the head."""
    return tf.GraniteForCausalLM(tf.GraniteConfig(
        **COMMON, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2
    ))  # fmt: skip


class LoopedConfig(tf.PretrainedConfig):
    model_type = "tests_looped"

    def __init__(self, vocab_size: int = 258, hidden_size: int = 64, **kwargs: Any):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, 1
        self.num_attention_heads = 1
        super().__init__(**SPECIAL | kwargs)


class LoopedModel(tf.PreTrainedModel):
    """One block that each token goes through twice, as in ALBERT or a universal transformer."""

    config_class = LoopedConfig
    turns = 2

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, **unused: Any) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids)
        for _ in range(self.turns):
            q, k, v = (proj(x)[:, None] for proj in (self.q_proj, self.k_proj, self.v_proj))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
            x = x + self.down_proj(nn.functional.silu(self.up_proj(x)))
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, x))


class LoopedForCausalLM(tf.PreTrainedModel, tf.GenerationMixin):
    """It knows nothing of padding or of a cache."""

    config_class = LoopedConfig
    base_model_prefix = "model"
    inner: type[tf.PreTrainedModel] = LoopedModel

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.14)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, **unused: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def looped() -> tf.PreTrainedModel:
    return LoopedForCausalLM(LoopedConfig())


tf.AutoConfig.register("tests_looped", LoopedConfig)
tf.AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM)

ARCHITECTURES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    function.__name__: function
    for function in (
        llama, tied, qwen3, qwen3_5, qwen3_next, qwen3_moe, mixtral, olmoe, gpt_oss, gemma2, gemma3, gemma3_multimodal,
        qwen2_5_vl, phi3, gpt_neox, olmo2, granite, looped,
    )
}  # fmt: skip
MULTIMODAL = ("gemma3_multimodal", "qwen2_5_vl")


def make(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """The model of that name, the same weights each time, in eval mode."""
    torch.manual_seed(seed)
    return ARCHITECTURES[name]().eval()


def save(name: str, folder: Path) -> None:
    """Model and tokenizer in `folder`; a multimodal one's image processor too."""
    make(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if name == "gemma3_multimodal":
        tf.Gemma3ImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    if name == "qwen2_5_vl":
        tf.Qwen2VLImageProcessor().save_pretrained(folder)
