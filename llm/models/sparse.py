"""Sparse Transformer, "fixed" pattern: layers alternate between the own block and the last tokens of all blocks.

    even layers: token i sees j <= i where floor(j / stride) = floor(i / stride)
    odd layers:  token i sees j <= i where j mod stride >= stride - n_summary, or j = i        the baseline: j <= i

Layers count from 0, blocks have `stride` tokens. In even layers a token sees its own block up to itself. In odd layers
it sees the last `n_summary` tokens of every block; the last of them has read its whole block in the layer before. So
two layers reach every finished block, and with a stride of sqrt(T) a query sees about sqrt(T) or n_summary sqrt(T)
keys, not T. The paper uses the patterns in alternate layers (as here), in different heads, or merged in one head.
Generating Long Sequences with Sparse Transformers, arXiv 1904.10509. Blog: Attention, sparse attention.
Gallery: docs/gallery/index.html#sparse
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import OwnBlock, Summaries


class Sparse(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes and those of the sparse pattern."""

        stride: int = 32
        """Tokens in a block; the paper advises about the square root of max_seq_len."""
        n_summary: int = 4
        """Tokens at the end of each block that all later tokens see."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "stride": 16, "n_summary": 2}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "stride")
            Summaries(self.stride, self.n_summary)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        mask = Summaries(c.stride, c.n_summary) if layer % 2 else OwnBlock(c.stride)
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, mask=mask)
