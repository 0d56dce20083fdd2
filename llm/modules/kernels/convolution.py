"""A convolution of each channel with its own last few values, at its fastest on a CPU.

    y_t = sum_i w_i x_{t + i}        dx_t = sum_i w_i dy_{t - i}        dw_i = sum_t dy_t x_{t + i}

y and dx are depthwise convolutions, for which oneDNN is fast where channels are adjacent. It is slow for dw, which is a
product and a sum for each of the few weights of a channel. For one token, on other devices and in compiled code,
the definition in short_convolution.py is used instead.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.modules.kernels.precision import without_autocast


class Depthwise(torch.autograd.Function):
    """x (B, T + width - 1, C), weight (C, width), bias (C,) or None -> (B, T, C) in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        n_tokens, width = grad.shape[1], weight.shape[1]
        around = F.pad(grad, (0, 0, width - 1, width - 1))
        shifted = (x[:, i : i + n_tokens] for i in range(width))
        grad_weight = torch.stack([total(grad * part, weight.dtype) for part in shifted], 1)
        grad_bias = total(grad, weight.dtype) if ctx.needs_input_grad[2] else None
        return depthwise(around, weight.flip(1)), grad_weight, grad_bias


def total(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, C) -> (C,) in `dtype`. Tokens are summed first, in fp32 inside, without a copy in fp32."""
    return x.sum(1).sum(0, dtype=dtype)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_i w_i x_{t + i} + bias: x (B, T + width - 1, C), weight (C, width) -> (B, T, C).

    x becomes an image of one row, since oneDNN leaves the channels of an image adjacent.
    """
    weight, bias = weight.to(x.dtype)[:, None, None], None if bias is None else bias.to(x.dtype)
    with without_autocast(x):
        return F.conv2d(x.mT[:, :, None], weight, bias, groups=len(weight))[:, :, 0].mT
