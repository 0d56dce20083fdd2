"""RoPE decoder: queries and keys are rotated by their positions, and nothing is added to the embedding.

    score(i, j) = (R_i q_i) . (R_j k_j) / sqrt(d) = q_i . R_(j - i) k_j / sqrt(d)        the baseline: without R

R_p rotates channels c and c + d/2 of a head, as a pair, by p theta^(-2c / d). Positions enter only as j - i.

RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864. Blog: Position encoding, RoPE.
Gallery: docs/gallery/index.html#rope
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.position_encoding.rope import RoPE


class RoPEDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """The baseline's sizes and the base of the rotation."""

        rope_theta: float = 10_000.0
        """Base of the rotation frequencies; raise it for longer contexts."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "rope_theta")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        rope = RoPE(c.d_model // c.n_heads, c.rope_theta)
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, rope=rope)
