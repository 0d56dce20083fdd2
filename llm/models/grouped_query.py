"""Grouped-query attention: each group of query heads shares one key and one value head.

    head_h = Attention(x W_q^h, x W_k^g, x W_v^g)        g = floor(h n_kv_heads / n_heads)        the baseline: g = h

Between multi-head (as many groups as heads) and multi-query attention (one): nearly the quality of the first at nearly
the cache of the second. GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints,
arXiv 2305.13245. Blog: Attention, GQA and MQA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class GroupedQueryConfig(DecoderConfig):
    """The baseline's sizes, four query heads to each key and value head."""

    n_kv_heads: int = 4
    """Key and value heads; must divide n_heads."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "n_kv_heads": 2}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "n_kv_heads")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}: choose a divisor "
                f"(--model.n-kv-heads)"
            )


class GroupedQuery(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
