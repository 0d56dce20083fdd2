"""Mixtral: Mistral 7B with eight feed-forward layers in place of each one, of which a token uses two.

Mixtral of Experts (Jiang et al., January 2024, arXiv 2401.04088) showed with open weights that sparse experts work at
scale: 46.7 B parameters, 12.9 B of them active in a token, and level with Llama 2 70B or ahead of it at a fifth of its
work. The router takes the two largest of eight logits and a softmax over these two, so weights sum to 1. Attention is
grouped and, unlike Mistral's, sees the whole context of 32,768 tokens. 8x22B (April 2024) is the same, larger.
Blog: Case studies; FFN and MoE.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from llm.config import check_positive
from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.masks import causal, window
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, join, same


@dataclass(frozen=True)
class MixtralConfig(CaseStudyConfig):
    """47.1 M parameters by default, 17.6 M of them active in a token; `sizes` has the published ones."""

    d_ff: int = 800
    """Width of each expert."""
    n_experts: int = 8
    """Experts in each layer among which the router chooses."""
    top_k: int = 2
    """Experts that each token goes to."""
    aux_loss_coef: float = 0.01
    """Weight of the loss that balances the load of the experts."""
    window_size: int | None = None
    """Tokens that a token sees in each layer, itself among them; None: all."""

    small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "d_ff": 200}

    def __post_init__(self):
        super().__post_init__()
        check_routing(self.n_experts, self.top_k)
        if self.window_size is not None:
            check_positive(self, "window_size")


common = dict(vocab_size=32_000, n_kv_heads=8, rope_theta=1_000_000.0, tie_embeddings=False)
sizes = {
    "mixtral-8x7b": dict(common, max_seq_len=32_768, d_model=4096, n_layers=32, n_heads=32, d_ff=14_336),
    "mixtral-8x22b": dict(common, max_seq_len=65_536, d_model=6144, n_layers=56, n_heads=48, d_ff=16_384),
}
sizes = {name: MixtralConfig(**size) for name, size in sizes.items()}

GATE_UP, DOWN = "blocks.{layer}.ffn.experts.gate_up_proj", "blocks.{layer}.ffn.experts.down_proj"
ROUTER = "blocks.{layer}.ffn.router.weight"
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # q_proj, k_proj, v_proj, o_proj
    (ROUTER, "model.layers.{layer}.block_sparse_moe.gate.weight", same),
    (GATE_UP + "[{expert}]", (EXPERT + ".w1.weight", EXPERT + ".w3.weight"), join(2)),
    (DOWN + "[{expert}]", EXPERT + ".w2.weight", same),
    # the same as transformers 5 holds it in memory
    (ROUTER, "model.layers.{layer}.mlp.gate.weight", same),
    (GATE_UP, "model.layers.{layer}.mlp.experts.gate_up_proj", same),
    (DOWN, "model.layers.{layer}.mlp.experts.down_proj", same),
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
    ("n_experts", "num_local_experts", 8),
    ("top_k", "num_experts_per_tok", 2),
    ("window_size", "sliding_window", None),
    ("norm_eps", "rms_norm_eps", 1e-5),
    ("tie_embeddings", "tie_word_embeddings", False),
)


class Mixtral(Transformer):
    published = Published(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={"hidden_act": ("silu",)},
        ignored=frozenset({"router_jitter_noise"}),  # in training only
        read=partial(read_rope, default_theta=1_000_000.0),
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
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, aux_loss_coef=c.aux_loss_coef)
        return Block(attention, MoE(router, GatedExperts(c.d_model, c.d_ff, c.n_experts)), self.make_norm)
