"""Nemotron-H: a string of letters says what each block is, and each block is one thing.

    M  Mamba-2        *  attention        -  feed-forward layer        E  experts        x = x + block(norm(x))

Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models (NVIDIA, April 2025, arXiv 2504.03624):
of 52 blocks in 8B, 24 are Mamba-2, 24 are feed-forward layers with ReLU squared, and 4 are attention, without
positions. Nemotron Nano 2 (August 2025, arXiv 2508.14444) has 9 B parameters. Nemotron 3 Nano (December 2025, arXiv
2512.20848) puts experts in place of feed-forward layers: 31.6 B parameters, 3.6 B of them active in a token with those
of the embeddings, and DeepSeek-V3's router. The experts of Nemotron 3 Super read a narrower projection of the token
(`d_latent`). Step sizes of Mamba-2 are at least 0.001: transformers has this limit for prompts only, here it holds for
each token. The prediction module of the training is left out. Blog: Case studies; State-space models, hybrids.
Gallery: docs/gallery/index.html#nemotron_h
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_divides, check_positive
from llm.models.case_studies.config import GroupedConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import FFNBlock, MixerBlock
from llm.modules.ffn.activations import relu_squared
from llm.modules.ffn.mlp import MLP
from llm.modules.ffn.moe import LatentMoE, MoE, PlainExperts
from llm.modules.ffn.router import SigmoidRouter, check_routing
from llm.modules.norms import OnceRoundedRMSNorm
from llm.modules.recurrent.mamba2 import Mamba2


class NemotronH(Transformer):
    @dataclass(frozen=True)
    class Config(GroupedConfig):
        """23.3 M parameters by default, 19.9 M of them active in a token."""

        pattern: str = "MEM*M-"
        """The kind of each block: M, *, - or E; a pattern shorter than n_layers is repeated."""
        n_layers: int = 6
        """Number of blocks."""
        d_ff: int = 2048
        """Width of the feed-forward layers."""
        tie_embeddings: bool = False
        """Use the token embedding as the output head, too; such a model cannot be exported."""
        n_mamba_heads: int = 16
        """Heads of Mamba-2."""
        mamba_head_dim: int = 64
        """Channels of a head of Mamba-2."""
        n_mamba_groups: int = 2
        """Pairs of B and C; must divide n_mamba_heads."""
        d_state: int = 128
        """Width of Mamba-2's keys (B) and queries (C)."""
        d_conv: int = 4
        """Tokens that the short convolution mixes."""
        dt_min: float = 0.001
        """The smallest step size of Mamba-2."""
        n_experts: int = 16
        """Experts in a block of them."""
        top_k: int = 3
        """Experts that each token goes to."""
        d_expert: int = 256
        """Width of an expert."""
        d_shared: int = 512
        """Width of the expert that every token uses."""
        d_latent: int | None = None
        """Width of what the routed experts read and write; where it is not given, d_model."""
        n_groups: int = 1
        """Groups of experts."""
        top_k_groups: int = 1
        """Groups whose experts a token may use."""
        normalize_weights: bool = True
        """Scale the weights of the chosen experts to sum to routed_scaling_factor (norm_topk_prob)."""
        routed_scaling_factor: float = 1.0
        """Factor of the weights of the chosen experts."""

        small: ClassVar[dict[str, Any]] = {**GroupedConfig.small, "n_mamba_heads": 8, "mamba_head_dim": 32} | {
            **dict(d_state=32, d_ff=512, d_expert=64, d_shared=128),
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_mamba_heads", "mamba_head_dim", "n_mamba_groups", "d_state", "d_conv", "d_expert")
            check_positive(self, "head_dim", "d_shared", "d_latent", "n_groups", "top_k_groups")
            check_divides(self, "n_mamba_groups", "n_mamba_heads")
            check_routing(self.n_experts, self.top_k, self.n_groups, self.top_k_groups)
            if not self.pattern or set(self.pattern) - set("M*-E"):
                raise ValueError(f"pattern = {self.pattern!r} must consist of M, *, - and E (--model.pattern)")
            if self.dt_min < 0:
                raise ValueError(f"dt_min = {self.dt_min} must not be negative (--model.dt-min)")

        def kind(self, layer: int) -> str:
            """The letter of a block."""
            return self.pattern[layer % len(self.pattern)]

    def make_norm(self) -> nn.Module:
        return OnceRoundedRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> nn.Module:
        c = self.config
        kind = c.kind(layer)
        if kind == "M":
            return MixerBlock(self.make_mamba(), self.make_norm)
        if kind == "*":
            heads = dict(n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_width)
            return MixerBlock(MultiHeadAttention(d_model=c.d_model, **heads), self.make_norm)
        return FFNBlock(MLP(c.d_model, c.d_ff, relu_squared) if kind == "-" else self.make_experts(), self.make_norm)

    def make_mamba(self) -> nn.Module:
        c = self.config
        heads = dict(n_heads=c.n_mamba_heads, head_dim=c.mamba_head_dim, n_groups=c.n_mamba_groups)
        sizes = dict(d_state=c.d_state, d_conv=c.d_conv, norm_eps=c.norm_eps, dt_min=c.dt_min)
        return Mamba2(d_model=c.d_model, **heads, **sizes)

    def make_experts(self) -> nn.Module:
        c = self.config
        groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
        weights = dict(normalize=c.normalize_weights, scale=c.routed_scaling_factor)
        router = SigmoidRouter(c.d_model, c.n_experts, c.top_k, **groups, **weights)
        experts = PlainExperts(c.d_latent or c.d_model, c.d_expert, c.n_experts, relu_squared)
        shared = MLP(c.d_model, c.d_shared, relu_squared)
        return LatentMoE(c.d_model, c.d_latent, router, experts, shared) if c.d_latent else MoE(router, experts, shared)
