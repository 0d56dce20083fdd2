"""Sandwich norm: each sublayer reads a normalised input, and what it adds is normalised once more.

    x = x + norm'(attention(norm(x)))        x = x + norm'(ffn(norm(x)))        the baseline: without norm'

The stream itself is not normalised, as in pre-norm, but the second norm bounds what a single layer adds to it.
CogView: Mastering Text-to-Image Generation via Transformers, arXiv 2105.13290; Gemma 2, arXiv 2408.00118.
Blog: Normalization, sandwich norm.
Gallery: docs/gallery/index.html#sandwich_norm
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.blocks import SandwichBlock


class SandwichNorm(Baseline):
    def make_block(self, layer: int) -> nn.Module:
        return SandwichBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
