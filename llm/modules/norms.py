"""Normalisation layers keep the scale of activations constant, so that it neither grows nor vanishes with depth.

    LayerNorm(x)            = (x - mean(x)) / sqrt(var(x) + eps) * w + b
    RMSNorm(x)              = x / sqrt(mean(x^2) + eps) * w
    ZeroCentredRMSNorm(x)   = x / sqrt(mean(x^2) + eps) * (1 + w)

Means are taken over the last axis, for half precision in fp32, since bf16 has fewer than three decimal digits.
Blog: Normalization, LayerNorm and RMSNorm.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divide the last axis by its root mean square: (.., dim) -> (.., dim).

    This is LayerNorm without the mean and the bias. In half precision the quotient is rounded first and then multiplied
    by the gain, as in LLaMA. Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class OnceRoundedRMSNorm(RMSNorm):
    """RMSNorm that multiplies by the gain in fp32 and rounds once, at the end, as OLMo 2 and GPT-OSS do."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), self.weight.shape, None, self.eps) * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """Shift the last axis to mean 0 and scale it to variance 1: (.., dim) -> (.., dim).

    Layer Normalization, arXiv 1607.06450.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm whose gain is 1 + w: (.., dim) -> (.., dim), with w = 0 at the start.

    Weight decay, if applied to w, pulls the gain to 1 instead of 0. Stored in bf16, w keeps small changes: bf16 numbers
    are dense near 0, but 1/128 apart above 1. Without decay, in fp32, it trains like RMSNorm. The product is computed
    in fp32 and rounded once. Gemma: Open Models Based on Gemini Research and Technology, arXiv 2403.08295.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), self.weight.shape, None, self.eps)
        return (normed * (1 + self.weight.to(wide))).to(x.dtype)
