"""Multi-query attention: all query heads share one key and one value head.

    head_h = Attention(x W_q^h, x W_k, x W_v)        the baseline: W_k^h and W_v^h for each head

The cache shrinks by the number of heads, and with it the memory that each generated token must read.
Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150. Blog: Attention, GQA and MQA.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class MultiQueryConfig(DecoderConfig):
    """The baseline's sizes; keys and values have one head."""


class MultiQuery(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=1)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
