"""ALiBi decoder: scores fall with the distance, faster in some heads than in others; embeddings hold no positions.

    score(i, j) = q_i . k_j / sqrt(d) - m_h (i - j)        m_h = 2^(-8 h / n_heads)        the baseline: m_h = 0

Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, arXiv 2108.12409.
Blog: Position encoding, ALiBi.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.alibi import alibi


@dataclass(frozen=True)
class ALiBiConfig(DecoderConfig):
    """The baseline's sizes: the slopes follow from n_heads."""


class ALiBiDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        bias = partial(alibi, n_heads=c.n_heads)
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, score_bias=bias)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
