"""Sliding-window attention: each token sees the last `window_size` tokens, itself among them.

    token i sees token j where i - window_size < j <= i        the baseline: j <= i

Cost and cache stop growing with the text. A layer hands on what it saw, so after L layers a token knows of L windows.
Longformer: The Long-Document Transformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825.
Blog: Attention, sparse attention.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.masks import window
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class SlidingWindowConfig(DecoderConfig):
    """The baseline's sizes and a window of a quarter of the context."""

    window_size: int = 128
    """Tokens that a token sees in each layer, itself among them."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "window_size": 64}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "window_size")


class SlidingWindow(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, visible=window(c.window_size))
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
