"""Relative-position decoder: Transformer-XL's scores, without its recurrence; embeddings hold no positions.

    score(i, j) = [ (q_i + u) . k_j  +  (q_i + v) . W_r R_(i - j) ] / sqrt(d)        the baseline: q_i . k_j / sqrt(d)

R_n is the sinusoidal vector of distance n; W_r and, for each head, u and v are learned.

Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860.
Blog: Position encoding, relative.
Gallery: docs/gallery/index.html#relative_position
"""

from torch import nn

from llm.models.nope import NoPEDecoder
from llm.modules.position_encoding.relative import RelativeAttention


class RelativePositionDecoder(NoPEDecoder):
    def make_mixer(self, layer: int) -> nn.Module:
        return RelativeAttention(d_model=self.config.d_model, n_heads=self.config.n_heads)
