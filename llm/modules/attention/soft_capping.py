"""Soft-capped attention: scores bend towards a ceiling instead of growing without bound.

    head = softmax(mask(c tanh(q k^T * scale / c))) v

Small scores pass almost unchanged (tanh x ~ x), and none leaves (-c, c). The cap comes before the mask: tanh would turn
-inf into -c, and the future into something a query sees. Gemma 2, arXiv 2408.00118, section 2, c = 50.
Blog: Attention; case studies.
"""

from functools import partial

import torch
from torch import Tensor

from llm.modules.attention.core import share_heads, uncached
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import visibility


class SoftCappedAttention(MultiHeadAttention):
    """Multi-head attention whose scores stay in (-soft_cap, soft_cap)."""

    def __init__(self, *, soft_cap: float, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention, except score_bias."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        if not soft_cap > 0:
            raise ValueError(f"soft_cap = {soft_cap} must be positive: it bounds the scores (--model.soft-cap)")
        if self.score_bias is not None:
            raise ValueError("score_bias is not supported beside soft_cap: use MultiHeadAttention, or leave one out")
        self.soft_cap = soft_cap

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        if q.is_cuda and uncached(q_pos, k_pos):
            from llm.modules.attention.flex import flex_attention, flex_serves  # costs seconds, so only where it serves

            if flex_serves(q, k):
                return flex_attention(q, k, v, self.visible, self.scale, partial(cap, limit=self.soft_cap))
        mask = visibility(self.visible, q_pos, k_pos)
        return soft_capped_attention(q, k, v, mask, self.soft_cap, self.scale)


def soft_capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, soft_cap: float, scale: float | None = None
) -> Tensor:
    """The equation, T x S scores in memory: the fused kernel has no place for the tanh. `mask` holds booleans."""
    k, v = share_heads(q, k), share_heads(q, v)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    return cap(scores, soft_cap).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def cap(x: Tensor, limit: float) -> Tensor:
    """limit * tanh(x / limit): also what Gemma 2 does to its logits, with limit 30."""
    return limit * torch.tanh(x / limit)
