"""Sliding-window attention: each token sees the last `window_size` tokens, itself among them.

    token i sees token j where i - window_size < j <= i        the baseline: j <= i

Cost and cache stop growing with the text. Information moves one window further in each layer: after L layers a token
depends on the last L windows.
Longformer: The Long-Document Transformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825.
Blog: Attention, sparse attention.
Gallery: docs/gallery/index.html#sliding_window
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import Window


class SlidingWindow(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes and a window of a quarter of the context."""

        window_size: int = 128
        """Tokens that a token sees in each layer, itself among them."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "window_size": 64}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "window_size")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, mask=Window(c.window_size))
