"""Qwen 2 and 3: LLaMA's recipe with a bias on queries, keys and values, and then with a norm on them instead.

Qwen2 (July 2024, arXiv 2407.10671; Qwen2.5, arXiv 2412.15115, has the same architecture) keeps one oddity of the first
Qwen: biases in the query, key and value projections, none elsewhere. Qwen3 (May 2025, arXiv 2505.09388) drops them and
normalises each query and key head before RoPE, which bounds the scores and makes training stable; its heads are 128
wide whatever d_model / n_heads is. Small models of both tie the head to the embedding, which is large: 151,936 entries.
Both formats know layers with a window, which hardly any checkpoint uses.
Blog: Case studies, Qwen; Normalization, QK-norm.
Gallery: docs/gallery/index.html#qwen2, #qwen3
"""

from dataclasses import dataclass
from functools import partial

from llm.models.case_studies.config import LayerType, WindowedConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.norms import RMSNorm


class Qwen2(Transformer):
    """Biases on queries, keys and values."""

    @dataclass(frozen=True)
    class Config(WindowedConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        layer_types: tuple[LayerType, ...] = ("full_attention",)
        """What the layers see, in turn: the window or everything."""

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(**grouped_heads(c), mask=c.mask(layer), qkv_bias=True)
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)


class Qwen3(Transformer):
    """A norm on each query and key head."""

    @dataclass(frozen=True)
    class Config(WindowedConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        layer_types: tuple[LayerType, ...] = ("full_attention",)
        """What the layers see, in turn: the window or everything."""
        attention_bias: bool = False
        """Biases in attention, in checkpoints that have them."""

    def make_block(self, layer: int) -> Block:
        c = self.config
        options = dict(mask=c.mask(layer), qkv_bias=c.attention_bias, o_bias=c.attention_bias)
        attention = MultiHeadAttention(**grouped_heads(c), **options, qk_norm=partial(RMSNorm, eps=c.norm_eps))
        return Block(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
