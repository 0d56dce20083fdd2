"""Ministral 3: Mistral's recipe at 256K tokens, with queries that grow as the text does.

Ministral 3 (Mistral AI, January 2026, arXiv 2601.08584) comes in 3 B, 8 B and 14 B parameters, all with vision; this is
the part that reads text. There is no window any more. YaRN extends RoPE from 16,384 tokens by a factor of 16. Beyond
16,384 tokens, queries are multiplied by a factor that grows with the logarithm of the position, since a softmax over
more keys is flatter (Scalable-Softmax Is Superior for Attention, arXiv 2501.19399; first shipped in Llama 4).
Blog: Case studies; Position encoding, longer context.
Gallery: docs/gallery/index.html#ministral3
"""

from dataclasses import dataclass

from torch import nn

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.length_scaled import LengthScaledAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import Window, causal


class Ministral3(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        query_growth: float = 0.1
        """The factor of queries is 1 + query_growth ln(1 + floor(position / query_length))."""
        query_length: int = 128
        """Tokens up to which queries stay as they are."""
        window_size: int | None = None
        """Tokens that a token sees in each layer, itself among them; None: all."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "query_length", "window_size")

    def make_block(self, layer: int) -> Block:
        c = self.config
        return Block(self.make_mixer(layer), SwiGLU(c.d_model, c.d_ff), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        mask = causal if c.window_size is None else Window(c.window_size)
        growth = dict(growth=c.query_growth, length=c.query_length)
        return LengthScaledAttention(**grouped_heads(c), **growth, mask=mask)
