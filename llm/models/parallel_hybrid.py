"""A parallel hybrid: in each layer, attention heads and Mamba-2 heads read the same input, and their outputs are added.

    x = x + attention(norm(x)) + mamba2(norm(x))        the baseline: x + attention(norm(x))

Attention looks details up, the state sums the text up, and each token can use both. By default each has half of the
parameters of the baseline's attention. Falcon-H1: A Family of Hybrid-Head Language Models, arXiv 2507.22448.
Blog: State-space models, hybrids.
Gallery: docs/gallery/index.html#parallel_hybrid
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.recurrent.mamba2 import Mamba2
from llm.modules.recurrent.parallel import ParallelMixers


class ParallelHybrid(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 8
        """Attention heads."""
        n_mamba_heads: int = 8
        """Heads of Mamba-2."""
        head_dim: int = 32
        """Channels of a head, of either kind."""
        d_state: int = 128
        """Width of Mamba-2's keys and queries."""

        small: ClassVar[dict[str, Any]] = {
            **NoPEDecoder.Config.small,
            "n_mamba_heads": 4,
            "head_dim": 16,
            "d_state": 32,
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_mamba_heads", "head_dim", "d_state")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return ParallelMixers(
            attention=MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, head_dim=c.head_dim),
            mamba=Mamba2(
                d_model=c.d_model,
                n_heads=c.n_mamba_heads,
                head_dim=c.head_dim,
                d_state=c.d_state,
                norm_eps=c.norm_eps,
            ),
        )
