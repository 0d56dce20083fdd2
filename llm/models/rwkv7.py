"""RWKV-7: a state that is erased along one direction and written along another; layers see the token before.

    time mix       S_t = diag(w_t) S_{t-1} - (a_t * c_t) (S_{t-1}^T c_t)^T + k_t v_t^T        the baseline: attention
    channel mix    relu(x' W_k)^2 W_v                                     the baseline: GELU(x W_k) W_v

x' is a mixture of a token and the one before it. The values of the first layer are mixed into those of all others, so
blocks hand them on beside the stream.
RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456. Blog: Linear attention.
Gallery: docs/gallery/index.html#rwkv7
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llm.config import check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.blocks import Block
from llm.modules.cache import Cache
from llm.modules.norms import LayerNorm
from llm.modules.recurrent.rwkv7 import ChannelMix, TimeMix


class RWKV7(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """18.5 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 8
        """Heads of the time mix, 64 channels wide in the paper; must divide d_model."""
        decay_rank: int = 32
        """Rank of the matrices that give the decays, and of those that give a."""
        value_rank: int = 32
        """Rank of the matrices that say how much of the first layer's values is mixed in."""
        gate_rank: int = 96
        """Rank of the matrices that give the output gate."""

        small: ClassVar[dict[str, Any]] = {
            **NoPEDecoder.Config.small,
            "decay_rank": 8,
            "value_rank": 8,
            "gate_rank": 24,
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "decay_rank", "value_rank", "gate_rank")

    def make_norm(self) -> nn.Module:
        return LayerNorm(self.config.d_model, self.config.norm_eps)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        ranks = {"decay": c.decay_rank, "a": c.decay_rank, "value": c.value_rank, "gate": c.gate_rank}
        return TimeMix(d_model=c.d_model, n_heads=c.n_heads, ranks=ranks, value_residual=layer > 0)

    def make_ffn(self, layer: int) -> nn.Module:
        return ChannelMix(self.config.d_model, self.config.d_ff)

    def make_block(self, layer: int) -> nn.Module:
        return RWKVBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)

    def run_blocks(self, x: Tensor, positions: Tensor, layers: list[dict | None], tokens: Tensor) -> Tensor:
        """The values of the first layer go beside the stream to all other layers."""
        v_first = None
        for block, layer_cache in zip(self.blocks, layers, strict=True):
            x, v_first = block(x, positions, layer_cache, v_first)
        return x

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        cache = super().make_cache(batch_size, length, padding)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            layer |= block.ffn.make_cache(batch_size)
        return cache


class RWKVBlock(Block):
    """The pre-norm block, which takes and returns the first layer's values beside the stream."""

    def forward(
        self, x: Tensor, positions: Tensor, cache: dict | None = None, v_first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mixed, v_first = self.mixer(self.mixer_norm(x), positions, cache, v_first)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x), positions, cache), v_first
