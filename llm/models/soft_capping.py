"""Soft-capped attention: scores approach a ceiling instead of growing without bound.

    score(i, j) = c tanh(s / c), s = q_i . k_j / sqrt(d)        the baseline: s

Gemma 2: Improving Open Language Models at a Practical Size, arXiv 2408.00118. Blog: Attention; case studies.
Gallery: docs/gallery/index.html#soft_capping
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.soft_capping import SoftCappedAttention


class SoftCapping(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes and Gemma 2's cap."""

        soft_cap: float = 50.0
        """Scores stay between -soft_cap and soft_cap."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "soft_cap")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return SoftCappedAttention(soft_cap=c.soft_cap, d_model=c.d_model, n_heads=c.n_heads)
