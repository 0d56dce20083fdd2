"""Retention: linear attention that forgets, each head at a fixed rate of its own.

    S_t = d_h S_{t-1} + k_t v_t^T        o_t = S_t^T q_t = sum_{j <= t} d_h^(t - j) (q_t . k_j) v_j

A head with d = 1 - 2^-5 remembers about 32 tokens, one with 1 - 2^-8 about 256. Instead of
dividing by the sum of the weights, each head is normalised.

RetNet        q and k are rotated (RoPE); d_h = 1 - 2^(-5 - h); a SiLU gate after the norm of each head
Lightning     SiLU on q, k and v; d_h = exp(-slope_h (1 - depth)) with ALiBi's slopes and depth = layer / (layers - 1),
              so that deep layers remember longer; one norm for all heads and a sigmoid gate (MiniMax-01)

Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621; MiniMax-01: Scaling
Foundation Models with Lightning Attention, arXiv 2501.08313. Blog: Linear attention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.norms import RMSNorm
from llm.modules.recurrent.linear_attention import LinearAttention


class Retention(LinearAttention):
    """RetNet's mixer: (B, T, d_model) -> (B, T, d_model). `rope` rotates queries and keys; None leaves them."""

    extra_values = 0

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        rope: nn.Module | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model=d_model, n_heads=n_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.rope = rope
        self.gate_proj = nn.Linear(d_model, n_heads * self.v_head_dim, bias=False)
        self.o_norm = RMSNorm(self.v_head_dim, norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q * self.head_dim**-0.5, k, v

    def log_decay(self, x: Tensor) -> Tensor:
        head = torch.arange(self.n_heads, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return torch.log1p(-(2.0 ** (-5 - head)))[:, None].expand(*x.shape[:2], -1, -1)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(F.silu(self.gate_proj(x)) * self.o_norm(o).flatten(2))


class LightningAttention(LinearAttention):
    """MiniMax-01's mixer: (B, T, d_model) -> (B, T, d_model). `depth` is layer / (n_layers - 1), from 0 to 1. As in
    transformers, 1e-5 is added to 1 - depth: the last layer forgets, too, if hardly anything."""

    extra_values = 0

    def __init__(
        self, *, d_model: int, n_heads: int, depth: float, head_dim: int | None = None, norm_eps: float = 1e-5
    ):
        super().__init__(d_model=d_model, n_heads=n_heads, head_dim=head_dim, v_head_dim=head_dim)
        self.depth = depth
        self.gate_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.o_norm = RMSNorm(n_heads * self.head_dim, norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.heads(F.silu(proj(x))) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def log_decay(self, x: Tensor) -> Tensor:
        head = torch.arange(1, self.n_heads + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        slope = 2.0 ** (-8 * head / self.n_heads) * (1 - self.depth + 1e-5)
        return -slope[:, None].expand(*x.shape[:2], -1, -1)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.gate_proj(x).sigmoid() * self.o_norm(o.flatten(2)))
