"""BigBird's mask: some blocks that every query sees, the blocks nearby, and a few blocks drawn at random.

    block i sees block j <= i where   j < n_global   or   i - j < n_window   or   j is one of i's n_random draws

Random links put any two blocks a few hops apart, as in a small-world graph, so T x constant scores replace T x T.
Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, here with causal order.
Blog: Attention, sparse attention.

A draw is a hash of (seed, layer, block, draw). So the mask has no length, needs no table on a device, and is the same
in each call: a text that is continued through a cache sees what it would see in one pass.
"""

from dataclasses import dataclass

from torch import Tensor

from llm.modules.masks import Mask


@dataclass(frozen=True, kw_only=True)
class BigBird(Mask):
    """Sizes are in blocks of `block_size` tokens; a query's own block counts as the first of `n_window`.

    Draws fall on the blocks that are neither global nor nearby; two draws may fall on one block.
    """

    block_size: int
    n_global: int
    n_window: int
    n_random: int
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        if self.block_size < 1 or self.n_window < 1 or self.n_global < 0 or self.n_random < 0:
            raise ValueError(
                f"block_size = {self.block_size} and n_window = {self.n_window} must be at least 1, n_global = "
                f"{self.n_global} and n_random = {self.n_random} at least 0 (--model.block-size, --model.n-window, ...)"
            )

    @property
    def query_block(self) -> int:
        return self.block_size

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        i, j = q_pos.long() // self.block_size, k_pos.long() // self.block_size
        seen = (j < self.n_global) | (i - j < self.n_window)
        n_far = (i - self.n_window + 1 - self.n_global).clamp(min=1)  # blocks to draw from
        for draw in range(self.n_random):
            key = (self.seed * 1_000 + self.layer) * 1_000 + draw
            seen = seen | (j == self.n_global + scramble(i, key) % n_far)
        return seen & (k_pos <= q_pos)


def scramble(x: Tensor, key: int) -> Tensor:
    """Hash int64 numbers to [0, 2^31), differently for each key. Two rounds of multiplying and folding."""
    x = x + key * 0x9E3779B1 % 2**31
    for _ in range(2):
        x = (x & 0x7FFFFFFF) * 0x2C1B3C6D
        x = (x ^ (x >> 15)) & 0x7FFFFFFF
    return x
