"""The textbook feed-forward layer: widen, apply a nonlinearity, narrow, the same at every position.

    MLP(x) = act(x W_up) W_down

Attention Is All You Need, arXiv 1706.03762, section 3.3, with ReLU; GELU: arXiv 1606.08415. Blog: Activations; FFN.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """(B, T, d_model) -> (B, T, d_model) through d_ff hidden units, without biases unless asked for."""

    def __init__(self, d_model: int, d_ff: int, activation: Callable[[Tensor], Tensor] = F.gelu, bias: bool = False):
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.d_ff, self.activation = d_ff, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
