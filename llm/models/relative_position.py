"""Relative-position decoder: Transformer-XL's scores, without its recurrence; embeddings hold no positions.

    score(i, j) = [ (q_i + u) . k_j  +  (q_i + v) . W_r R_(i - j) ] / sqrt(d)        the baseline: q_i . k_j / sqrt(d)

R_n is the sinusoidal vector of distance n; W_r and, for each head, u and v are learned.

Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860.
Blog: Position encoding, relative.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.relative import RelativeAttention


@dataclass(frozen=True)
class RelativePositionConfig(DecoderConfig):
    """The baseline's sizes; each layer has one more matrix, which projects distances."""


class RelativePositionDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = RelativeAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
