"""Sandwich norm: each sublayer reads a normalised input, and what it adds is normalised once more.

    x = x + norm'(attention(norm(x)))        x = x + norm'(ffn(norm(x)))

The stream stays untouched as in pre-norm, yet no single layer can flood it: its contribution has the size of a gain.
CogView: Mastering Text-to-Image Generation via Transformers, arXiv 2105.13290; Gemma 2, arXiv 2408.00118.
Blog: Normalization, sandwich norm.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import SandwichBlock
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class SandwichNormConfig(DecoderConfig):
    """Four norms a block where the baseline has two."""


class SandwichNorm(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> SandwichBlock:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return SandwichBlock(attention, MLP(c.d_model, c.d_ff), self.make_norm)
