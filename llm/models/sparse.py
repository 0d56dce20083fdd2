"""Sparse Transformer with its "fixed" pattern: layers look in turn into their own block and at all blocks' summaries.

    even layers: token i sees j <= i where floor(j / stride) = floor(i / stride)
    odd layers:  token i sees j <= i where j mod stride >= stride - n_summary, or j = i        the baseline: j <= i

Even layers: the tokens since the block of `stride` began. Odd layers: the last `n_summary` tokens of every block, which
have just gathered what is in theirs. So two layers reach every finished block, and with a stride of sqrt(T) each looks
at a multiple of sqrt(T) keys instead of T. The paper offers three ways to combine the two patterns: one per layer in
turn (here), one per head, or both in each head. Generating Long Sequences with Sparse Transformers, arXiv 1904.10509.
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
from llm.modules.masks import own_block, summaries
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class SparseConfig(DecoderConfig):
    """The baseline's sizes; blocks of about the root of the context."""

    stride: int = 32
    """Tokens in a block; the paper advises about the square root of max_seq_len."""
    n_summary: int = 4
    """Tokens at the end of each block that later blocks see."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "stride": 16, "n_summary": 2}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "stride")
        summaries(self.stride, self.n_summary)


class Sparse(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        visible = summaries(c.stride, c.n_summary) if layer % 2 else own_block(c.stride)
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, visible=visible)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
