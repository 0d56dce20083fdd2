"""Jamba: Mamba layers with one of attention in eight, and experts in every other layer.

Jamba: A Hybrid Transformer-Mamba Language Model (AI21 Labs, March 2024, arXiv 2403.19887) was the first large hybrid.
It has 52 B parameters, 12 B of them active in a token, and its cache is an eighth of what attention in every layer
would need. The Mamba layers know the order of the tokens, so attention has no positions. An RMSNorm on dt, B and C
keeps large models stable. Each layer has a feed-forward layer, too, which a block of Mamba has not. The weights of the
two chosen experts do not sum to 1. Jamba 1.5 (August 2024, arXiv 2408.12570) has the same layers.
Blog: Case studies; State-space models, hybrids.
Gallery: docs/gallery/index.html#jamba
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive, flag
from llm.models.case_studies.config import GroupedConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.norms import RMSNorm
from llm.modules.recurrent.mamba import Mamba


class Jamba(Transformer):
    @dataclass(frozen=True)
    class Config(GroupedConfig):
        """29.9 M parameters by default, 17.2 M of them active in a token."""

        d_ff: int = 688
        """Width of the dense feed-forward layers and of each expert."""
        attention_period: int = 4
        """One of so many layers has attention (8 in the published models), the others have Mamba."""
        attention_offset: int = 2
        """The first layer with attention, counted from 0."""
        expert_period: int = 2
        """One of so many layers has experts, the others one feed-forward layer."""
        expert_offset: int = 1
        """The first layer with experts, counted from 0."""
        n_experts: int = 8
        """Experts in such a layer; 1: every layer is dense."""
        top_k: int = 2
        """Experts that each token goes to."""
        expand: int = 2
        """Channels inside a Mamba layer, in multiples of d_model."""
        d_state: int = 16
        """Numbers that a channel keeps."""
        d_conv: int = 4
        """Tokens that the short convolution mixes."""
        dt_rank: int | None = None
        """Width from which the steps of all channels are projected; where it is not given, d_model / 16."""
        aux_loss_coef: float = 0.001
        """Weight of the loss that balances the load of the experts."""

        small: ClassVar[dict[str, Any]] = {**GroupedConfig.small, "d_ff": 176} | {
            "attention_period": 2,
            "attention_offset": 1,
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(
                self, "attention_period", "expert_period", "expand", "d_state", "d_conv", "dt_rank", "head_dim"
            )
            for kind in ("attention", "expert"):
                offset, period = getattr(self, f"{kind}_offset"), getattr(self, f"{kind}_period")
                if not 0 <= offset < period:
                    raise ValueError(
                        f"{kind}_offset = {offset} must lie between 0 and {kind}_period - 1 = {period - 1} "
                        f"({flag(self, f'{kind}_offset')})"
                    )
            if self.n_experts != 1:
                check_routing(self.n_experts, self.top_k)

    def make_block(self, layer: int) -> Block:
        return Block(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if layer % c.attention_period == c.attention_offset:
            heads = dict(n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_width)
            return MultiHeadAttention(d_model=c.d_model, **heads)
        sizes = dict(d_inner=c.expand * c.d_model, d_state=c.d_state, d_conv=c.d_conv, dt_rank=c.dt_rank)
        return Mamba(d_model=c.d_model, **sizes, norm=partial(RMSNorm, eps=c.norm_eps))

    def make_ffn(self, layer: int) -> nn.Module:
        c = self.config
        if c.n_experts == 1 or layer % c.expert_period != c.expert_offset:
            return SwiGLU(c.d_model, c.d_ff)
        options = dict(normalize=False, aux_loss_coef=c.aux_loss_coef)
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, **options)
        return MoE(router, GatedExperts(c.d_model, c.d_ff, c.n_experts))
