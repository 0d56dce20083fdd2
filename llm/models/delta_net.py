"""DeltaNet: linear attention that looks a key up before it writes, and stores only what is new.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = S_t^T q_t
    beta_t = max_beta sigmoid(x_t W_beta)

Linear attention: S_t = S_{t-1} + k_t v_t^T, where values of the same key pile up. Keys have length 1, queries
1 / sqrt(head width), and a short convolution precedes them. With max_beta = 2 the state can also flip signs (negative
eigenvalues). Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484; Unlocking
State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537. Blog: Linear attention.
Gallery: docs/gallery/index.html#delta_net
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.recurrent.delta import DeltaNet


class DeltaNetDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 4
        """Heads; must divide d_model."""
        max_beta: float = 1.0
        """Largest share of an old value that is replaced; 2 allows negative eigenvalues."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "max_beta")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return DeltaNet(d_model=c.d_model, n_heads=c.n_heads, max_beta=c.max_beta, norm_eps=c.norm_eps)
