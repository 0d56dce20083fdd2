"""Dream: a Qwen2.5 that was trained on to fill in hidden tokens, its head still one place ahead.

Dream 7B (Ye et al., August 2025, arXiv 2508.15487) starts from the weights of Qwen2.5 7B, which saves most of the
training that LLaDA needed. To keep what those weights know, the output at place i - 1 still predicts token i, as in a
decoder; only the causal mask is gone. Blog: Case studies; Diffusion.
Gallery: docs/gallery/index.html#dream
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.models.case_studies.config import grouped_heads
from llm.models.case_studies.llada import LLaDA
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.masks import everything


class Dream(LLaDA):
    """Biases on queries, keys and values, and predictions shifted by one place."""

    @dataclass(frozen=True)
    class Config(LLaDA.Config):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(**grouped_heads(c), qkv_bias=True, mask=everything)
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)

    def aligned(self, x: Tensor) -> Tensor:
        """The first token has nothing before it and is predicted in its own place."""
        return torch.cat([x[:, :1], x[:, :-1]], 1)
