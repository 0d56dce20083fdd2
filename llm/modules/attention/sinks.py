"""Attention sinks: a learned score per head that takes part in the softmax and brings no value.

    a_ij = exp(s_ij) / (exp(sink_h) + sum_j' exp(s_ij'))        head_i = sum_j a_ij v_j

Softmax weights must sum to 1, so a head with nothing to say heaps them on the first token, which then acts as a sink
(Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453). With a sink of its own a head can say
nothing. gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925. Blog: Attention, attention sinks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.attention.core import fused_attention, share_heads, uncached
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.query_blocks import blocked_attention, blocks_serve
from llm.modules.masks import visibility


class SinkAttention(MultiHeadAttention):
    """Multi-head attention with a learned sink per query head; at the start exp(0) = 1 joins each denominator."""

    def __init__(self, *, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention, except score_bias."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        if self.score_bias is not None:
            raise ValueError(
                "score_bias is not supported beside sinks: use MultiHeadAttention, or leave score_bias out"
            )
        self.sinks = nn.Parameter(torch.zeros(n_heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        if uncached(q_pos, k_pos) and blocks_serve(q, self.visible):
            k, v = share_heads(q, k), share_heads(q, v)
            return blocked_attention(q, k, v, self.visible, self.scale, sinks=self.sinks)
        if uncached(q_pos, k_pos) and q.is_cuda:
            from llm.modules.attention.flex import flex_attention, flex_serves  # costs seconds, so only where it serves

            if flex_serves(q, k, sinks=self.sinks):
                return flex_attention(q, k, v, self.visible, self.scale, sinks=self.sinks)
        mask = visibility(self.visible, q_pos, k_pos)
        attend = explicit_sink_attention if q.shape[2] == 1 else fused_sink_attention  # one query: few scores
        return attend(q, k, v, self.sinks, mask, self.scale)


def explicit_sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """The equation: q (B, H, T, D), k and v (B, H_kv, S, ..), sinks (H,), boolean mask -> (B, H, T, D_v)."""
    k, v = share_heads(q, k), share_heads(q, v)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]  # the sink's share is dropped
    return weights @ v


def fused_sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """The same through the fused kernel, which knows no sinks: one more channel and one more key stand in for them.

    q' = [q, sink_h / scale], k' = [k, 0], and a last key [0, 1] with value 0 that every query sees: its score is
    q' k' * scale = sink_h, and the other scores stay as they were. Key heads stay shared. The width grows by 8, not 1,
    since kernels want multiples of 8; v is padded to it and the result cut back.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width, v_width = q.shape[-1], v.shape[-1]
    sink = F.pad((sinks / scale).to(q.dtype)[:, None, None], (0, 7))  # (H, 1, 8)
    q = torch.cat([q, sink.expand(*q.shape[:3], 8)], -1)  # (B, H, T, D + 8)
    sink_key = F.pad(k.new_ones(*k.shape[:2], 1, 1), (width, 7))  # (B, H_kv, 1, D + 8)
    k = torch.cat([F.pad(k, (0, 8)), sink_key], -2)
    v = F.pad(v, (0, width + 8 - v_width, 0, 1))
    return fused_attention(q, k, v, F.pad(mask, (0, 1), value=True), scale)[..., :v_width]
