"""The baseline with its attention computed in tiles, as FlashAttention does: the same numbers, without T x S scores.

    m' = max(m, max_j s_j)        l' = exp(m - m') l + sum_j exp(s_j - m')        for each tile of keys, and at last
    o' = exp(m - m') o + sum_j exp(s_j - m') v_j                                  out = o / l

It computes what the baseline computes, up to rounding: what changed is the memory. The other models call PyTorch's
fused `scaled_dot_product_attention`, the same algorithm in one kernel; this one runs the loops of
llm/modules/attention/flash.py in Python, to be read and stepped through, and is therefore slower.

FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691. Blog: Attention, FlashAttention.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.flash import FlashAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class FlashAttentionConfig(DecoderConfig):
    """The baseline's sizes, and the tile's."""

    tile_size: int = 128
    """Queries, and keys, in one tile of scores: smaller tiles take less memory and more steps."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "tile_size": 64}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "tile_size")


class FlashAttentionDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = FlashAttention(d_model=c.d_model, n_heads=c.n_heads, tile_size=c.tile_size)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
