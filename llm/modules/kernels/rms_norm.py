"""RMSNorm at its fastest: on a CPU, torch computes it in several passes over x, forward and backward.

    y = x r * w,  r = 1 / sqrt(mean(x^2) + eps)        dx = r (h - x r mean(h x r)),  h = w dy        dw = sum(dy x r)

torch has a fused kernel for the gradient of LayerNorm. Given 0 for the mean of x and r for 1 / std, it returns
r (h - mean(h) - x r mean(h x r)). Adding r mean(h) gives dx. Its dw is not used: in bf16 it is wrong by 5 % or more.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.modules.kernels.precision import is_remote


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (.., dim), weight (dim,) -> (.., dim) in x's dtype. x r is rounded before it is multiplied by w."""
    if is_remote(x) or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, None, eps) * weight.to(x.dtype)
    return RootMeanSquareNorm.apply(x, weight, eps)


class RootMeanSquareNorm(torch.autograd.Function):
    """The equations at the top of the file."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, wide_weight = grad.contiguous(), weight.to(scale.dtype)
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, wide_weight, None, [True, False, False]
        )
        mean = (grad @ weight.to(grad.dtype))[..., None] / len(weight)
        grad_weight = torch.mv((grad * x).flatten(0, -2).mT, scale.flatten().to(grad.dtype))
        return grad_x.add_(mean * scale), grad_weight.to(weight.dtype), None
