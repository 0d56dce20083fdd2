"""Phi-3 and Phi-4: LLaMA's recipe on curated text, with a part of each head turned and a searched RoPE for 128K tokens.

Phi-3 Technical Report (Microsoft, April 2024, arXiv 2404.14219) puts the progress into the data; the architecture is
Llama 2's, so that its tools work. Phi-3-mini sees a window of 2,047 tokens of its 4,096; LongRoPE extends it to
131,072. Phi-4-mini (March 2025, arXiv 2503.01743) turns three quarters of the channels of each head, shares keys in
groups and ties the head. Checkpoints hold q, k and v in one matrix, and gate and up in another.
Blog: Case studies; Position encoding, longer context.
Gallery: docs/gallery/index.html#phi3
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, check_share, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import Window, causal


class Phi3(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        window_size: int | None = None
        """Tokens that a token sees in each layer, itself among them; None: all."""
        partial_rotary_factor: float = 0.75
        """The share of each head that RoPE turns."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "window_size")
            check_share(self, "partial_rotary_factor")

    def make_block(self, layer: int) -> Block:
        c = self.config
        return Block(self.make_mixer(layer), SwiGLU(c.d_model, c.d_ff), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        mask = causal if c.window_size is None else Window(c.window_size)
        return MultiHeadAttention(**grouped_heads(c, c.partial_rotary_factor), mask=mask)
