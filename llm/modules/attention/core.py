"""Scaled dot-product attention, as the equation says it.

    Attention(q, k, v) = softmax(q k^T / sqrt(d) + bias) v          each query over the keys that its mask shows

Two papers change the scores: a cap c replaces each score s by c tanh(s / c) (soft_capping.py), and a sink adds one
score to each softmax, whose value is 0 (sinks.py).

Shapes: q (B, H, T, D); k (B, H_kv, S, D); v (B, H_kv, S, D_v); the result is (B, H, T, D_v). With H_kv < H, consecutive
query heads share a key head. Models call `attend` of llm/modules/kernels/attention.py, which computes the same faster.

Attention Is All You Need, arXiv 1706.03762, section 3.2.1. Blog: Attention, multi-head attention and its cost.
"""

import torch
from torch import Tensor


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shown: Tensor | None = None,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The equation, line by line, with all T x S scores in memory.

    `shown` (booleans, True: attend) and `bias` (added to the scores) broadcast to (B, H, T, S); `scale` replaces
    1 / sqrt(D); sinks (H,).
    """
    k, v = share_heads(q, k), share_heads(q, v)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if soft_cap is not None:
        scores = cap(scores, soft_cap)
    if bias is not None:
        scores = scores + bias
    if shown is not None:
        scores = scores.masked_fill(~shown, -torch.inf)
    if sinks is not None:  # one more score in each softmax; its weight is dropped
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def cap(x: Tensor, limit: float) -> Tensor:
    """limit * tanh(x / limit), element by element: almost x where x is small, and never beyond +-limit."""
    return limit * torch.tanh(x / limit)


def share_heads(q: Tensor, k: Tensor) -> Tensor:
    """Repeat each of the H_kv key heads for the H / H_kv query heads that share it: (B, H_kv, S, D) -> (B, H, S, D)."""
    n_shared = q.shape[1] // k.shape[1]
    return k if n_shared == 1 else k.repeat_interleave(n_shared, 1)
