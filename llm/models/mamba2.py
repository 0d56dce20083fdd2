"""Mamba-2: one decay for each head instead of one for each channel and state, so that a layer is made of matrix
products.

    S_t = d_t S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t        output = norm(y * SiLU(z)) W_o

Mamba: h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t. The simpler decay affords eight times the state.
Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
arXiv 2405.21060. Blog: State-space models.
Gallery: docs/gallery/index.html#mamba2
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.mamba import MambaDecoder
from llm.modules.recurrent.mamba2 import Mamba2


class Mamba2Decoder(MambaDecoder):
    @dataclass(frozen=True)
    class Config(MambaDecoder.Config):
        """18.8 M parameters by default, 5.1 M of them the embedding."""

        d_state: int = 128
        """Width of keys (B) and queries (C)."""
        head_dim: int = 64
        """Channels of a head; must divide expand * d_model."""

        small: ClassVar[dict[str, Any]] = {**MambaDecoder.Config.small, "d_state": 32, "head_dim": 32}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "head_dim")
            if self.expand * self.d_model % self.head_dim:
                raise ValueError(
                    f"head_dim = {self.head_dim} does not divide expand * d_model = {self.expand * self.d_model}: "
                    "choose a divisor (--model.head-dim)"
                )

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        n_heads = c.expand * c.d_model // c.head_dim
        return Mamba2(
            d_model=c.d_model,
            n_heads=n_heads,
            head_dim=c.head_dim,
            d_state=c.d_state,
            d_conv=c.d_conv,
            norm_eps=c.norm_eps,
        )
