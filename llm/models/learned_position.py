"""Learned-position decoder: a trained vector for each position replaces the sinusoids.

    x_p = sqrt(d_model) (E[token_p] + P[p])        the baseline: sqrt(d_model) E[token_p] + PE(p)

The sum is scaled, not the token alone: P has a deviation of 0.02 at the start, which becomes 0.02 sqrt(512) = 0.45 at
the default width, beside 1 for a token. A position beyond the table is an error.

Convolutional Sequence to Sequence Learning, arXiv 1705.03122; GPT-2. Blog: Position encoding, learned.
Gallery: docs/gallery/index.html#learned_position
"""

from torch import Tensor

from llm.models.baseline import Baseline
from llm.modules.cache import Cache
from llm.modules.position_encoding.learned import LearnedPosition


class LearnedPositionDecoder(Baseline):
    def __init__(self, config: Baseline.Config):
        super().__init__(config)
        self.position = LearnedPosition(config.max_seq_len, config.d_model)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return (self.tok_embed(tokens) + self.position(positions)) * self.config.d_model**0.5

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        self.position.check(length)
        return super().make_cache(batch_size, length, padding)
