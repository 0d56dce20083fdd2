"""Attention with a learned sink in each head: the softmax may give its weight to nothing.

    a_ij = exp(s_ij) / (exp(sink_h) + sum_j' exp(s_ij'))        the baseline: without exp(sink_h)

gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925. Blog: Attention, attention sinks.
Gallery: docs/gallery/index.html#attention_sink
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.attention.sinks import SinkAttention


class AttentionSink(Baseline):
    def make_mixer(self, layer: int) -> nn.Module:
        return SinkAttention(d_model=self.config.d_model, n_heads=self.config.n_heads)
