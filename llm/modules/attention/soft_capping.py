"""Soft-capped attention: scores approach a ceiling instead of growing without bound.

    head = softmax(mask(c tanh(q k^T * scale / c))) v

Small scores pass almost unchanged (tanh x ~ x), and none leaves (-c, c). The cap comes before the mask: tanh would turn
-inf into -c, and queries would see the future. Gemma 2, arXiv 2408.00118, section 2, c = 50.
Blog: Attention; case studies.
"""

from torch import Tensor

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places
from llm.modules.kernels.attention import attend


class SoftCappedAttention(MultiHeadAttention):
    """Multi-head attention whose scores stay in (-soft_cap, soft_cap)."""

    def __init__(self, *, soft_cap: float, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention; raises ValueError for a score_bias or a cap of 0 or less."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        if not soft_cap > 0:
            raise ValueError(f"soft_cap = {soft_cap} must be positive: it bounds the scores (--model.soft-cap)")
        if self.score_bias is not None:
            raise ValueError("score_bias is not supported beside soft_cap: use MultiHeadAttention, or leave one out")
        self.soft_cap = soft_cap

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return attend(q, k, v, places, self.mask, scale=self.scale, soft_cap=self.soft_cap)
