"""Mistral 7B: LLaMA's recipe with grouped heads and a window, so that the cache stops growing with the text.

Mistral 7B (Jiang et al., October 2023, arXiv 2310.06825) beat Llama 2 13B at half its size. Each layer sees the last
4,096 tokens, and keys are kept in a ring of as many slots; over 32 layers what was read 131,000 tokens ago can still
have an influence. Its successors v0.2 and v0.3 gave the window up for full attention over 32,768 tokens with a base of
1,000,000: window_size None. Blog: Case studies; Attention, sliding window.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.config import check_positive
from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import causal, window
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, same


@dataclass(frozen=True)
class MistralConfig(CaseStudyConfig):
    """16.2 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""

    window_size: int | None = 128
    """Tokens that a token sees in each layer, itself among them; None: all."""

    small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "window_size": 64}

    def __post_init__(self):
        super().__post_init__()
        if self.window_size is not None:
            check_positive(self, "window_size")


seven_b = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14_336, "tie_embeddings": False}
v02 = {**seven_b, "max_seq_len": 32_768, "window_size": None, "rope_theta": 1_000_000.0}
sizes = {
    "mistral-7b-v0.1": {**seven_b, "vocab_size": 32_000, "max_seq_len": 32_768, "window_size": 4096},
    "mistral-7b-v0.2": {**v02, "vocab_size": 32_000},
    "mistral-7b-v0.3": {**v02, "vocab_size": 32_768},
}
sizes = {name: MistralConfig(**size) for name, size in sizes.items()}

NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # q_proj, k_proj, v_proj, o_proj
    ("blocks.{layer}.ffn.*", "model.layers.{layer}.mlp.*", same),  # gate_proj, up_proj, down_proj
)
FIELDS = (
    ("vocab_size", "vocab_size", 32_000),
    ("max_seq_len", "max_position_embeddings", 131_072),
    ("d_model", "hidden_size", 4096),
    ("n_layers", "num_hidden_layers", 32),
    ("n_heads", "num_attention_heads", 32),
    ("n_kv_heads", "num_key_value_heads", 8),
    ("head_dim", "head_dim", None),
    ("d_ff", "intermediate_size", 14_336),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("window_size", "sliding_window", 4096),
)


class Mistral(Transformer):
    published = Published(
        model_type="mistral",
        architecture="MistralForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={"hidden_act": ("silu",)},
        nullable=frozenset({"sliding_window"}),
        read=read_rope,
        write=write_rope,
    )

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_width,
            rope=RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling)),
            visible=causal if c.window_size is None else window(c.window_size),
        )
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
