"""Mamba's decay: a step size dt read from the token, and a rate that each head learns.

    dt_t = softplus(raw_t + dt_bias)        d_t = exp(-exp(A_log) dt_t)

In Mamba-2 a large step forgets the past and takes in the token, and a step near 0 skips the token. In the delta rules
it only forgets; beta says how much is written. At the start the steps are spread from 0.001 to 0.1 and the rates from 1
to 16. Weight decay leaves these parameters alone.
Mamba, arXiv 2312.00752, section 3.6; Mamba-2, arXiv 2405.21060; used by Gated DeltaNet and Kimi Delta Attention.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.recurrent.state import widen


class Decay(nn.Module):
    """raw (.., H * rates) -> dt and log_decay, both (.., H, rates), in fp32 or wider. `A_log` (H,), `dt_bias` (H *
    rates,).

    n_rates   step sizes for each head: 1, or one for each channel of its keys
    dt_min    steps are at least this long (Nemotron-H)
    """

    no_weight_decay = ("A_log", "dt_bias")

    def __init__(self, n_heads: int, n_rates: int = 1, dt_min: float = 0.0):
        super().__init__()
        self.dt_min = dt_min
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads * n_rates))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, scheme: str = "normal", n_layers: int = 1) -> None:
        self.A_log.uniform_(1, 16).log_()
        draw_dt_bias(self.dt_bias)

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(widen(raw) + widen(self.dt_bias)).clamp(min=self.dt_min)
        dt = dt.unflatten(-1, (len(self.A_log), -1))
        return dt, -widen(self.A_log).exp()[:, None] * dt


@torch.no_grad()
def draw_dt_bias(bias: Tensor, low: float = 0.001, high: float = 0.1) -> None:
    """Fill `bias` so that softplus(bias) is spread evenly, in its logarithm, between `low` and `high`."""
    dt = bias.uniform_(math.log(low), math.log(high)).exp_()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
