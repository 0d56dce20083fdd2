"""Gated attention: a sigmoid gate on every channel of every head, before the heads are mixed.

    output = (sigmoid(x W_g) * [head_1 .. head_H]) W_o

Without the gate, W_v and W_o are two matrices in a row, which one matrix of low rank could replace. The gate is a
nonlinearity between them. It also lets a head add nothing, which makes attention sinks needless. Gated Attention for
Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free, arXiv 2505.06708. Blog: Attention; case
studies.
"""

from torch import Tensor, nn

from llm.modules.attention.multi_head import MultiHeadAttention


class GatedAttention(MultiHeadAttention):
    """Multi-head attention with a sigmoid gate, computed from the layer's input x, on every channel of every head."""

    def __init__(self, *, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention; with qkv_bias the gate has a bias, too."""
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        self.gate_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=options.get("qkv_bias", False))

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).sigmoid()  # (B, T, H D)
        return self.o_proj(gate * heads.transpose(1, 2).flatten(2))
