"""Mixtral: Mistral 7B with eight feed-forward layers in place of each one, of which a token uses two.

Mixtral of Experts (Jiang et al., January 2024, arXiv 2401.04088) showed with open weights that sparse experts work at
scale: 46.7 B parameters, 12.9 B of them active in a token, level with Llama 2 70B or better at a fifth of its compute.
The router takes the two largest of eight logits and a softmax over these two, so weights sum to 1. Attention is grouped
and, unlike Mistral's, sees the whole context of 32,768 tokens. 8x22B (April 2024) is the same, larger.
Blog: Case studies; FFN and MoE.
Gallery: docs/gallery/index.html#mixtral
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.masks import Window, causal


class Mixtral(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """47.1 M parameters by default, 17.6 M of them active in a token."""

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
            check_positive(self, "window_size")

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(
            **grouped_heads(c), mask=causal if c.window_size is None else Window(c.window_size)
        )
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, aux_loss_coef=c.aux_loss_coef)
        return Block(attention, MoE(router, GatedExperts(c.d_model, c.d_ff, c.n_experts)), self.make_norm)
