"""LLaMA: the recipe that most open models follow. RoPE, RMSNorm before each layer, SwiGLU, no biases.

LLaMA (Touvron et al., February 2023, arXiv 2302.13971) put together what others had found: pre-norm with RMSNorm for
stable training, SwiGLU from PaLM for quality, RoPE from GPT-NeoX for relative positions, and far more tokens than its
size seemed to need. Llama 2 (July 2023, arXiv 2307.09288) doubled the context to 4,096 and gave the 70B model
grouped-query attention. Llama 3 (2024, arXiv 2407.21783) uses it in all sizes, with a vocabulary four times as large
and a base of 500,000; 3.1 reaches 128K tokens by slowing RoPE's slow channels by 8 (3.2: by 32), and the small models
of 3.2 tie the head to the embedding. 3.3 is 3.1's 70B trained further. Blog: Case studies, LLaMA.
"""

from dataclasses import dataclass

from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, same


@dataclass(frozen=True)
class LlamaConfig(CaseStudyConfig):
    """16.2 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""


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
    ("max_seq_len", "max_position_embeddings", 2048),
    ("d_model", "hidden_size", 4096),
    ("n_layers", "num_hidden_layers", 32),
    ("n_heads", "num_attention_heads", 32),
    ("n_kv_heads", "num_key_value_heads", "n_heads"),
    ("head_dim", "head_dim", None),
    ("d_ff", "intermediate_size", 11_008),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)


def scaled(factor: float) -> dict:
    """Llama 3.1 and later: from 8,192 tokens to 131,072."""
    return {
        "max_seq_len": 131_072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


llama2 = dict(vocab_size=32_000, max_seq_len=4096, tie_embeddings=False)
llama3 = dict(vocab_size=128_256, max_seq_len=8192, rope_theta=500_000.0, n_kv_heads=8, tie_embeddings=False)
wide = dict(d_model=8192, n_layers=80, n_heads=64, d_ff=28_672)
sizes = {
    "llama2-7b": dict(llama2, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008),
    "llama2-13b": dict(llama2, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, d_ff=13_824),
    "llama2-70b": dict(llama2, **wide, n_kv_heads=8),
    "llama3-8b": dict(llama3, d_model=4096, n_layers=32, n_heads=32, d_ff=14_336),
    "llama3-70b": dict(llama3, **wide),
    "llama3.1-8b": dict(llama3, d_model=4096, n_layers=32, n_heads=32, d_ff=14_336) | scaled(8.0),
    "llama3.1-70b": dict(llama3, **wide) | scaled(8.0),
    "llama3.1-405b": dict(llama3, d_model=16_384, n_layers=126, n_heads=128, d_ff=53_248) | scaled(8.0),
    "llama3.2-1b": dict(llama3, d_model=2048, n_layers=16, n_heads=32, d_ff=8192)
    | scaled(32.0)
    | {"tie_embeddings": True},
    "llama3.2-3b": dict(llama3, d_model=3072, n_layers=28, n_heads=24, d_ff=8192)
    | scaled(32.0)
    | {"tie_embeddings": True},
    "llama3.3-70b": dict(llama3, **wide) | scaled(8.0),
}
sizes = {name: LlamaConfig(**size) for name, size in sizes.items()}


class Llama(Transformer):
    published = Published(
        model_type="llama",
        architecture="LlamaForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
        heads_divide_width=True,
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
        )
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
