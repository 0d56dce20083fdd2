"""Attention with a learned sink in each head: the softmax may give its weight to nothing.

    a_ij = exp(s_ij) / (exp(sink_h) + sum_j' exp(s_ij'))        the baseline: without exp(sink_h)

gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925. Blog: Attention, attention sinks.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.sinks import SinkAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class AttentionSinkConfig(DecoderConfig):
    """The baseline's sizes and one number more in each head."""


class AttentionSink(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = SinkAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
