"""Short convolution: each channel mixes its own last few values, so that a key can depend on the token before it.

    y_t = act(w_1 x_{t-3} + w_2 x_{t-2} + w_3 x_{t-1} + w_4 x_t + b)        for each channel, with width 4

A state that is read with one query cannot compare neighbouring tokens by itself. Most delta rules and state-space
layers since H3 have such a convolution before their keys, queries and values. Hungry Hungry Hippos, arXiv 2212.14052;
Mamba, arXiv 2312.00752, section 3.4. Blog: State-space models.

`GatedConvolution` is the same as a whole mixer: LFM2 uses it for most of its layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.convolution import Depthwise
from llm.modules.kernels.precision import is_remote
from llm.modules.recurrent.state import hide_padding


class ShortConvolution(nn.Module):
    """(B, T, channels) -> (B, T, channels), causal. `weight` (channels, 1, width) as in nn.Conv1d. Padding counts as 0.

    activation   applied to the result; None leaves it as it is
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = F.silu,
    ):
        super().__init__()
        self.width, self.activation = width, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.init_weights()

    def init_weights(self, scheme: str = "normal", n_layers: int = 1) -> None:
        """Uniform within 1 / sqrt(width), as nn.Conv1d is drawn, in every scheme; the bias is 0."""
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        (hidden,) = hide_padding(positions, x)
        if cache is None:
            inputs = F.pad(hidden, (0, 0, self.width - 1, 0))
        else:
            inputs = torch.cat([cache["conv"], hidden], 1)
            cache["conv"].copy_(inputs[:, x.shape[1] :])
        convolve = explicit_convolution if x.shape[1] == 1 or is_remote(x) else Depthwise.apply
        y = convolve(inputs, self.weight[:, 0], self.bias).to(x.dtype)
        return y if self.activation is None else self.activation(y)

    def make_cache(self, batch_size: int) -> dict[str, Tensor]:
        """The last width - 1 inputs."""
        w = self.weight
        return {"conv": torch.zeros(batch_size, self.width - 1, len(w), dtype=w.dtype, device=w.device)}

    def flops(self, context: int) -> float:
        """FLOPs per token."""
        return 2 * self.weight.numel()


def explicit_convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs (B, T + width - 1, C), weight (C, width) -> (B, T, C): the weighted sum of the shifted inputs."""
    width = weight.shape[1]
    n_tokens = inputs.shape[1] - width + 1
    y = sum(weight[:, i] * inputs[:, i : i + n_tokens] for i in range(width))
    return y if bias is None else y + bias


class GatedConvolution(nn.Module):
    """LFM2's mixer: y = C * conv(B * x), with B, C and x projected from the token. (B, T, d_model) -> (B, T, d_model).

    The two gates let a token decide what enters the convolution and what leaves it. LFM2 Technical Report,
    arXiv 2511.23404.
    """

    def __init__(self, *, d_model: int, width: int = 3, bias: bool = False):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.conv = ShortConvolution(d_model, width, bias=bias, activation=None)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        gate_in, gate_out, x = self.in_proj(x).chunk(3, -1)
        return self.o_proj(gate_out * self.conv(gate_in * x, positions, cache))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        return self.conv.make_cache(batch_size)
