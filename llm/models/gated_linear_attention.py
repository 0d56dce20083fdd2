"""Gated linear attention: each channel of the keys forgets at a rate that the token chooses.

    S_t = diag(sigmoid(x_t W_1 W_2 + b)^(1 / 16)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Gate and norm are those of RetNet. The baseline: softmax attention. Queries and keys are half as wide as values, which
makes room for the gates.
Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635. Blog: Linear attention.
Gallery: docs/gallery/index.html#gated_linear_attention
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_even_heads
from llm.models.nope import NoPEDecoder
from llm.modules.recurrent.gated_linear_attention import GatedLinearAttention


class GatedLinearAttentionDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """17.8 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 4
        """Heads; must divide d_model, into an even width."""

        def __post_init__(self):
            super().__post_init__()
            check_even_heads(self)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return GatedLinearAttention(
            d_model=c.d_model, n_heads=c.n_heads, head_dim=c.d_model // c.n_heads // 2, norm_eps=c.norm_eps
        )
