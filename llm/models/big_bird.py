"""BigBird: a few global blocks, the blocks nearby and some drawn at random, other ones in each layer.

    block i sees block j <= i where   j < n_global   or   i - j < n_window   or   j is one of i's n_random draws

Where it sees its own block, a token sees what came before it, as in the baseline, where block i sees all j <= i.
Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, with causal order. Blog: Attention, sparse attention.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.big_bird import big_bird
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class BigBirdConfig(DecoderConfig):
    """The baseline's sizes; a block sees at most five of the sixteen."""

    block_size: int = 32
    """Tokens in a block."""
    n_global: int = 1
    """Blocks at the start of the text that every token sees."""
    n_window: int = 2
    """Blocks nearby that a token sees, its own among them."""
    n_random: int = 2
    """Blocks between those that a token sees by chance; less where two draws fall on one."""
    mask_seed: int = 0
    """Draws the random blocks."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "block_size": 16}

    def __post_init__(self):
        super().__post_init__()
        big_bird(block_size=self.block_size, n_global=self.n_global, n_window=self.n_window, n_random=self.n_random)


class BigBird(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        visible = big_bird(
            block_size=c.block_size,
            n_global=c.n_global,
            n_window=c.n_window,
            n_random=c.n_random,
            seed=c.mask_seed,
            layer=layer,
        )
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, visible=visible)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
