"""RWKV-7: a state that erases along one vector and writes along another, in layers that also see the token before.

    time mix       S_t = diag(w_t) S_{t-1} - (a_t * c_t) (S_{t-1}^T c_t)^T + k_t v_t^T        o_t = S_t^T r_t
                   output = (g * (norm(o) + sum(r * k * r_k) v)) W_o
    channel mix    relu(x' W_k)^2 W_v

c = k * k_k, scaled to length 1. For each channel, a says how much of what c finds is erased; the delta rule erases and
writes along the same key. k is then multiplied by 1 + (a - 1) k_a. w = exp(-exp(-1/2) sigmoid(..)) lies between 0.54
and 1. w, a and g are read from the token by matrices of low rank. Each of r, w, k, v, a and g, and the
channel mix, reads its own mixture x + mu (x_before - x) of a token and the one before it (token shift). From the second
layer on, v = v + (v_first - v) sigmoid(..) draws the values towards those of the first (value residual).

RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456. Blog: Linear attention.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.recurrence import low_rank
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept, widen


class TimeMix(nn.Module):
    """(B, T, d_model) -> (B, T, d_model) and the first layer's values, with n_heads states of (d_model / n_heads)^2
    numbers.

    ranks            of the matrices that give w, a, g and the value residual: `decay`, `a`, `gate`, `value`
    value_residual   False in the first layer, whose values the others are drawn towards
    """

    def __init__(self, *, d_model: int, n_heads: int, ranks: dict[str, int], value_residual: bool):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.shift = TokenShift(6, d_model)
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        speed = torch.linspace(0, 1, d_model, device="cpu") ** 0.85
        self.decay_lora = LowRank(d_model, ranks["decay"], torch.tanh, bias=(-6.5 + 5 * speed).tolist())
        self.a_lora = LowRank(d_model, ranks["a"], bias=[0.0] * d_model)
        self.gate_lora = LowRank(d_model, ranks["gate"], torch.sigmoid)
        self.value_lora = LowRank(d_model, ranks["value"], bias=[1.0] * d_model) if value_residual else None
        self.k_k = nn.Parameter(torch.full((d_model,), 0.85))
        self.k_a = nn.Parameter(torch.ones(d_model))
        self.bonus = Bonus(n_heads, self.head_dim)
        self.o_norm = nn.GroupNorm(n_heads, d_model, eps=1e-5 * self.head_dim)

    def forward(
        self, x: Tensor, positions: Tensor, cache: dict | None = None, v_first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first layer has no `v_first` and returns its own values, (B, T, d_model); the others return `v_first`."""
        x_r, x_w, x_k, x_v, x_a, x_g = self.shift(x, positions, cache)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if v_first is None:
            v_first = v
        elif self.value_lora is not None:
            v = v + (v_first - v) * self.value_lora(x_v).sigmoid()
        a = self.a_lora(x_a).sigmoid()
        log_decay = -math.exp(-0.5) * widen(self.decay_lora(x_w)).sigmoid()  # w is above exp(-0.61): never 0
        erased = F.normalize(widen(self.heads(k * self.k_k)), dim=-1)
        k = k + k * (a - 1) * self.k_a
        r, k, v, a, log_decay = (self.heads(part) for part in (r, k, v, a, log_decay))
        written, corrected, log_decay = hide_padding(positions, k, erased * a, log_decay)
        o, state = low_rank(r, written, v, -erased, corrected, log_decay, kept(cache))
        keep(cache, state=state)
        o = self.o_norm(o.flatten(0, 1).flatten(1)).view_as(o) + self.bonus(r, k, v)
        return self.o_proj(self.gate_lora(x_g) * o.flatten(2)), v_first

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, H, head_dim)."""
        return x.unflatten(-1, (self.n_heads, -1))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """One state for each head and the last token's input, whatever the length."""
        shape = (self.n_heads, self.head_dim, self.head_dim)
        return empty_state(batch_size, self.o_proj.weight, state=shape) | self.shift.make_cache(batch_size)

    def flops(self, context: int) -> float:
        """FLOPs per token, without the projections: the state is read by c, corrected, written, and read by r."""
        return 8 * self.n_heads * self.head_dim**2


class ChannelMix(nn.Module):
    """RWKV's feed-forward layer, (B, T, d_model) -> (B, T, d_model). Its token shift needs positions and a cache."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.shift = TokenShift(1, d_model, name="ffn_shift")
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        (x,) = self.shift(x, positions, cache)
        return self.down_proj(F.relu(self.up_proj(x)).square())

    def make_cache(self, batch_size: int) -> dict[str, Tensor]:
        """The last token's input."""
        return self.shift.make_cache(batch_size)


class TokenShift(nn.Module):
    """x (B, T, D) -> n mixtures x_t + mu_i (x_{t-1} - x_t), each (B, T, D). `name` is its entry in the cache."""

    no_weight_decay = ("mu",)

    def __init__(self, n: int, d_model: int, name: str = "shift"):
        super().__init__()
        self.name = name
        self.mu = nn.Parameter(torch.empty(n, d_model))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, scheme: str = "normal", n_layers: int = 1) -> None:
        """The first channels begin with the token before, the last with the token itself."""
        self.mu.copy_(torch.linspace(1, 0, self.mu.shape[1], device=self.mu.device).expand_as(self.mu))

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> list[Tensor]:
        (hidden,) = hide_padding(positions, x)
        first = torch.zeros_like(hidden[:, :1]) if cache is None else cache[self.name].to(x.dtype)
        before = torch.cat([first, hidden[:, :-1]], 1)
        keep(cache, **{self.name: hidden[:, -1:]})
        step = before - x
        return [torch.addcmul(x, step, mu.to(x.dtype)) for mu in self.mu]

    def make_cache(self, batch_size: int) -> dict[str, Tensor]:
        return {self.name: torch.zeros(batch_size, 1, self.mu.shape[1], dtype=self.mu.dtype, device=self.mu.device)}


class LowRank(nn.Module):
    """act(x W_a) W_b + bias, (.., D) -> (.., D). At first its input makes no difference: W_a is 0."""

    def __init__(
        self,
        d_model: int,
        rank: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: list[float] | None = None,
    ):
        super().__init__()
        self.activation, self.start = activation, bias
        self.a_proj = nn.Linear(d_model, rank, bias=False)
        self.b_proj = nn.Linear(rank, d_model, bias=bias is not None)

    @torch.no_grad()
    def init_weights(self, scheme: str, n_layers: int) -> None:
        nn.init.zeros_(self.a_proj.weight)
        nn.init.normal_(self.b_proj.weight, std=0.1 * self.b_proj.out_features**-0.5)
        if self.start is not None:
            self.b_proj.bias.copy_(torch.tensor(self.start, device=self.b_proj.bias.device))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_proj(x)
        return self.b_proj(x if self.activation is None else self.activation(x))


class Bonus(nn.Module):
    """sum(r * k * r_k) v: what a token reads of itself, beside the state. (B, T, H, K) each -> (B, T, H, K)."""

    no_weight_decay = ("r_k",)

    def __init__(self, n_heads: int, head_dim: int):
        super().__init__()
        self.r_k = nn.Parameter(torch.zeros(n_heads, head_dim))

    def init_weights(self, scheme: str, n_layers: int) -> None:
        nn.init.zeros_(self.r_k)

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (r * k * self.r_k.to(r.dtype)).sum(-1, keepdim=True) * v
