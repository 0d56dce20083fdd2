"""The baseline with its attention computed in tiles, as FlashAttention does: the same numbers, without T x S scores.

    m' = max(m, max_j s_j)        l' = exp(m - m') l + sum_j exp(s_j - m')        for each tile of keys, and at last
    o' = exp(m - m') o + sum_j exp(s_j - m') v_j                                  out = o / l

It computes what the baseline computes, up to rounding, in less memory. The other models call PyTorch's fused kernel,
the same algorithm. This one runs the loops of llm/modules/attention/flash.py in Python, to be read and stepped through,
and is therefore slower.

FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691. Blog: Attention, FlashAttention.
Gallery: docs/gallery/index.html#flash_attention
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.flash import FlashAttention


class FlashAttentionDecoder(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes, and the tile's."""

        tile_size: int = 128
        """Queries, and keys, in one tile of scores: smaller tiles take less memory and more steps."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "tile_size": 64}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "tile_size")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return FlashAttention(d_model=c.d_model, n_heads=c.n_heads, tile_size=c.tile_size)
