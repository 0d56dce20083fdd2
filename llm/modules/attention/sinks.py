"""Attention sinks: a learned score per head that takes part in the softmax and brings no value.

    a_ij = exp(s_ij) / (exp(sink_h) + sum_j' exp(s_ij'))        head_i = sum_j a_ij v_j

Softmax weights must sum to 1, so a head with nothing to add puts its weight on the first token, which then acts as a
sink (Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453). A sink of its own lets a head add
nothing. gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925. Blog: Attention, attention sinks.
"""

import torch
from torch import Tensor, nn

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places
from llm.modules.kernels.attention import attend


class SinkAttention(MultiHeadAttention):
    """Multi-head attention with a learned sink per query head; at the start exp(0) = 1 joins each denominator."""

    def __init__(self, *, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention; raises ValueError for a score_bias."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        if self.score_bias is not None:
            raise ValueError(
                "score_bias is not supported beside sinks: use MultiHeadAttention, or leave score_bias out"
            )
        self.sinks = nn.Parameter(torch.zeros(n_heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return attend(q, k, v, places, self.mask, scale=self.scale, sinks=self.sinks)
