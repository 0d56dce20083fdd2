"""Output norm: each sublayer reads the stream as it is, and what it adds is normalised.

    x = x + norm(attention(x))        x = x + norm(ffn(x))

Half of sandwich norm: the bound on what a layer adds, without a norm at its input.
2 OLMo 2 Furious, arXiv 2501.00656, where it replaced pre-norm for stability. Blog: Normalization, sandwich norm.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import OutputNormBlock
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class OutputNormConfig(DecoderConfig):
    """As many norms as the baseline, in another place."""


class OutputNorm(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> OutputNormBlock:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return OutputNormBlock(attention, MLP(c.d_model, c.d_ff), self.make_norm)
