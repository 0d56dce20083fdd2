"""The baseline with SwiGLU for the GELU layer: a gate, and 2/3 of the width, so that the parameters stay as many.

    FFN(x) = (SiLU(x W_gate) * (x W_up)) W_down

GLU Variants Improve Transformer, arXiv 2002.05202; the choice of LLaMA, arXiv 2302.13971. Blog: Activations, GLU.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU, gated_width
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class SwiGLUConfig(DecoderConfig):
    """`d_ff` stays the width of the layer that is replaced: the gated one is 2/3 as wide."""


class SwiGLUDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, SwiGLU(c.d_model, gated_width(c.d_ff)), self.make_norm)
