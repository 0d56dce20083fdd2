"""GLM-4.5: DeepSeek-V3's experts under grouped heads, half of each of which is turned.

GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models (Zhipu AI and Tsinghua, August 2025, arXiv 2508.06471)
has 355 B parameters, 32 B of them active; GLM-4.5-Air has 106 B and 12 B. The router is DeepSeek-V3's: sigmoid scores,
a bias that balances, one shared expert. Attention is not latent but grouped, with 96 heads of 128 channels on a stream
of 4,096 or 5,120, biases on queries, keys and values, and RoPE on half of each head. The large model normalises query
and key heads. The prediction module of its training is left out here. Blog: Case studies; FFN and MoE.
Gallery: docs/gallery/index.html#glm4_moe
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from llm.config import check_not_negative, check_positive
from llm.models.case_studies.config import CaseStudyConfig, check_share, grouped_heads
from llm.models.case_studies.deepseek_v2 import shared_and_routed
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.router import SigmoidRouter, check_routing
from llm.modules.norms import RMSNorm


class GLM4MoE(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """36.8 M parameters by default, 16.7 M of them active in a token."""

        partial_rotary_factor: float = 0.5
        """The share of each head that RoPE turns."""
        attention_bias: bool = True
        """Biases on queries, keys and values."""
        qk_norm: bool = False
        """Normalise each query and key head before RoPE."""
        n_dense_layers: int = 1
        """How many first layers have one wide feed-forward layer instead of experts."""
        n_experts: int = 16
        """Experts in each of the remaining layers among which the router chooses."""
        top_k: int = 3
        """Experts that each token goes to."""
        n_shared_experts: int = 1
        """Experts that every token uses, computed as one wide expert."""
        d_expert: int = 344
        """Width of an expert."""
        n_groups: int = 1
        """Groups of experts."""
        top_k_groups: int = 1
        """Groups whose experts a token may use."""
        normalize_weights: bool = True
        """Scale the weights of the chosen experts to sum to routed_scaling_factor (norm_topk_prob)."""
        routed_scaling_factor: float = 1.0
        """Factor of the weights of the chosen experts."""
        bias_update_speed: float = 0.001
        """Change of an expert's bias per step: up if its load was below the mean, else down."""

        small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "d_expert": 88}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_experts", "top_k", "d_expert", "n_groups", "top_k_groups")
            check_share(self, "partial_rotary_factor")
            check_routing(self.n_experts, self.top_k, self.n_groups, self.top_k_groups)
            check_not_negative(self, "n_dense_layers", "n_shared_experts")

    def make_block(self, layer: int) -> Block:
        c = self.config
        norm = partial(RMSNorm, eps=c.norm_eps) if c.qk_norm else None
        heads = grouped_heads(c, c.partial_rotary_factor)
        attention = MultiHeadAttention(**heads, qk_norm=norm, qkv_bias=c.attention_bias)
        ffn = SwiGLU(c.d_model, c.d_ff) if layer < c.n_dense_layers else self.make_experts()
        return Block(attention, ffn, self.make_norm)

    def make_experts(self) -> nn.Module:
        c = self.config
        groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
        weights = dict(normalize=c.normalize_weights, scale=c.routed_scaling_factor)
        options = groups | weights | dict(bias_update_speed=c.bias_update_speed)
        return shared_and_routed(c, SigmoidRouter(c.d_model, c.n_experts, c.top_k, **options))
