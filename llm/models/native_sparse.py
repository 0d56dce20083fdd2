"""Native Sparse Attention (NSA): compressed blocks, the blocks that these point to, and a window, mixed by gates.

    head = g_1 attention(q, compressed) + g_2 attention(q, selected) + g_3 attention(q, window)

Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, arXiv 2502.11089.
Blog: Attention, learned sparse attention.
Gallery: docs/gallery/index.html#native_sparse
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_divides, check_positive
from llm.models.baseline import Baseline
from llm.modules.sparse.native import NativeSparseAttention


class NativeSparse(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes with few key heads; blocks and window are a half to a quarter of the paper's."""

        n_kv_heads: int = 4
        """Key and value heads; must divide n_heads. Heads that share one share their selection."""
        compress_size: int = 16
        """Tokens in a compressed block; the paper: 32."""
        compress_stride: int = 8
        """Tokens from one compressed block to the next; must divide both block sizes. The paper: 16."""
        select_size: int = 16
        """Tokens in a block that is selected; the paper: 64."""
        n_selected: int = 6
        """Selected blocks, the first, the query's own and the one before among them; the paper: 16."""
        window_size: int = 128
        """Tokens that the window shows, the query's own among them; the paper: 512."""

        small: ClassVar[dict[str, Any]] = {
            **Baseline.Config.small,
            **dict(n_kv_heads=2, compress_size=8, compress_stride=4, select_size=8, n_selected=3, window_size=16),
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_kv_heads", "compress_size", "compress_stride", "select_size", "window_size")
            check_divides(self, "n_kv_heads", "n_heads")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return NativeSparseAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            compress_size=c.compress_size,
            compress_stride=c.compress_stride,
            select_size=c.select_size,
            n_selected=c.n_selected,
            window_size=c.window_size,
        )
