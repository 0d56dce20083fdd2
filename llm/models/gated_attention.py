"""Gated attention: a sigmoid of the layer's input scales every channel of the heads before they are mixed.

    output = (sigmoid(x W_g) * [head_1 .. head_H]) W_o        the baseline: [head_1 .. head_H] W_o

Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free, arXiv 2505.06708.
Blog: Attention; case studies (Qwen3-Next).
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.gated import GatedAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class GatedAttentionConfig(DecoderConfig):
    """The baseline's sizes; the gate adds d_model x d_model parameters to each layer."""


class GatedAttentionDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = GatedAttention(d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
