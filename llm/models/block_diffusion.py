"""Block diffusion: one block after the other as in a decoder, the tokens of a block by diffusion.

    -log p(x) = sum_b -log p(block_b | blocks before)               each term bounded as in masked diffusion

In training all blocks are denoised in one pass over two copies of the text. A hidden or visible token of the noisy copy
sees its own noisy block and the earlier blocks of the clean copy; the clean copy sees its own and earlier blocks. So
each token goes through the blocks twice. In writing, finished blocks are kept in the cache, which masked diffusion
cannot do. Blocks of one token are the autoregressive objective, and one block for the whole text is masked diffusion.
The two copies and the writing are in block_denoiser.py.

Block Diffusion (BD3-LM), arXiv 2503.09573. Blog: Diffusion.
Gallery: docs/gallery/index.html#block_diffusion
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_divides, check_positive
from llm.models.baseline import Baseline
from llm.models.block_denoiser import BlockDenoiser
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import BlockCausal


class BlockDiffusion(BlockDenoiser, Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes and blocks of four tokens."""

        block_size: int = 4
        """Tokens that are written together; must divide max_seq_len."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "block_size")
            check_divides(self, "block_size", "max_seq_len")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, mask=BlockCausal(c.block_size))
