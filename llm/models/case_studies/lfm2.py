"""LFM2: short gated convolutions in most layers, attention in a few, for phones and laptops.

    conv:        x = x + W_o (C * conv(B * u)),  [B | C | u] = norm(x) W_in        each channel, its last three tokens
    attention:   grouped heads, query and key heads normalised, RoPE

LFM2 Technical Report (Liquid AI, November 2025, arXiv 2511.23404): a search over mixers, judged by speed on devices and
by quality, kept no recurrent layer: convolutions over three tokens were enough beside attention. Ten of the sixteen
layers of the 1.2B model are convolutions, whose cache is two vectors. Six layers of attention carry everything over
longer distances. The feed-forward layers are SwiGLU. Blog: Case studies; State-space models, hybrids.
Gallery: docs/gallery/index.html#lfm2
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from llm.config import check_layer_types, check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.norms import RMSNorm
from llm.modules.recurrent.short_convolution import GatedConvolution

LayerType = Literal["conv", "full_attention"]


class LFM2(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """17.7 M parameters by default, 5.1 M of them the embedding: six layers, so that two are attention."""

        n_layers: int = 6
        """Number of blocks."""
        d_ff: int = 768
        """Width of the gated feed-forward layer."""
        rope_theta: float = 1_000_000.0
        """Base of the rotation; raise it for longer contexts."""
        layer_types: tuple[LayerType, ...] = ("conv", "conv", "full_attention")
        """The mixer of each block; a pattern shorter than n_layers is repeated."""
        conv_width: int = 3
        """Tokens that a convolution sees, the current one among them."""
        conv_bias: bool = False
        """Biases in the convolution and in the projections around it."""

        small: ClassVar[dict[str, Any]] = {
            **CaseStudyConfig.small,
            **dict(d_ff=192, layer_types=("conv", "full_attention")),
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "conv_width")
            check_layer_types(self, LayerType.__args__)

        def layer_type(self, layer: int) -> LayerType:
            return self.layer_types[layer % len(self.layer_types)]

    def make_block(self, layer: int) -> Block:
        return Block(self.make_mixer(layer), SwiGLU(self.config.d_model, self.config.d_ff), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "conv":
            return GatedConvolution(d_model=c.d_model, width=c.conv_width, bias=c.conv_bias)
        return MultiHeadAttention(**grouped_heads(c), qk_norm=partial(RMSNorm, eps=c.norm_eps))
