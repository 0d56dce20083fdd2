"""Gated linear attention: every channel of the keys forgets at a rate that the token chooses.

    S_t = diag(d_t) S_{t-1} + k_t v_t^T        d_t = sigmoid(x_t W_1 W_2 + b)^(1 / 16)        o_t = S_t^T q_t

Retention forgets at a fixed rate. Here a token can keep what matters and clear what does not. The power 1 / 16 keeps
the decays near 1, so that memories last at the start of training. W_1 W_2 has rank 16. Gated Linear Attention
Transformers with Hardware-Efficient Training, arXiv 2312.06635. Blog: Linear attention.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.norms import RMSNorm
from llm.modules.recurrent.linear_attention import LinearAttention
from llm.modules.recurrent.state import widen


class GatedLinearAttention(LinearAttention):
    """(B, T, d_model) -> (B, T, d_model). `gate_rank` is the rank of the matrix that gives the decays."""

    extra_values = 0

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        gate_rank: int = 16,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model=d_model, n_heads=n_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.decay_a_proj = nn.Linear(d_model, gate_rank, bias=False)
        self.decay_b_proj = nn.Linear(gate_rank, n_heads * self.head_dim)
        self.gate_proj = nn.Linear(d_model, n_heads * self.v_head_dim, bias=False)
        self.o_norm = RMSNorm(self.v_head_dim, norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q * self.head_dim**-0.5, k, v

    def log_decay(self, x: Tensor) -> Tensor:
        raw = self.decay_b_proj(self.decay_a_proj(x))
        return self.heads(F.logsigmoid(widen(raw)) / 16)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(F.silu(self.gate_proj(x)) * self.o_norm(o).flatten(2))
