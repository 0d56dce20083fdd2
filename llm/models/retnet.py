"""RetNet: linear attention whose heads forget, each at its own fixed rate, so that near tokens count more.

    S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        output = (SiLU(x W_g) * norm(o)) W_o

Queries and keys are rotated as in RoPE. The baseline: softmax attention. Values and gate are twice as wide as queries
and keys, and the feed-forward layer half as wide as the baseline's, as in the paper. Retentive Network: A Successor to
Transformer for Large Language Models, arXiv 2307.08621. Blog: Linear attention.
Gallery: docs/gallery/index.html#retnet
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.models.nope import NoPEDecoder
from llm.modules.position_encoding.rope import RoPE
from llm.modules.recurrent.retention import Retention


class RetNet(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 4
        """Heads; must divide d_model."""
        d_ff: int = 1024
        """Width of the feed-forward layer."""

        small: ClassVar[dict[str, Any]] = {**NoPEDecoder.Config.small, "d_ff": 256}

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        head_dim = c.d_model // c.n_heads
        return Retention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            v_head_dim=2 * head_dim,
            rope=RoPE(head_dim),
            norm_eps=c.norm_eps,
        )
