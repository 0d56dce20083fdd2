"""Gated DeltaNet: the delta rule in a state that can also be cleared at once.

    S' = d_t S_{t-1}        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T        o_t = S_t^T q_t

DeltaNet: d_t = 1, so each old key must be overwritten by itself. d_t is Mamba-2's decay, one for each head, and a SiLU
gate multiplies the output. Queries and keys are half as wide as values, which makes room for the gate. Gated Delta
Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; three of four layers of Qwen3-Next. Blog: Linear
attention.
Gallery: docs/gallery/index.html#gated_delta_net
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_even_heads
from llm.models.delta_net import DeltaNetDecoder
from llm.modules.recurrent.delta import GatedDeltaNet


class GatedDeltaNetDecoder(DeltaNetDecoder):
    @dataclass(frozen=True)
    class Config(DeltaNetDecoder.Config):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 4
        """Heads; must divide d_model, into an even width."""

        def __post_init__(self):
            super().__post_init__()
            check_even_heads(self)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return GatedDeltaNet(
            d_model=c.d_model,
            n_heads=c.n_heads,
            head_dim=c.d_model // c.n_heads // 2,
            max_beta=c.max_beta,
            norm_eps=c.norm_eps,
        )
