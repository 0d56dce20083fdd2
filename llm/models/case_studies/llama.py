"""LLaMA, the recipe of most open models: RoPE, RMSNorm before each sublayer, SwiGLU, no biases.

LLaMA (Touvron et al., February 2023, arXiv 2302.13971) combined known parts: pre-norm with RMSNorm for stable training,
SwiGLU from PaLM for quality, RoPE from GPT-NeoX for relative positions. It was trained on more tokens than was usual
for its size. Llama 2 (July 2023, arXiv 2307.09288) doubled the context to 4,096 and gave the 70B model grouped-query
attention. Llama 3 (2024, arXiv 2407.21783) uses it in all sizes, with a vocabulary four times as large and a RoPE base
of 500,000. Llama 3.1 reaches 128K tokens by dividing the low frequencies of RoPE by 8 (3.2: by 32). The 1B and 3B
models of 3.2 tie the head to the embedding. Llama 3.3 has the sizes of Llama 3.1 70B. Blog: Case studies, LLaMA.
Gallery: docs/gallery/index.html#llama
"""

from dataclasses import dataclass

from torch import nn

from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU


class Llama(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        attention_bias: bool = False
        """Biases in attention: not in LLaMA, but in checkpoints of others in its format."""
        mlp_bias: bool = False
        """Biases in the feed-forward layer, likewise."""

    def make_block(self, layer: int) -> Block:
        c = self.config
        ffn = SwiGLU(c.d_model, c.d_ff, bias=c.mlp_bias)
        return Block(self.make_mixer(layer), ffn, self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(**grouped_heads(c), qkv_bias=c.attention_bias, o_bias=c.attention_bias)
