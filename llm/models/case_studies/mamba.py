"""Mamba and Mamba-2 as they were published: one recurrent layer after another, and nothing else.

Mamba (Gu and Dao, December 2023, arXiv 2312.00752) was trained in five sizes from 130 M to 2.8 B parameters, on 300 B
tokens of the Pile. Mamba2 (Dao and Gu, May 2024, arXiv 2405.21060) has the same sizes; Codestral Mamba (Mistral, July
2024) has 7.3 B with eight pairs of B and C. Neither has positions, attention or feed-forward layers, and their state
does not grow with the text. The models of the ladder scale the embedding by sqrt(d_model); these take it as it is.
Blog: Case studies; State-space models.
Gallery: docs/gallery/index.html#mamba_lm, #mamba2_lm
"""

from dataclasses import dataclass

from torch import Tensor, nn

from llm.config import check_divides, check_positive
from llm.models.mamba import MambaDecoder
from llm.models.mamba2 import Mamba2Decoder
from llm.models.transformer import Transformer
from llm.modules.recurrent.mamba import Mamba
from llm.modules.recurrent.mamba2 import Mamba2


class MambaLM(MambaDecoder):
    """A step size, B and C for each token, and a decay for each channel and state."""

    embedding_std = Transformer.embedding_std

    @dataclass(frozen=True)
    class Config(MambaDecoder.Config):
        """18.7 M parameters by default, 5.1 M of them the embedding."""

        dt_rank: int | None = None
        """Width from which the steps of all channels are projected; where it is not given, d_model / 16."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "dt_rank")

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        sizes = dict(d_inner=c.expand * c.d_model, d_state=c.d_state, d_conv=c.d_conv, dt_rank=c.dt_rank)
        return Mamba(d_model=c.d_model, **sizes)


class Mamba2LM(Mamba2Decoder):
    """One decay for each head, and pairs of B and C that the heads of a group share."""

    embedding_std = Transformer.embedding_std

    @dataclass(frozen=True)
    class Config(Mamba2Decoder.Config):
        """18.8 M parameters by default, 5.1 M of them the embedding."""

        n_groups: int = 1
        """Pairs of B and C; must divide the number of heads, expand * d_model / head_dim."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_groups")
            check_divides(self, "n_groups", "n_heads")

        @property
        def n_heads(self) -> int:
            """Heads of a layer."""
            return self.expand * self.d_model // self.head_dim

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        heads = dict(n_heads=c.n_heads, head_dim=c.head_dim, n_groups=c.n_groups)
        return Mamba2(d_model=c.d_model, **heads, d_state=c.d_state, d_conv=c.d_conv, norm_eps=c.norm_eps)
