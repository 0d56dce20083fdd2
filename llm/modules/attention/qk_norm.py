"""QK-norm: normalise queries and keys to bound the scores, so that the softmax does not saturate as weights grow.

    per head     q_h = norm(x W_q^h)               the heads share one gain of width head_dim; before RoPE
    full width   [q_1 .. q_H] = norm(x W_q)        one rms over all heads, a gain for each channel; before RoPE
    L2           q_h = RoPE(x W_q^h) / rms         no learned gain; after RoPE
    QKNorm       score = g cos(q_h, k_h)           a learned g instead of 1 / sqrt(head_dim)

Keys are treated in the same way. The first is the argument `qk_norm` of MultiHeadAttention (Qwen3, Gemma 3); the others
are below. Only with the full-width norm does the scale of a head depend on the other heads. RoPE keeps the length of a
vector, so without a gain the order of norm and RoPE does not matter. With a gain it does.

Query-Key Normalization for Transformers, arXiv 2010.04245; norms with a gain: Scaling Vision Transformers to
22 Billion Parameters, arXiv 2302.05442. Blog: Normalization, QK-norm.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.attention.multi_head import MultiHeadAttention


class FullWidthQKNormAttention(MultiHeadAttention):
    """Multi-head attention that normalises queries (B, T, H D) and keys (B, T, H_kv D) before the split into heads.

    2 OLMo 2 Furious, arXiv 2501.00656.
    """

    def __init__(self, *, qk_norm: Callable[[int], nn.Module], **options):
        """`qk_norm(width)` returns a norm layer of that width; `options` are those of MultiHeadAttention."""
        super().__init__(**options)
        self.q_norm = qk_norm(self.q_proj.out_features)
        self.k_norm = qk_norm(self.k_proj.out_features)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k, v


class L2QKNormAttention(MultiHeadAttention):
    """After RoPE, each query and key head is divided by its root mean square. There is no learned gain.

    The name L2 is used since the root mean square is the L2 norm / sqrt(head_dim). With the default scale, scores are
    within +-sqrt(head_dim). Llama 4 (in its layers with RoPE) and nanochat use it.
    """

    def __init__(self, *, norm_eps: float = 1e-6, **options):
        """`options` are those of MultiHeadAttention."""
        super().__init__(**options)
        self.norm_eps = norm_eps

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions)
        width = (self.head_dim,)
        return F.rms_norm(q, width, None, self.norm_eps), F.rms_norm(k, width, None, self.norm_eps), v


class QKNormAttention(MultiHeadAttention):
    """The original QKNorm: the score is the cosine of query and key times a learned number, one for each layer.

    The number starts at log2(L^2 - L), with L the text length. Cosines alone are too small for a peaked softmax.
    Query-Key Normalization for Transformers, arXiv 2010.04245.
    """

    def __init__(self, *, length: int, **options):
        """`length` is L, that of a long training text; `options` are those of MultiHeadAttention, without `scale`."""
        super().__init__(scale=1.0, **options)
        if length < 2:
            raise ValueError(f"length = {length} must be at least 2: QKNorm starts at log2(length^2 - length)")
        self.cosine_scale = nn.Parameter(torch.full((1,), math.log2(length**2 - length)))

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions)
        return self.cosine_scale * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v
