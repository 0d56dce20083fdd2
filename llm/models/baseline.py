"""The textbook decoder that every variant is compared with.

    x = sqrt(d_model) E[token_p] + PE(p)
    x = x + attention(norm(x))        x = x + GELU(norm(x) W_up) W_down        in each block
    logits = norm(x) E^T

Sinusoidal positions PE, multi-head attention, a GELU feed-forward layer, RMSNorm before each of the two (pre-norm) and
before the head, which shares its matrix E with the token embedding.

Attention Is All You Need, arXiv 1706.03762; decoder-only as in GPT-2. Blog: Overview.
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
class BaselineConfig(DecoderConfig):
    """About 17.7 M parameters by default, 5.1 M of them the embedding."""


class Baseline(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
