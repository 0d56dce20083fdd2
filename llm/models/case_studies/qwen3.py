"""Qwen 2 and 3: LLaMA's recipe with a bias on queries, keys and values, and then with a norm on them instead.

Qwen2 (July 2024, arXiv 2407.10671; Qwen2.5, arXiv 2412.15115, has the same architecture) keeps one oddity of the first
Qwen: biases in the query, key and value projections, none elsewhere. Qwen3 (May 2025, arXiv 2505.09388) drops them and
normalises each query and key head before RoPE, so that scores stay bounded and training stable; its heads are 128 wide
whatever d_model / n_heads is. Small models of both tie the head to the embedding, which is large: 151,936 entries.
Blog: Case studies, Qwen; Normalization, QK-norm.
"""

from dataclasses import dataclass
from functools import partial

from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.norms import RMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, same


@dataclass(frozen=True)
class Qwen2Config(CaseStudyConfig):
    """16.2 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""


@dataclass(frozen=True)
class Qwen3Config(CaseStudyConfig):
    """16.2 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""


def size(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, tie_embeddings: bool, **more) -> dict:
    widths = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    common = {"vocab_size": 151_936, "max_seq_len": 32_768, "rope_theta": 1_000_000.0, "norm_eps": 1e-6}
    return {**widths, **common, "tie_embeddings": tie_embeddings, **more}


large = {"vocab_size": 152_064, "max_seq_len": 131_072}
three = {"head_dim": 128, "max_seq_len": 40_960}
sizes = {
    "qwen2-0.5b": size(896, 24, 14, 2, 4864, True, max_seq_len=131_072),
    "qwen2-1.5b": size(1536, 28, 12, 2, 8960, True, max_seq_len=131_072),
    "qwen2-7b": size(3584, 28, 28, 4, 18_944, False, **large),
    "qwen2-72b": size(8192, 80, 64, 8, 29_568, False, **large, norm_eps=1e-5),
    "qwen2.5-3b": size(2048, 36, 16, 2, 11_008, True),  # the other sizes of Qwen2.5 are those of Qwen2
    "qwen2.5-14b": size(5120, 48, 40, 8, 13_824, False, **large, norm_eps=1e-5),
    "qwen2.5-32b": size(5120, 64, 40, 8, 27_648, False, **large, norm_eps=1e-5),
    "qwen3-0.6b": size(1024, 28, 16, 8, 3072, True, **three),
    "qwen3-1.7b": size(2048, 28, 16, 8, 6144, True, **three),
    "qwen3-4b": size(2560, 36, 32, 8, 9728, True, **three),
    "qwen3-8b": size(4096, 36, 32, 8, 12_288, False, **three),
    "qwen3-14b": size(5120, 40, 40, 8, 17_408, False, **three),
    "qwen3-32b": size(5120, 64, 64, 8, 25_600, False, **three),
}
sizes = {n: (Qwen2Config if n.startswith("qwen2") else Qwen3Config)(**size) for n, size in sizes.items()}

NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # with biases or q_norm and k_norm
    ("blocks.{layer}.ffn.*", "model.layers.{layer}.mlp.*", same),
)
FIELDS = (
    ("vocab_size", "vocab_size", 151_936),
    ("max_seq_len", "max_position_embeddings", 32_768),
    ("d_model", "hidden_size", 4096),
    ("n_layers", "num_hidden_layers", 32),
    ("n_heads", "num_attention_heads", 32),
    ("n_kv_heads", "num_key_value_heads", 32),
    ("d_ff", "intermediate_size", 22_016),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)
FULL_ATTENTION = {"hidden_act": ("silu",), "use_sliding_window": (False,), "layer_types": ("full_attention", None)}
UNUSED_WINDOW = frozenset({"sliding_window", "max_window_layers"})


def attention(c: CaseStudyConfig, **options) -> MultiHeadAttention:
    """What both have in common, and RoPE."""
    rope = RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling))
    sizes = {"d_model": c.d_model, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "head_dim": c.head_width}
    return MultiHeadAttention(**sizes, rope=rope, **options)


class Qwen2(Transformer):
    """Biases on queries, keys and values."""

    published = Published(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        names=NAMES,
        fields=(*FIELDS, ("head_dim", "head_dim", None)),
        required=FULL_ATTENTION,
        ignored=UNUSED_WINDOW,
        read=read_rope,
        write=write_rope,
    )

    def make_block(self, layer: int) -> Block:
        c = self.config
        return Block(attention(c, qkv_bias=True), SwiGLU(c.d_model, c.d_ff), self.make_norm)


class Qwen3(Transformer):
    """A norm on each query and key head."""

    published = Published(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        names=NAMES,
        fields=(*FIELDS, ("head_dim", "head_dim", 128)),
        required={**FULL_ATTENTION, "attention_bias": (False,)},
        ignored=UNUSED_WINDOW,
        read=read_rope,
        write=lambda config: {**write_rope(config), "head_dim": config.head_width},
    )

    def make_block(self, layer: int) -> Block:
        c = self.config
        mixer = attention(c, qk_norm=partial(RMSNorm, eps=c.norm_eps))
        return Block(mixer, SwiGLU(c.d_model, c.d_ff), self.make_norm)
