"""LayerNorm in the place of RMSNorm: subtract the mean before dividing by the deviation, then scale and shift.

    LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * w + b

RMSNorm leaves out the mean and the shift, and costs little or nothing in quality: that is why models since LLaMA do.
Layer Normalization, arXiv 1607.06450. Blog: Normalization, LayerNorm.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.norms import LayerNorm
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class LayerNormConfig(DecoderConfig):
    norm_bias: bool = True
    """LayerNorm's shift b; off as in PaLM and Cohere's models."""


class LayerNormDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_norm(self) -> nn.Module:
        return LayerNorm(self.config.d_model, self.config.norm_eps, self.config.norm_bias)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
