"""Mamba: blocks of one selective state-space layer each, without attention and without a feed-forward layer.

    x = x + mamba(norm(x))        the baseline: x + attention(norm(x)), then x + FFN(norm(x))

    h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t        y_t = h_t . C_t + D u_t        output = (y * SiLU(z)) W_o

A layer widens the stream twofold and gates it, so it does a feed-forward layer's work, too. It has half of the
parameters of the baseline's block, hence twice as many blocks. Mamba: Linear-Time Sequence Modeling with Selective
State Spaces, arXiv 2312.00752. Blog: State-space models.
Gallery: docs/gallery/index.html#mamba
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import ModelConfig, check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.blocks import MixerBlock
from llm.modules.recurrent.mamba import Mamba


class MambaDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(ModelConfig):
        """18.7 M parameters by default, 5.1 M of them the embedding."""

        n_layers: int = 8
        """Number of blocks."""
        expand: int = 2
        """Channels inside a layer, in multiples of d_model."""
        d_state: int = 16
        """Numbers that a channel keeps."""
        d_conv: int = 4
        """Tokens that the short convolution mixes."""

        small: ClassVar[dict[str, Any]] = {**ModelConfig.small, "n_layers": 8}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "expand", "d_state", "d_conv")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return Mamba(d_model=c.d_model, d_inner=c.expand * c.d_model, d_state=c.d_state, d_conv=c.d_conv)

    def make_block(self, layer: int) -> nn.Module:
        return MixerBlock(self.make_mixer(layer), self.make_norm)
