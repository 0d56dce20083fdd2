"""ALiBi decoder: scores fall with the distance, faster in some heads than in others; embeddings hold no positions.

    score(i, j) = q_i . k_j / sqrt(d) - m_h (i - j)        m_h = 2^(-8 h / n_heads)        the baseline: m_h = 0

Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, arXiv 2108.12409.
Blog: Position encoding, ALiBi.
Gallery: docs/gallery/index.html#alibi
"""

from torch import nn

from llm.models.nope import NoPEDecoder
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.position_encoding.alibi import ALiBi


class ALiBiDecoder(NoPEDecoder):
    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, score_bias=ALiBi(c.n_heads))
