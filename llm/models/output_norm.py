"""Output norm: each sublayer reads the stream as it is, and what it adds is normalised.

    x = x + norm(attention(x))        x = x + norm(ffn(x))        the baseline: the norm is inside, at the input

Half of sandwich norm: it bounds what a layer adds, without a norm at the layer's input.
2 OLMo 2 Furious, arXiv 2501.00656, where it replaced pre-norm for stability. Blog: Normalization, sandwich norm.
Gallery: docs/gallery/index.html#output_norm
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.blocks import OutputNormBlock


class OutputNorm(Baseline):
    def make_block(self, layer: int) -> nn.Module:
        return OutputNormBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
