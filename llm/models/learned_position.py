"""Learned-position decoder: a trained vector for each position takes the place of the sinusoids.

    x_p = sqrt(d_model) (E[token_p] + P[p])        the baseline: sqrt(d_model) E[token_p] + PE(p)

The sum is scaled, not the token alone: P, drawn with a deviation of 0.02, comes in with 0.02 sqrt(512) = 0.45 at the
default width, beside a token's 1. Past the end of the table there is an error.

Convolutional Sequence to Sequence Learning, arXiv 1705.03122; GPT-2. Blog: Position encoding, learned.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.cache import Cache
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.learned import LearnedPosition


@dataclass(frozen=True)
class LearnedPositionConfig(DecoderConfig):
    """The baseline's sizes; the table has max_seq_len rows."""


class LearnedPositionDecoder(Transformer):
    def __init__(self, config: LearnedPositionConfig):
        super().__init__(config)
        self.position = LearnedPosition(config.max_seq_len, config.d_model)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return (self.tok_embed(tokens) + self.position(positions)) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        self.position.check(length)
        return super().make_cache(batch_size, length, padding)
