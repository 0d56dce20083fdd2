"""T5-bias decoder: each head learns a number for each bucket of distances; embeddings hold no positions.

    score(i, j) = q_i . k_j + b_h[bucket(i - j)]        the baseline: q_i . k_j / sqrt(d)

As in T5, scores are not divided by sqrt(d). Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer, arXiv 1910.10683. Blog: Position encoding, relative.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.t5_bias import T5Bias


@dataclass(frozen=True)
class T5BiasConfig(DecoderConfig):
    """The baseline's sizes and the buckets."""

    n_buckets: int = 32
    """Distances that are told apart; the nearer half one by one."""
    max_distance: int = 128
    """All distances from here on share the last bucket."""


class T5BiasDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        bias = T5Bias(c.n_heads, c.n_buckets, c.max_distance)
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, score_bias=bias, scale=1.0)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
