"""Mamba: a state-space model that chooses, token by token, what to keep.

    [u | z] = x W_in        u passes a short convolution        [dt, B, C] = u W_x
    h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t        y_t = h_t . C_t + D u_t        for each channel, h (d_state,)
    output = (y * SiLU(z)) W_o        A = -exp(A_log)        dt = softplus(dt W_dt + b)

A state-space model with fixed A, B and dt is a convolution and treats all tokens alike. Here B, C and dt come from the
token. Every channel has d_state decays of its own, so the recurrence is no matrix product: kernels/scan.py computes it.
Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752. Blog: State-space models.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.scan import selective_scan
from llm.modules.recurrent.decay import draw_dt_bias
from llm.modules.recurrent.short_convolution import ShortConvolution
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept, widen


class Mamba(nn.Module):
    """(B, T, d_model) -> (B, T, d_model). A Mamba block has no feed-forward layer; the gate z is its nonlinearity.

    d_inner    channels inside, `expand` times d_model
    dt_rank    width from which the steps of all channels are projected; d_model / 16 where it is not given
    norm       makes a norm for each of dt, B and C (Jamba); without one they stay as they are
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_inner: int,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        norm: Callable[[int], nn.Module] = lambda width: nn.Identity(),
    ):
        super().__init__()
        self.widths = [dt_rank or -(-d_model // 16), d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = ShortConvolution(d_inner, d_conv, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, sum(self.widths), bias=False)
        self.dt_norm, self.b_norm, self.c_norm = (norm(width) for width in self.widths)
        self.dt_proj = StepProjection(self.widths[0], d_inner)
        self.rates = Rates(d_inner, d_state)
        self.D = nn.Parameter(torch.ones(d_inner))
        self.o_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.conv(u, positions, cache)
        dt, b, c = self.x_proj(u).split(self.widths, -1)
        dt = F.softplus(self.dt_proj(self.dt_norm(dt)))
        (dt,) = hide_padding(positions, dt)  # a step of 0 keeps the state
        y, state = selective_scan(u, dt, self.rates(), self.b_norm(b), self.c_norm(c), kept(cache))
        keep(cache, state=state)
        return self.o_proj(torch.addcmul(y, u, self.D.to(u.dtype)) * F.silu(z))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """d_state numbers for each channel and the last inputs of the convolution, whatever the length."""
        state = empty_state(batch_size, self.o_proj.weight, state=tuple(self.rates.A_log.shape))
        return state | self.conv.make_cache(batch_size)

    def flops(self, context: int) -> float:
        """FLOPs per token, without projections and convolution: the state decays, is written and is read."""
        return 6 * self.rates.A_log.numel()


class StepProjection(nn.Linear):
    """(.., dt_rank) -> (.., d_inner), in fp32 or wider. Softplus of the bias begins between 0.001 and 0.1."""

    def forward(self, dt: Tensor) -> Tensor:
        return widen(F.linear(dt, self.weight)) + widen(self.bias)  # near -7, where bf16 is coarse

    @torch.no_grad()
    def init_weights(self, scheme: str, n_layers: int) -> None:
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        draw_dt_bias(self.bias)


class Rates(nn.Module):
    """A = -exp(A_log) (d_inner, d_state), in fp32 or wider: -1, -2, .., -d_state for each channel at the start."""

    no_weight_decay = ("A_log",)

    def __init__(self, d_inner: int, d_state: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, scheme: str = "normal", n_layers: int = 1) -> None:
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log().expand_as(self.A_log))

    def forward(self) -> Tensor:
        return -widen(self.A_log).exp()
