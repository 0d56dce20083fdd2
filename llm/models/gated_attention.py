"""Gated attention: a sigmoid of the layer's input scales every channel of the heads before they are mixed.

    output = (sigmoid(x W_g) * [head_1 .. head_H]) W_o        the baseline: [head_1 .. head_H] W_o

The gate adds d_model x d_model parameters to each layer.
Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free, arXiv 2505.06708.
Blog: Attention; case studies (Qwen3-Next).
Gallery: docs/gallery/index.html#gated_attention
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.attention.gated import GatedAttention


class GatedAttentionDecoder(Baseline):
    def make_mixer(self, layer: int) -> nn.Module:
        return GatedAttention(d_model=self.config.d_model, n_heads=self.config.n_heads)
