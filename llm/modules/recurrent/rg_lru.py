"""RG-LRU: Griffin's recurrence, one number for each channel, with gates that look at the input only.

    u = conv(x W_x + b_x)               log a_t = -8 r_t softplus(Lambda)
    r_t = sigmoid(u_t W_r + b_r)        i_t = sigmoid(u_t W_i + b_i)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)        output = (h * GELU(x W_y + b_y)) W_o + b_o

The factor sqrt(1 - a^2) keeps the size of h the same however slowly it decays. The gates do not read h, so nothing in
the loop is a matrix product. W_r and W_i are block-diagonal, one block for each head. As in RecurrentGemma, the first
token of a text enters whole: its factor is 1. Griffin: Mixing Gated Linear Recurrences with
Local Attention for Efficient Language Models, arXiv 2402.19427. Blog: State-space models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.ffn.activations import gelu_tanh
from llm.modules.kernels.scan import linear_scan
from llm.modules.recurrent.short_convolution import ShortConvolution
from llm.modules.recurrent.state import empty_state, hide_padding, keep, kept, widen


class GriffinRecurrence(nn.Module):
    """(B, T, d_model) -> (B, T, d_model). `d_rnn` channels inside, `n_heads` blocks in each gate's matrix."""

    def __init__(self, *, d_model: int, d_rnn: int, n_heads: int, d_conv: int = 4):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_rnn)
        self.x_proj = nn.Linear(d_model, d_rnn)
        self.conv = ShortConvolution(d_rnn, d_conv, bias=True, activation=None)
        self.lru = RGLRU(d_rnn, n_heads)
        self.o_proj = nn.Linear(d_rnn, d_model)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        u = self.conv(self.x_proj(x), positions, cache)
        h, state = self.lru(u, positions, kept(cache))
        keep(cache, state=state)
        return self.o_proj(h * gelu_tanh(self.gate_proj(x)))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """One number for each channel and the last inputs of the convolution, whatever the length."""
        state = empty_state(batch_size, self.o_proj.weight, state=(self.o_proj.in_features,))
        return state | self.conv.make_cache(batch_size)


class RGLRU(nn.Module):
    """u (B, T, d_rnn), positions and the state (B, d_rnn) -> h (B, T, d_rnn) in u's dtype and the last state."""

    no_weight_decay = ("recurrent_bias", "input_bias")  # they are biases, although they have two axes

    def __init__(self, d_rnn: int, n_heads: int):
        super().__init__()
        width = d_rnn // n_heads
        self.Lambda = nn.Parameter(torch.empty(d_rnn))
        self.recurrent_weight = nn.Parameter(torch.empty(n_heads, width, width))
        self.recurrent_bias = nn.Parameter(torch.empty(n_heads, width))
        self.input_weight = nn.Parameter(torch.empty(n_heads, width, width))
        self.input_bias = nn.Parameter(torch.empty(n_heads, width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, scheme: str = "normal", n_layers: int = 1) -> None:
        """With r = 1, a begins between 0.9 and 0.999: softplus(Lambda) = -log(a) / 8."""
        rate = -self.Lambda.uniform_(0.9, 0.999).log() / 8
        self.Lambda.copy_(rate.expm1().log())
        for weight in (self.recurrent_weight, self.input_weight):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.recurrent_bias)
        nn.init.zeros_(self.input_bias)

    def forward(self, u: Tensor, positions: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, i = (
            self.gate(u, self.recurrent_weight, self.recurrent_bias),
            self.gate(u, self.input_weight, self.input_bias),
        )
        log_a = -8 * r * F.softplus(widen(self.Lambda))
        first = (positions == 0)[..., None]
        # the root has an infinite gradient at 0, so it is taken of 1e-6 at least
        factor = torch.where(first, 1.0, (-torch.expm1(2 * log_a)).clamp(min=1e-6).sqrt())
        inputs, log_a = hide_padding(positions, factor * i * widen(u), log_a)
        states = linear_scan(log_a.exp(), inputs, torch.zeros_like(inputs[:, 0]) if state is None else state)
        return states.to(u.dtype), states[:, -1]

    def gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """u (B, T, d_rnn) -> sigmoid(u W + b), (B, T, d_rnn) in fp32 or wider; W has one block (w, w) for each head."""
        heads = u.unflatten(-1, (len(weight), -1))
        return (widen(torch.einsum("bthi,hij->bthj", heads, weight)) + widen(bias)).sigmoid().flatten(2)

    def flops(self, context: int) -> float:
        """FLOPs per token: two gates, and the state decays and is written."""
        return 2 * (self.recurrent_weight.numel() + self.input_weight.numel()) + 4 * len(self.Lambda)
