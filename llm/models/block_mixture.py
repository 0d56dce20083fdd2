"""Mixture of Block Attention (MoBA): each query chooses a few blocks of earlier keys and attends to these.

    a query sees its own block and the top k - 1 earlier ones by q . mean(keys)        the baseline: all of them

MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189. Blog: Attention, learned sparse attention.
Gallery: docs/gallery/index.html#block_mixture
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.sparse.block_mixture import BlockMixtureAttention


class BlockMixture(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes; a query sees at most four of the sixteen blocks."""

        block_size: int = 32
        """Tokens in a block."""
        top_k: int = 4
        """Blocks that a query attends to, its own among them."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "block_size": 8, "top_k": 2}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "block_size", "top_k")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return BlockMixtureAttention(d_model=c.d_model, n_heads=c.n_heads, block_size=c.block_size, top_k=c.top_k)
