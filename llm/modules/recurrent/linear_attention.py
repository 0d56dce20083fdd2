"""Linear attention: without the softmax, attention is a sum that a state of fixed size can carry.

    o_t = sum_{j <= t} phi(q_t) . phi(k_j) v_j / sum_{j <= t} phi(q_t) . phi(k_j)        phi(x) = elu(x) + 1
        = S_t^T phi(q_t) / (z_t . phi(q_t))        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)

phi keeps the weights positive, and z makes them sum to 1. z is one more column of S, for a value that is always 1.
Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv 2006.16236. Blog: Linear attention.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.recurrence import linear_attention
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept, widen


class LinearAttention(nn.Module):
    """(B, T, d_model) -> (B, T, d_model) in three steps, which a subclass may replace: project, log_decay, output.

    head_dim     width of a query and key head; d_model / n_heads where it is not given
    v_head_dim   width of a value head; d_model / n_heads where it is not given
    """

    extra_values = 1
    """Columns of the state beside the values: here the sum of the keys."""

    def __init__(self, *, d_model: int, n_heads: int, head_dim: int | None = None, v_head_dim: int | None = None):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim or d_model // n_heads
        self.v_head_dim = v_head_dim or d_model // n_heads
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * self.v_head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.v_head_dim, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q, k, v = self.project(x, positions)
        k, log_decay = hide_padding(positions, k, self.log_decay(x))
        o, state = linear_attention(q, k, v, log_decay, kept(cache))
        keep(cache, state=state)
        return self.output(o, x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> q, k (B, T, H, head_dim) and v (B, T, H, v_head_dim + extra_values)."""
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return F.elu(widen(q)) + 1, F.elu(widen(k)) + 1, F.pad(v, (0, 1), value=1.0)  # in bf16 phi(-7) would be 0

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H D) -> (B, T, H, D)."""
        return x.unflatten(-1, (self.n_heads, -1))

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H, 1 or head_dim), in fp32 or wider: here 0, so nothing is forgotten."""
        return widen(x.new_zeros(*x.shape[:2], self.n_heads, 1))

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """What the state answered (B, T, H, v_head_dim + extra_values) -> (B, T, d_model). `x` is there for gates."""
        weighted, weights = o[..., :-1], o[..., -1:]
        return self.o_proj((weighted / weights.clamp(min=1e-6)).flatten(2))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """One state for each head, whatever the length."""
        shape = (self.n_heads, self.head_dim, self.v_head_dim + self.extra_values)
        return empty_state(batch_size, self.k_proj.weight, state=shape)

    def flops(self, context: int) -> float:
        """FLOPs per token, without the projections: the state is written and read."""
        return 4 * self.n_heads * self.head_dim * (self.v_head_dim + self.extra_values)
