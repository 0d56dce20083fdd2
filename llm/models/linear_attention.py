"""Linear attention: without the softmax, all earlier tokens fit into one matrix for each head.

    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)

with phi(x) = elu(x) + 1. The baseline: softmax(q_t . k_j / sqrt(d)) over all earlier tokens j. A step of generation
costs the same however long the text is. Nothing marks positions: one layer sees the earlier tokens as a set. Order
comes in only because each of them was computed from those before it. Transformers are RNNs: Fast Autoregressive
Transformers with Linear Attention, arXiv 2006.16236. Blog: Linear attention.
Gallery: docs/gallery/index.html#linear_attention
"""

from dataclasses import dataclass

from torch import nn

from llm.models.nope import NoPEDecoder
from llm.modules.recurrent.linear_attention import LinearAttention


class LinearAttentionDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """The baseline's parameters in fewer, wider heads: a state has d_model^2 / n_heads numbers."""

        n_heads: int = 4
        """Heads; must divide d_model."""

    def make_mixer(self, layer: int) -> nn.Module:
        return LinearAttention(d_model=self.config.d_model, n_heads=self.config.n_heads)
