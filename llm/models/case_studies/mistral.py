"""Mistral 7B: LLaMA's recipe with grouped heads and a window, so that the cache stops growing with the text.

Mistral 7B (Jiang et al., October 2023, arXiv 2310.06825) beat Llama 2 13B at half its size. Each layer sees the last
4,096 tokens, and keys are kept in a ring of as many slots. Over 32 layers, a token 131,000 tokens back can still have
an influence. The successors v0.2 and v0.3 replaced the window by full attention over 32,768 tokens with a base of
1,000,000: window_size None. Blog: Case studies; Attention, sliding window.
Gallery: docs/gallery/index.html#mistral
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import Window, causal


class Mistral(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        window_size: int | None = 128
        """Tokens that a token sees in each layer, itself among them; None: all."""

        small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "window_size": 64}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "window_size")

    def make_block(self, layer: int) -> Block:
        c = self.config
        mask = causal if c.window_size is None else Window(c.window_size)
        return Block(MultiHeadAttention(**grouped_heads(c), mask=mask), SwiGLU(c.d_model, c.d_ff), self.make_norm)
