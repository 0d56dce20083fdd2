"""Parallel block: attention and feed-forward layer read the same normalised input and add to the stream together.

    h = norm(x)        x = x + attention(h) + ffn(h)        the baseline: the feed-forward layer reads after attention

Their first projections share one input, so a fused kernel computes both at once, and a sharded model synchronises once
a block instead of twice. The feed-forward layer no longer reads what its own block's attention added.
PaLM: Scaling Language Modeling with Pathways, arXiv 2204.02311, section 2; first in GPT-J. Blog: Normalization.
Gallery: docs/gallery/index.html#parallel_block
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.blocks import ParallelBlock


class ParallelBlockDecoder(Baseline):
    def make_block(self, layer: int) -> nn.Module:
        return ParallelBlock(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)
