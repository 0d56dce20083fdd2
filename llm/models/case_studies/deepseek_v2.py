"""DeepSeek-V2: latent attention for a small cache, fine-grained experts for many parameters at a low cost per token.

DeepSeek-V2 (May 2024, arXiv 2405.04434) introduced multi-head latent attention, which caches a short vector per token,
and combined it with the experts of DeepSeekMoE: many narrow ones, two that every token uses, and a dense first layer.
Each token may use the experts of a few groups only, so it needs few machines; a loss balances the experts. YaRN extends
the context to 128K tokens; DeepSeek applies YaRN's temperature in the scale of the scores.
Blog: Case studies, DeepSeek.
Gallery: docs/gallery/index.html#deepseek_v2
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from llm.config import ModelConfig, check_even, check_not_negative, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import Router, SoftmaxRouter, check_routing
from llm.modules.position_encoding.context_extension import yarn_mscale
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import Settings, make_scaling


@dataclass(frozen=True)
class LatentExpertsConfig(ModelConfig):
    """Latent attention over fine-grained experts, without RoPE: the sizes that Kimi Linear has, too."""

    n_heads: int = 16
    """Attention heads."""
    kv_lora_rank: int = 128
    """Width of the latent of keys and values; only it and the rotated key are cached."""
    q_lora_rank: int | None = 192
    """Width of a latent for queries, too, which saves memory in training; None: one full projection."""
    qk_nope_head_dim: int = 32
    """Width of the part of a query and key head without RoPE."""
    qk_rope_head_dim: int = 16
    """Width of the rotated part; its key is shared by all heads; must be even."""
    v_head_dim: int = 32
    """Width of a value head."""
    n_dense_layers: int = 1
    """How many first layers have one wide feed-forward layer instead of experts."""
    d_ff: int = 1376
    """Width of that layer."""
    n_experts: int = 16
    """Experts in each of the remaining layers among which the router chooses."""
    top_k: int = 3
    """Experts that each token goes to."""
    n_shared_experts: int = 1
    """Experts that every token uses, computed as one wide expert; 0: none."""
    d_expert: int = 344
    """Width of an expert."""
    n_groups: int = 4
    """Groups of experts; with many machines, each holds one group."""
    top_k_groups: int = 2
    """Groups whose experts a token may use."""

    small: ClassVar[dict[str, Any]] = {
        **ModelConfig.small,
        **dict(n_heads=4, kv_lora_rank=32, q_lora_rank=48, d_ff=352, d_expert=88),
    }

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "n_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        check_positive(self, "v_head_dim", "d_ff", "n_experts", "top_k", "d_expert")
        check_positive(self, "n_groups", "top_k_groups")
        check_not_negative(self, "n_dense_layers", "n_shared_experts")
        check_routing(self.n_experts, self.top_k, self.n_groups, self.top_k_groups)


@dataclass(frozen=True)
class DeepseekConfig(LatentExpertsConfig):
    """The sizes that V2 and V3 have. By default 37 M parameters, of which a token uses 16 M."""

    rope_theta: float = 10_000.0
    """Base of the rotation; raise it for longer contexts."""
    rope_scaling: Settings = field(default_factory=dict)
    """Extension of the context: rope_type (yarn, linear, dynamic, llama3) and its settings. Empty: none."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "rope_theta")
        check_even(self, "qk_rope_head_dim")
        make_scaling(self.rope_scaling)

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(width of a head); times yarn_mscale^2 if mscale_all_dim is set: longer texts flatten the softmax."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        mscale = self.rope_scaling.get("mscale_all_dim")
        return scale * yarn_mscale(self.rope_scaling["factor"], mscale) ** 2 if mscale else scale


def latent_sizes(c: LatentExpertsConfig) -> dict[str, Any]:
    """The sizes among the arguments of LatentAttention."""
    return dict(
        d_model=c.d_model,
        n_heads=c.n_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim,
    )


def latent_options(c: DeepseekConfig) -> dict[str, Any]:
    """The arguments of LatentAttention."""
    rope = RoPE(c.qk_rope_head_dim, c.rope_theta, interleaved=True, scaling=make_scaling(c.rope_scaling))
    return latent_sizes(c) | dict(rope=rope, scale=c.attention_scale)


def latent_attention(c: DeepseekConfig) -> LatentAttention:
    return LatentAttention(**latent_options(c))


def shared_and_routed(c: LatentExpertsConfig, router: Router) -> MoE:
    experts = GatedExperts(c.d_model, c.d_expert, c.n_experts)
    shared = SwiGLU(c.d_model, c.n_shared_experts * c.d_expert) if c.n_shared_experts else None
    return MoE(router, experts, shared)


class DeepseekV2(Transformer):
    @dataclass(frozen=True)
    class Config(DeepseekConfig):
        """Weights are not normalised and shrink as experts are added; a factor compensates."""

        routed_scaling_factor: float = 4.0
        """Factor of the weights of the chosen experts."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""

    def make_block(self, layer: int) -> Block:
        c = self.config
        ffn = SwiGLU(c.d_model, c.d_ff) if layer < c.n_dense_layers else self.make_experts()
        return Block(latent_attention(c), ffn, self.make_norm)

    def make_experts(self) -> nn.Module:
        c = self.config
        groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
        weights = dict(normalize=False, scale=c.routed_scaling_factor, aux_loss_coef=c.aux_loss_coef)
        return shared_and_routed(c, SoftmaxRouter(c.d_model, c.n_experts, c.top_k, **groups, **weights))
