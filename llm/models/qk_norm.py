"""The baseline with QK-norm: each query and key head passes through an RMSNorm, which bounds the scores.

    q_h = RMSNorm(x W_q^h)     k_h = RMSNorm(x W_k^h)     |q_h . k_h| / sqrt(head_dim) <= sqrt(head_dim) |w_q| |w_k|

with |w| the largest gain. The bound holds whatever the projections do, so training is stable at higher learning rates.
Most models normalise per head, as here (Qwen3, Gemma 3); llm/modules/attention/qk_norm.py has the other kinds.

Query-Key Normalization for Transformers, arXiv 2010.04245; Scaling Vision Transformers to 22 Billion Parameters, arXiv
2302.05442. Blog: Normalization, QK-norm.
Gallery: docs/gallery/index.html#qk_norm
"""

from functools import partial

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.norms import RMSNorm


class QKNormDecoder(Baseline):
    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, qk_norm=partial(RMSNorm, eps=c.norm_eps))
