"""The baseline with QK-norm: each query and key head passes through an RMSNorm, so scores cannot outgrow the softmax.

    q_h = RMSNorm(x W_q^h)     k_h = RMSNorm(x W_k^h)     |q_h . k_h| / sqrt(head_dim) <= sqrt(head_dim) |w_q| |w_k|

with |w| the largest gain: whatever the projections do, scores stay bounded and training stays stable at higher learning
rates. This is the kind most models use, per head (Qwen3, Gemma 3); llm/modules/attention/qk_norm.py holds the others.

Query-Key Normalization for Transformers, arXiv 2010.04245; Scaling Vision Transformers to 22 Billion Parameters, arXiv
2302.05442. Blog: Normalization, QK-norm.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.norms import RMSNorm
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class QKNormConfig(DecoderConfig):
    """The baseline's sizes; each layer has two gains of width d_model / n_heads more."""


class QKNormDecoder(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        norm = partial(RMSNorm, eps=c.norm_eps)
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, qk_norm=norm)
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
