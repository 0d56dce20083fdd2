"""Soft-capped attention: scores bend towards a ceiling instead of growing without bound.

    score(i, j) = c tanh(s / c), s = q_i . k_j / sqrt(d)        the baseline: s

Gemma 2: Improving Open Language Models at a Practical Size, arXiv 2408.00118. Blog: Attention; case studies.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.soft_capping import SoftCappedAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class SoftCappingConfig(DecoderConfig):
    """The baseline's sizes and Gemma 2's cap."""

    soft_cap: float = 50.0
    """Scores stay between -soft_cap and soft_cap."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "soft_cap")


class SoftCapping(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = SoftCappedAttention(soft_cap=c.soft_cap, d_model=c.d_model, n_heads=c.n_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
