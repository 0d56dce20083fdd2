"""SDAR: a Qwen3 that was trained on to write block after block, the four tokens of a block by diffusion.

SDAR (Cheng et al., October 2025, arXiv 2510.06303) starts from the weights of Qwen3, as Dream starts from Qwen2.5. It
stays closer to the decoder: earlier blocks are seen as before and stay in the cache, and only the tokens of one block
see the later ones. Unlike Dream's, its head predicts a hidden token in its own place. Token 151,669 of the vocabulary
stands for a hidden one. There are checkpoints with blocks of 4, 8, 16, 32 and 64 tokens; where config.json names no
block size, it is 4.
Blog: Case studies; Diffusion.
Gallery: docs/gallery/index.html#sdar
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llm.config import check_divides, check_positive
from llm.models.block_denoiser import BlockDenoiser
from llm.models.case_studies.config import grouped_heads
from llm.models.case_studies.llada import LLaDA
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import NOISY, BlockCausal
from llm.modules.norms import RMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling


class RoPEOfTwoCopies(RoPE):
    """The noisy copy of a text is rotated like the clean one."""

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super().cos_sin(positions % NOISY)


class SDAR(BlockDenoiser):
    """Qwen3's norms on queries and keys, and the mask of block diffusion."""

    @dataclass(frozen=True)
    class Config(LLaDA.Config):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        block_size: int = 4
        """Tokens that are written together; must divide max_seq_len."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "block_size")
            check_divides(self, "block_size", "max_seq_len")

    def make_block(self, layer: int) -> Block:
        c = self.config
        rope = RoPEOfTwoCopies(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling))
        options = {**grouped_heads(c), "rope": rope, "mask": BlockCausal(c.block_size)}
        attention = MultiHeadAttention(**options, qk_norm=partial(RMSNorm, eps=c.norm_eps))
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
