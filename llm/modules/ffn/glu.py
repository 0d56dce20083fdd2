"""Gated linear units: one projection gates the channels of another.

    GLU(x) = (act(x W_gate) * (x W_up)) W_down

The activation names the variant: sigmoid GLU, ReLU ReGLU, GELU GeGLU, SiLU SwiGLU.
GLU Variants Improve Transformer, arXiv 2002.05202; the gate itself is from Language Modeling with Gated Convolutional
Networks, arXiv 1612.08083. Blog: Activations, GLU.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llm.modules.ffn.activations import gelu, relu, silu


class GLU(nn.Module):
    """(B, T, d_model) -> (B, T, d_model) through d_ff gated units, with three matrices where an MLP has two."""

    def __init__(
        self, d_model: int, d_ff: int, activation: Callable[[Tensor], Tensor] = torch.sigmoid, bias: bool = False
    ):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.d_ff, self.activation = d_ff, activation

    @property
    def title(self) -> str:
        """The name of the variant, for pictures."""
        return {"sigmoid": "GLU", "relu": "ReGLU", "silu": "SwiGLU"}.get(self.activation.__name__, "GeGLU")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


ReGLU = partial(GLU, activation=relu)
GeGLU = partial(GLU, activation=gelu)
SwiGLU = partial(GLU, activation=silu)


def gated_width(d_ff: int, multiple_of: int = 8) -> int:
    """The width at which a GLU has as many parameters as an MLP of width `d_ff`: 2/3 of it, since it has 3 matrices.

    It is rounded to the nearest `multiple_of`, since tensor cores want multiples of 8 in half precision.
    """
    return max(1, round(d_ff * 2 / 3 / multiple_of)) * multiple_of
