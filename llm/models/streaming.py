"""StreamingLLM: the first tokens of the text kept beside a sliding window.

    token i sees token j <= i where   j < n_first   or   i - j < window_size        the baseline: j <= i

Beside `sliding_window` it shows what the first tokens are worth. Efficient Streaming Language Models with Attention
Sinks, arXiv 2309.17453. Blog: Attention, attention sinks.
Gallery: docs/gallery/index.html#streaming
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.attention.streaming import StreamingAttention


class Streaming(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes, the window of `sliding_window` and the paper's four first tokens."""

        n_first: int = 4
        """Tokens at the start of the text that every token sees."""
        window_size: int = 128
        """Latest tokens that a token sees, itself among them."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "window_size": 64}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_first", "window_size")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return StreamingAttention(n_first=c.n_first, window_size=c.window_size, d_model=c.d_model, n_heads=c.n_heads)
