"""Post-norm, as in the original Transformer: the residual stream is normalised after each addition.

    x = norm(x + attention(x))        x = norm(x + ffn(x))        the baseline: x + attention(norm(x)), ..

Every path from embedding to head passes through norms, so the scale of the gradient differs from layer to layer. The
first steps can diverge, so use a longer warm-up (`--warmup-steps`) than for the pre-norm baseline.
Attention Is All You Need, arXiv 1706.03762; On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
Blog: Normalization, pre- and post-norm.
Gallery: docs/gallery/index.html#post_norm
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.blocks import PostNormBlock


class PostNorm(Baseline):
    def __init__(self, config: Baseline.Config):
        super().__init__(config)
        self.norm = nn.Identity()  # the output of the last block is already normalised

    def make_block(self, layer: int) -> nn.Module:
        return PostNormBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
