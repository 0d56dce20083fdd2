"""NoPE decoder: no position encoding at all. The causal mask alone tells a token how much came before it.

    x_p = sqrt(d_model) E[token_p]        the baseline: sqrt(d_model) E[token_p] + PE(p)

The Impact of Positional Encoding on Length Generalization in Transformers, arXiv 2305.19466.
Blog: Position encoding, none.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP


@dataclass(frozen=True)
class NoPEConfig(DecoderConfig):
    """The baseline's sizes."""


class NoPEDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
