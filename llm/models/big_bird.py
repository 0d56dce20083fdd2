"""BigBird: a few global blocks, the blocks nearby and some drawn at random, with other draws in each layer.

    block i sees block j <= i where   j < n_global   or   i - j < n_window   or   j is one of i's n_random draws

In its own block, a token sees what came before it. In the baseline, block i sees all j <= i.
Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, with causal order. Blog: Attention, sparse attention.
Gallery: docs/gallery/index.html#big_bird
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_not_negative, check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.big_bird import BigBird as BigBirdMask
from llm.modules.attention.multi_head import MultiHeadAttention


class BigBird(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes; a block sees at most five of the sixteen."""

        block_size: int = 32
        """Tokens in a block."""
        n_global: int = 1
        """Blocks at the start of the text that every token sees."""
        n_window: int = 2
        """Blocks nearby that a token sees, its own among them."""
        n_random: int = 2
        """Blocks drawn at random that a token sees; fewer where two draws fall on one block."""
        mask_seed: int = 0
        """Draws the random blocks."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "block_size": 16}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "block_size", "n_window")
            check_not_negative(self, "n_global", "n_random")
            self.mask(layer=0)

        def mask(self, layer: int) -> BigBirdMask:
            """What the tokens of a layer see."""
            return BigBirdMask(
                block_size=self.block_size,
                n_global=self.n_global,
                n_window=self.n_window,
                n_random=self.n_random,
                seed=self.mask_seed,
                layer=layer,
            )

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, mask=c.mask(layer))
