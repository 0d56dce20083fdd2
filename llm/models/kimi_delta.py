"""Kimi Delta Attention: the gated delta rule with a decay for each channel of the keys.

    S' = diag(d_t) S_{t-1}        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T        o_t = S_t^T q_t

Gated DeltaNet: one d_t for a whole head. The decays and the sigmoid gate of the output are read from the token by
matrices of low rank. Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv 2510.26692. Blog: Linear
attention.
Gallery: docs/gallery/index.html#kimi_delta
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.delta_net import DeltaNetDecoder
from llm.modules.recurrent.delta import KimiDeltaAttention


class KimiDelta(DeltaNetDecoder):
    @dataclass(frozen=True)
    class Config(DeltaNetDecoder.Config):
        """18.0 M parameters by default, 5.1 M of them the embedding."""

        gate_rank: int = 32
        """Rank of the matrices that give decays and gate; Kimi Linear takes the width of a head."""

        small: ClassVar[dict[str, Any]] = {**DeltaNetDecoder.Config.small, "gate_rank": 8}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "gate_rank")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return KimiDeltaAttention(
            d_model=c.d_model, n_heads=c.n_heads, gate_rank=c.gate_rank, max_beta=c.max_beta, norm_eps=c.norm_eps
        )
