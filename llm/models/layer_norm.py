"""LayerNorm in place of RMSNorm: subtract the mean before dividing by the deviation, then scale and shift.

    LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * w + b        the baseline: x / sqrt(mean(x^2) + eps) * w

RMSNorm leaves out the mean and the shift at little or no cost in quality, so models since LLaMA use it.
Layer Normalization, arXiv 1607.06450. Blog: Normalization, LayerNorm.
Gallery: docs/gallery/index.html#layer_norm
"""

from dataclasses import dataclass

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.norms import LayerNorm


class LayerNormDecoder(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes."""

        norm_bias: bool = True
        """LayerNorm's shift b; off as in PaLM and Cohere's models."""

    def make_norm(self) -> nn.Module:
        return LayerNorm(self.config.d_model, self.config.norm_eps, self.config.norm_bias)
