"""Parallel block: attention and feed-forward layer read the same normalised input and add to the stream together.

    h = norm(x)        x = x + attention(h) + ffn(h)

Their first projections share one input, so a fused kernel computes both at once and a sharded model synchronises once
a block instead of twice; the feed-forward layer no longer sees what its own block attended to.
PaLM: Scaling Language Modeling with Pathways, arXiv 2204.02311, section 2; first in GPT-J. Blog: Normalization.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import ParallelBlock
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class ParallelBlockConfig(DecoderConfig):
    """One norm a block where the baseline has two."""


class ParallelBlockDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> ParallelBlock:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return ParallelBlock(attention, MLP(c.d_model, c.d_ff), self.make_norm)
