"""RoPE decoder: queries and keys are turned by their positions, and nothing is added to the embedding.

    score(i, j) = (R_i q_i) . (R_j k_j) / sqrt(d) = q_i . R_(j - i) k_j / sqrt(d)        the baseline: without R

R_p turns channels c and c + d/2 of a head, as a pair, by p theta^(-2c / d): what is left is the distance.

RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864. Blog: Position encoding, RoPE.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.rope import RoPE


@dataclass(frozen=True)
class RoPEConfig(DecoderConfig):
    """The baseline's sizes and the base of the rotation."""

    rope_theta: float = 10_000.0
    """Base of the rotation frequencies; raise it for longer contexts."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "rope_theta")


class RoPEDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        rope = RoPE(c.d_model // c.n_heads, c.rope_theta)
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, rope=rope)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
