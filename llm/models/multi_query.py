"""Multi-query attention: all query heads share one key and one value head.

    head_h = Attention(x W_q^h, x W_k, x W_v)        the baseline: W_k^h and W_v^h for each head

The cache shrinks by the number of heads, and with it the memory that each generated token must read.
Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150. Blog: Attention, GQA and MQA.
Gallery: docs/gallery/index.html#multi_query
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.attention.multi_head import MultiHeadAttention


class MultiQuery(Baseline):
    def make_mixer(self, layer: int) -> nn.Module:
        return MultiHeadAttention(d_model=self.config.d_model, n_heads=self.config.n_heads, n_kv_heads=1)
