"""LLaDA: LLaMA's recipe without its causal mask, trained from scratch to fill in hidden tokens.

LLaDA 8B (Nie et al., February 2025, arXiv 2502.09992) has LLaMA 3's parts with a key head for each query head, since it
keeps no cache that grouped heads would shrink, and a narrower feed-forward layer to make up for them. Token 126,336 of
its vocabulary stands for a hidden one. Trained on 2.3 T tokens, it was on a par with LLaMA 3 8B. It writes answers of a
fixed length, 32 tokens at a time, the surest first. Blog: Case studies, LLaDA; Diffusion.
Gallery: docs/gallery/index.html#llada
"""

from dataclasses import dataclass

from llm.config import flag
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.denoiser import Denoiser
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import everything


class LLaDA(Denoiser):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        mask_token: int | None = None
        """Entry of the vocabulary that stands for a hidden token; not given: a vector beside the vocabulary."""

        def __post_init__(self):
            super().__post_init__()
            if self.mask_token is not None and not 0 <= self.mask_token < self.vocab_size:
                raise ValueError(
                    f"mask_token = {self.mask_token} is no entry of a vocabulary of {self.vocab_size} "
                    f"({flag(self, 'mask_token')})"
                )

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(**grouped_heads(c), mask=everything)
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
