"""The textbook decoder that every variant is compared with.

    x = sqrt(d_model) E[token_p] + PE(p)
    x = x + attention(norm(x))        x = x + GELU(norm(x) W_up) W_down        in each block
    logits = norm(x) E^T

Sinusoidal positions PE, multi-head attention, a GELU feed-forward layer, RMSNorm before each of the two (pre-norm) and
before the head, which shares its matrix E with the token embedding.

Attention Is All You Need, arXiv 1706.03762; decoder-only as in GPT-2. Blog: Overview.
Gallery: docs/gallery/index.html#baseline
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llm.config import ModelConfig, check_divides, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


class Baseline(Transformer):
    """A variant subclasses this and overrides the one step that it changes."""

    @dataclass(frozen=True)
    class Config(ModelConfig):
        """About 17.7 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 16
        """Attention heads; must divide d_model."""
        d_ff: int = 2048
        """Width of the feed-forward layer."""

        small: ClassVar[dict[str, Any]] = {**ModelConfig.small, "n_heads": 4, "d_ff": 512}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_heads", "d_ff")
            check_divides(self, "n_heads", "d_model", " or another width (--model.d-model)")

    @property
    def embedding_std(self) -> float:
        """Multiplied by sqrt(d_model) this is 1: scaled embeddings start with variance 1."""
        return self.config.d_model**-0.5

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_mixer(self, layer: int) -> nn.Module:
        """The attention of the block at depth `layer`."""
        return MultiHeadAttention(d_model=self.config.d_model, n_heads=self.config.n_heads)

    def make_ffn(self, layer: int) -> nn.Module:
        """The feed-forward layer of the block at depth `layer`."""
        return MLP(self.config.d_model, self.config.d_ff)

    def make_block(self, layer: int) -> nn.Module:
        return Block(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
