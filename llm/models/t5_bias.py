"""T5-bias decoder: each head learns a number for each bucket of distances; embeddings hold no positions.

    score(i, j) = q_i . k_j + b_h[bucket(i - j)]        the baseline: q_i . k_j / sqrt(d)

As in T5, scores are not divided by sqrt(d): W_q is drawn smaller by this factor instead. Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer, arXiv 1910.10683. Blog: Position encoding, relative.
Gallery: docs/gallery/index.html#t5_bias
"""

from dataclasses import dataclass

import torch
from torch import nn

from llm.models.nope import NoPEDecoder
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.position_encoding.t5_bias import T5Bias


class T5BiasDecoder(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """The baseline's sizes and the buckets."""

        n_buckets: int = 32
        """Buckets of distances; half of them hold one distance each."""
        max_distance: int = 128
        """All distances from here on share the last bucket."""

    def __init__(self, config: Config):
        super().__init__(config)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.q_proj.weight /= block.mixer.head_dim**0.5

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        bias = T5Bias(c.n_heads, c.n_buckets, c.max_distance)
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, score_bias=bias, scale=1.0)
