"""The delta rule: a key is looked up before it is written, and only the difference is stored.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = S_t^T q_t

Linear attention adds to a key's old value; here the new value replaces a share beta of it. That is one step of gradient
descent on |S^T k - v|^2, of size beta / 2. With keys of length 1, S is multiplied by I - beta k k^T, whose eigenvalue
along k is 1 - beta. A beta above 1 makes it negative, down to -1 at 2: the state can flip its sign at a token, as
tracking parity needs.

Gated DeltaNet decays the state before it looks up: S' = d_t S_{t-1}, with Mamba-2's d_t (decay.py), and gates the
output. Kimi Delta Attention has a decay for each channel of the keys, S' = diag(d_t) S_{t-1}, and gates of low rank.

Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484; Gated Delta Networks,
arXiv 2412.06464; Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537; Kimi Linear,
arXiv 2510.26692. Blog: Linear attention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.recurrence import delta_rule
from llm.modules.norms import RMSNorm
from llm.modules.recurrent.decay import Decay
from llm.modules.recurrent.short_convolution import ShortConvolution
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept, widen


class DeltaNet(nn.Module):
    """(B, T, d_model) -> (B, T, d_model), with a short convolution over q, k and v.

    n_k_heads      query and key heads, a divisor of n_heads, which counts the value heads; n_heads where not given
    head_dim       width of a query and key head; d_model / n_heads where it is not given
    v_head_dim     width of a value head; d_model / n_heads where it is not given
    d_conv         tokens that the short convolution mixes
    max_beta       above 1 there are negative eigenvalues; 2 at most, since beyond it the state would grow

    Raises ValueError where n_k_heads does not divide n_heads, or max_beta is not in (0, 2].
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_k_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        d_conv: int = 4,
        max_beta: float = 1.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        n_k_heads = n_k_heads or n_heads
        if n_heads % n_k_heads:
            raise ValueError(f"n_k_heads = {n_k_heads} must divide n_heads = {n_heads}")
        if not 0 < max_beta <= 2:
            raise ValueError(f"max_beta = {max_beta} must be above 0 and at most 2 (--model.max-beta)")
        self.n_heads, self.max_beta = n_heads, max_beta
        self.head_dim, self.v_head_dim = head_dim or d_model // n_heads, v_head_dim or d_model // n_heads
        self.widths = [n_k_heads * self.head_dim, n_k_heads * self.head_dim, n_heads * self.v_head_dim]
        self.q_proj = nn.Linear(d_model, self.widths[0], bias=False)
        self.k_proj = nn.Linear(d_model, self.widths[1], bias=False)
        self.v_proj = nn.Linear(d_model, self.widths[2], bias=False)
        self.conv = ShortConvolution(sum(self.widths), d_conv)
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)
        self.o_norm = RMSNorm(self.v_head_dim, norm_eps)
        self.o_proj = nn.Linear(self.widths[2], d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q, k, v = self.project(x, positions, cache)
        beta = self.max_beta * widen(self.beta_proj(x)).sigmoid()[..., None]
        k, log_decay = hide_padding(positions, k, self.log_decay(x))
        o, state = delta_rule(q, k, v, log_decay, beta, kept(cache))
        keep(cache, state=state)
        return self.o_proj(self.gate(self.o_norm(o), x).flatten(2))

    def project(self, x: Tensor, positions: Tensor, cache: dict | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> q, k (B, T, n_k_heads, head_dim) of length head_dim^-0.5 and 1, v (B, T, H, V)."""
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        q, k, v = self.conv(qkv, positions, cache).split(self.widths, -1)
        q, k = (unit_length(part.unflatten(-1, (-1, self.head_dim))) for part in (q, k))
        return q * self.head_dim**-0.5, k, v.unflatten(-1, (self.n_heads, -1))

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H, 1 or head_dim), in fp32 or wider: here 0, so only writing erases."""
        return widen(x.new_zeros(*x.shape[:2], self.n_heads, 1))

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        """The normed heads (B, T, H, v_head_dim) before they are mixed; here without a gate."""
        return o

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """One state for each head and the last inputs of the convolution, whatever the length."""
        shape = (self.n_heads, self.head_dim, self.v_head_dim)
        return empty_state(batch_size, self.k_proj.weight, state=shape) | self.conv.make_cache(batch_size)

    def flops(self, context: int) -> float:
        """FLOPs per token, without projections and convolution: the state is read by the key, written, and read."""
        return 6 * self.n_heads * self.head_dim * self.v_head_dim


class GatedDeltaNet(DeltaNet):
    """The delta rule with a decay for each head and a SiLU gate on the output; `options` are those of DeltaNet."""

    def __init__(self, *, d_model: int, n_heads: int, **options):
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        self.decay_proj = nn.Linear(d_model, n_heads, bias=False)
        self.decay = Decay(n_heads)
        self.gate_proj = nn.Linear(d_model, self.widths[2], bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        return self.decay(self.decay_proj(x))[1]

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        return o * F.silu(self.gate_proj(x)).unflatten(-1, (self.n_heads, -1))


class KimiDeltaAttention(DeltaNet):
    """The delta rule with a decay for each channel and a sigmoid gate on the output, both read from the token by
    matrices of rank `gate_rank`; `options` are those of DeltaNet."""

    def __init__(self, *, d_model: int, n_heads: int, gate_rank: int, **options):
        super().__init__(d_model=d_model, n_heads=n_heads, **options)
        self.decay_a_proj = nn.Linear(d_model, gate_rank, bias=False)
        self.decay_b_proj = nn.Linear(gate_rank, n_heads * self.head_dim, bias=False)
        self.decay = Decay(n_heads, self.head_dim)
        self.gate_a_proj = nn.Linear(d_model, gate_rank, bias=False)
        self.gate_b_proj = nn.Linear(gate_rank, self.widths[2], bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        return self.decay(self.decay_b_proj(self.decay_a_proj(x)))[1]

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        return o * self.gate_b_proj(self.gate_a_proj(x)).sigmoid().unflatten(-1, (self.n_heads, -1))


def unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last axis, summed in fp32 or wider; a small constant keeps 0 at 0."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
