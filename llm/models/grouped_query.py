"""Grouped-query attention: each group of query heads shares one key and one value head.

    head_h = Attention(x W_q^h, x W_k^g, x W_v^g)        g = floor(h n_kv_heads / n_heads)        the baseline: g = h

It lies between multi-head attention, with as many groups as heads, and multi-query attention, with one: nearly the
quality of the first at nearly the cache of the second. GQA: Training Generalized Multi-Query Transformer Models from
Multi-Head Checkpoints, arXiv 2305.13245. Blog: Attention, GQA and MQA.
Gallery: docs/gallery/index.html#grouped_query
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_divides, check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.multi_head import MultiHeadAttention


class GroupedQuery(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes, four query heads to each key and value head."""

        n_kv_heads: int = 4
        """Key and value heads; must divide n_heads."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "n_kv_heads": 2}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_kv_heads")
            check_divides(self, "n_kv_heads", "n_heads")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads)
