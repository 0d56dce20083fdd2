"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention, and no position anywhere.

Kimi Linear: An Expressive, Efficient Attention Architecture (Moonshot AI, October 2025, arXiv 2510.26692) has 48 B
parameters, 3 B of them active. Kimi Delta Attention gives each channel of the keys a decay of its own; it knows the
order of the tokens, so the latent attention of every fourth layer has no RoPE: the channels that DeepSeek rotates are
there and stay as they are. The cache of a long text is a fourth of DeepSeek's. Experts and router are those of
DeepSeek-V3: sigmoid scores, a bias that balances, one shared expert, a dense first layer.
Blog: Case studies; Linear attention.
Gallery: docs/gallery/index.html#kimi_linear
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from llm.config import check_layer_types, check_positive
from llm.models.case_studies.deepseek_v2 import LatentExpertsConfig, latent_sizes, shared_and_routed
from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.router import SigmoidRouter
from llm.modules.recurrent.delta import KimiDeltaAttention

LayerType = Literal["linear_attention", "full_attention"]


class KimiLinear(Transformer):
    @dataclass(frozen=True)
    class Config(LatentExpertsConfig):
        """43.8 M parameters by default, 23.2 M of them active in a token."""

        tie_embeddings: bool = False
        """Use the token embedding as the output head, too; transformers has no such Kimi Linear."""
        q_lora_rank: int | None = None
        """Width of a latent for queries, too; None: one full projection, as published."""
        layer_types: tuple[LayerType, ...] = (
            "linear_attention",
            "linear_attention",
            "linear_attention",
            "full_attention",
        )
        """The mixers of the layers, in turn: Kimi Delta Attention or latent attention."""
        n_linear_heads: int = 8
        """Heads of Kimi Delta Attention."""
        linear_head_dim: int = 64
        """Width of its heads, and the rank of its gates."""
        d_conv: int = 4
        """Tokens that the short convolution before the delta rule sees."""
        n_groups: int = 1
        """Groups of experts."""
        top_k_groups: int = 1
        """Groups whose experts a token may use."""
        normalize_weights: bool = True
        """Scale the weights of the chosen experts to sum to routed_scaling_factor (moe_renormalize)."""
        routed_scaling_factor: float = 2.446
        """Factor of the weights of the chosen experts."""
        bias_update_speed: float = 0.001
        """Change of an expert's bias per step: up if its load was below the mean, else down."""

        small: ClassVar[dict[str, Any]] = {
            **LatentExpertsConfig.small,
            **dict(q_lora_rank=None, layer_types=("linear_attention", "full_attention")),
            **dict(n_linear_heads=4, linear_head_dim=32),
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_linear_heads", "linear_head_dim", "d_conv")
            check_layer_types(self, LayerType.__args__)

        def layer_type(self, layer: int) -> LayerType:
            return self.layer_types[layer % len(self.layer_types)]

    def make_block(self, layer: int) -> Block:
        c = self.config
        ffn = SwiGLU(c.d_model, c.d_ff) if layer < c.n_dense_layers else self.make_experts()
        return Block(self.make_mixer(layer), ffn, self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "full_attention":
            return LatentAttention(**latent_sizes(c), rope=None)
        widths = dict(head_dim=c.linear_head_dim, v_head_dim=c.linear_head_dim, gate_rank=c.linear_head_dim)
        heads = dict(n_heads=c.n_linear_heads, d_conv=c.d_conv)
        return KimiDeltaAttention(d_model=c.d_model, **heads, **widths, norm_eps=c.norm_eps)

    def make_experts(self) -> nn.Module:
        c = self.config
        groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
        weights = dict(normalize=c.normalize_weights, scale=c.routed_scaling_factor)
        options = groups | weights | dict(bias_update_speed=c.bias_update_speed)
        return shared_and_routed(c, SigmoidRouter(c.d_model, c.n_experts, c.top_k, **options))
