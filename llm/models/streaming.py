"""StreamingLLM: the first tokens of the text kept beside a sliding window.

    token i sees token j <= i where   j < n_first   or   i - j < window_size        the baseline: j <= i

The difference to `sliding_window` is what the first tokens are worth. Efficient Streaming Language Models with
Attention Sinks, arXiv 2309.17453. Blog: Attention, attention sinks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.streaming import StreamingAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class StreamingConfig(DecoderConfig):
    """The baseline's sizes, the window of `sliding_window` and the paper's four first tokens."""

    n_first: int = 4
    """Tokens at the start of the text that every token sees."""
    window_size: int = 128
    """Latest tokens that a token sees, itself among them."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "window_size": 64}

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_first", "window_size"):
            check_positive(self, name)


class Streaming(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = StreamingAttention(
            n_first=c.n_first, window_size=c.window_size, d_model=c.d_model, n_heads=c.n_heads
        )
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
