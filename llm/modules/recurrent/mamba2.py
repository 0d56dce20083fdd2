"""Mamba-2: a state-space model whose heads decay as a whole, which makes it linear attention with a decay.

    [z | x, B, C | dt] = u W_in        x, B, C pass a short convolution        dt, d: decay.py
    S_t = d_t S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t        output = norm(y * SiLU(z)) W_o

C is the query, B the key and dt x the value. B and C are shared by the heads of a group, as in grouped-query attention.
Mamba has a decay for each channel and state instead (mamba.py), and cannot be written as matrix products.
Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
arXiv 2405.21060. Blog: State-space models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.recurrence import linear_attention
from llm.modules.norms import RMSNorm
from llm.modules.recurrent.decay import Decay
from llm.modules.recurrent.short_convolution import ShortConvolution
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept


class Mamba2(nn.Module):
    """(B, T, d_model) -> (B, T, d_model).

    n_heads x head_dim   width inside, `expand` times d_model in the paper
    d_state              width of B and C, the keys and queries
    n_groups             pairs of B and C; a divisor of n_heads. The norm is taken over each group's channels
    norm_eps             None: no norm after the gate (Falcon-H1)
    d_conv, conv_bias    tokens that the short convolution mixes, and whether it has a bias
    dt_min               steps are at least this long (Nemotron-H)

    Raises ValueError where n_groups does not divide n_heads.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        head_dim: int = 64,
        d_state: int = 128,
        n_groups: int = 1,
        d_conv: int = 4,
        conv_bias: bool = True,
        norm_eps: float | None = 1e-5,
        dt_min: float = 0.0,
    ):
        super().__init__()
        if n_heads % n_groups:
            raise ValueError(f"n_groups = {n_groups} must divide n_heads = {n_heads}, both of Mamba-2")
        d_inner = n_heads * head_dim
        self.n_heads, self.head_dim, self.d_state, self.n_groups = n_heads, head_dim, d_state, n_groups
        self.widths = [d_inner, n_groups * d_state, n_groups * d_state]
        self.in_proj = nn.Linear(d_model, d_inner + sum(self.widths) + n_heads, bias=False)
        self.conv = ShortConvolution(sum(self.widths), d_conv, bias=conv_bias)
        self.decay = Decay(n_heads, dt_min=dt_min)
        self.D = nn.Parameter(torch.ones(n_heads))
        self.o_norm = nn.Identity() if norm_eps is None else GroupedRMSNorm(d_inner, n_groups, norm_eps)
        self.o_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        z, mixed, dt = self.in_proj(x).split([self.widths[0], sum(self.widths), self.n_heads], -1)
        x, b, c = self.conv(mixed, positions, cache).split(self.widths, -1)
        x = x.unflatten(-1, (self.n_heads, -1))  # (B, T, H, head_dim)
        b, c = (part.unflatten(-1, (self.n_groups, -1)) for part in (b, c))  # (B, T, G, d_state)
        dt, log_decay = self.decay(dt)
        b, log_decay = hide_padding(positions, b, log_decay)
        y, state = linear_attention(c, b, x * dt.to(x.dtype), log_decay, kept(cache))
        keep(cache, state=state)
        y = torch.addcmul(y, x, self.D[:, None].to(x.dtype))
        return self.o_proj(self.o_norm(y.flatten(2) * F.silu(z)))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """One state for each head and the last inputs of the convolution, whatever the length."""
        state = empty_state(batch_size, self.o_proj.weight, state=(self.n_heads, self.d_state, self.head_dim))
        return state | self.conv.make_cache(batch_size)

    def flops(self, context: int) -> float:
        """FLOPs per token, without projections and convolution: the state is written and read."""
        return 4 * self.n_heads * self.head_dim * self.d_state


class GroupedRMSNorm(RMSNorm):
    """RMSNorm over each of `n_groups` equal parts of the last axis: (.., dim) -> (.., dim)."""

    def __init__(self, dim: int, n_groups: int, eps: float = 1e-5):
        super().__init__(dim, eps)
        self.n_groups = n_groups

    def forward(self, x: Tensor) -> Tensor:
        if self.n_groups == 1:
            return super().forward(x)
        parts = x.unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)
