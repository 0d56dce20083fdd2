"""GPT-OSS: OpenAI's first open weights since GPT-2. Experts that are cut off, windows, and heads that may say nothing.

gpt-oss-120b & gpt-oss-20b Model Card (OpenAI, August 2025, arXiv 2508.10925): 116.8 B and 20.9 B parameters, 5.1 B and
3.6 B of them active in a token. Every second layer sees the last 128 tokens only, as in GPT-3; the others see
everything, by YaRN up to 131,072 tokens from 4,096, its ramp not rounded to whole channels. New is the learned sink in
each head's softmax, which takes the weight where a head has nothing to say. Four of 32 or 128 experts serve a token:
SwiGLU cut off at 7, with biases, as attention and router have, too. The experts are published in 4 bits (MXFP4), so
that the large model fits one GPU of 80 GB. Blog: Case studies, GPT-OSS; Attention, attention sinks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.models.case_study import WindowedConfig, read_layer_types
from llm.models.transformer import Transformer
from llm.modules.attention.sinks import SinkAttention
from llm.modules.blocks import Block
from llm.modules.ffn.clamped_experts import ClampedExperts
from llm.modules.ffn.moe import MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.norms import OnceRoundedRMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, deinterleave, same, transpose


@dataclass(frozen=True)
class GPTOSSConfig(WindowedConfig):
    """41.4 M parameters by default, 17.8 M of them active in a token; `sizes` has the published ones."""

    n_kv_heads: int = 2
    """Key and value heads; must divide n_heads."""
    head_dim: int | None = 64
    """Width of a head; where it is not given, d_model / n_heads."""
    d_ff: int = 320
    """Width of each expert."""
    n_experts: int = 16
    """Experts in each layer among which the router chooses."""
    top_k: int = 4
    """Experts that each token goes to."""
    aux_loss_coef: float = 0.01
    """Weight of the loss that balances the load of the experts."""

    small: ClassVar[dict[str, Any]] = {**WindowedConfig.small, "head_dim": 64, "d_ff": 80, "window_size": 64}

    def __post_init__(self):
        super().__post_init__()
        check_routing(self.n_experts, self.top_k)


yarn = dict(factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
rope = dict(rope_theta=150_000.0, rope_scaling=dict(yarn, rope_type="yarn"), max_seq_len=131_072)
heads = dict(n_heads=64, n_kv_heads=8, head_dim=64, vocab_size=201_088, tie_embeddings=False)
sizes = {
    "gpt-oss-20b": dict(rope, **heads, d_model=2880, d_ff=2880, n_layers=24, n_experts=32),
    "gpt-oss-120b": dict(rope, **heads, d_model=2880, d_ff=2880, n_layers=36, n_experts=128),
}
sizes = {name: GPTOSSConfig(**size) for name, size in sizes.items()}

EXPERTS, THEIRS = "blocks.{layer}.ffn.experts.", "model.layers.{layer}.mlp.experts."
NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    (EXPERTS + "gate_up_proj", THEIRS + "gate_up_proj", deinterleave(-1).then(transpose)),  # theirs (E, D, 2 F)
    (EXPERTS + "gate_up_proj_bias", THEIRS + "gate_up_proj_bias", deinterleave(-1)),
    (EXPERTS + "down_proj", THEIRS + "down_proj", transpose),
    (EXPERTS + "down_proj_bias", THEIRS + "down_proj_bias", same),
    ("blocks.{layer}.ffn.router.*", "model.layers.{layer}.mlp.router.*", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # four projections with biases, and sinks
)
FIELDS = (
    ("vocab_size", "vocab_size", 201_088),
    ("max_seq_len", "max_position_embeddings", 131_072),
    ("d_model", "hidden_size", 2880),
    ("n_layers", "num_hidden_layers", 36),
    ("n_heads", "num_attention_heads", 64),
    ("n_kv_heads", "num_key_value_heads", 8),
    ("head_dim", "head_dim", 64),
    ("d_ff", "intermediate_size", 2880),
    ("n_experts", "num_local_experts", 128),
    ("top_k", "num_experts_per_tok", 4),
    ("window_size", "sliding_window", 128),
    ("norm_eps", "rms_norm_eps", 1e-5),
    ("tie_embeddings", "tie_word_embeddings", False),
)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Where config.json says nothing about RoPE, transformers takes what the published models have."""
    if not left.get("rope_parameters") and not left.get("rope_scaling"):
        left["rope_scaling"] = {"rope_type": "yarn", **yarn}
    return read_layer_types(left, ours) | read_rope(left, ours, default_theta=150_000.0)


def write(config: GPTOSSConfig) -> dict[str, Any]:
    settings = write_rope(config)
    scaling = settings["rope_scaling"] or {"rope_type": "default"}
    layer_types = [config.layer_type(layer) for layer in range(config.n_layers)]
    return {**settings, "rope_scaling": scaling, "layer_types": layer_types, "head_dim": config.head_width}


class GPTOSS(Transformer):
    published = Published(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={"attention_bias": (True,), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)},
        # transformers does not look at them either: experts have their own activation, the others repeat other fields
        ignored=frozenset({"hidden_act", "experts_per_token", "initial_context_length"}),
        read=read,
        write=write,
    )

    def make_norm(self) -> OnceRoundedRMSNorm:
        return OnceRoundedRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = SinkAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_width,
            rope=RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling)),
            visible=c.visible(layer),
            qkv_bias=True,
            o_bias=True,
        )
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, bias=True, aux_loss_coef=c.aux_loss_coef)
        return Block(attention, MoE(router, ClampedExperts(c.d_model, c.d_ff, c.n_experts)), self.make_norm)
