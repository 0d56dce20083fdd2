"""Post-norm, as in the original Transformer: the norm is applied to the residual stream, after each addition.

    x = norm(x + attention(x))        x = norm(x + ffn(x))        the baseline: x + attention(norm(x)), ..

Every path from embedding to head passes through norms, so the scale of the gradient differs from layer to layer and the
first steps can diverge: give it a longer warm-up (`--warmup-steps`) than the pre-norm baseline.
Attention Is All You Need, arXiv 1706.03762; On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
Blog: Normalization, pre- and post-norm.
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.blocks import PostNormBlock


class PostNorm(Baseline):
    def __init__(self, config: Baseline.Config):
        super().__init__(config)
        self.norm = nn.Identity()  # the last block has normalised already

    def make_block(self, layer: int) -> nn.Module:
        return PostNormBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
