"""Queries that grow with the position, so that attention over a long text stays as sharp as over a short one.

    q_p = RoPE(x W_q) (1 + a ln(1 + floor(p / L)))        for a token at position p; L is the length in training

A softmax over n keys of equal scores gives each 1 / n: the more keys, the flatter. A factor of the scores that grows
with ln n undoes that. Up to L tokens nothing changes, since floor(p / L) is 0.

Scalable-Softmax Is Superior for Attention, arXiv 2501.19399; this form is that of Llama 4 (layers without RoPE) and
Ministral 3. Blog: Position encoding, longer context.
"""

from torch import Tensor

from llm.modules.attention.multi_head import MultiHeadAttention


class LengthScaledAttention(MultiHeadAttention):
    """Multi-head attention whose queries are multiplied by 1 + growth ln(1 + floor(position / length))."""

    def __init__(self, *, growth: float, length: int, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention; raises ValueError for a length below 1."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        if length < 1:
            raise ValueError(
                f"length = {length} must be at least 1: it is the length in training (--model.query-length)"
            )
        self.growth, self.length = growth, length

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions)
        turns = (positions.clamp(min=0) // self.length).float()  # padding has negative positions
        factor = 1 + self.growth * (1 + turns).log()
        return q * factor[..., None, None].to(q.dtype), k, v  # (T, 1, 1) or (B, T, 1, 1)
