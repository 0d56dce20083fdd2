"""BigBird's mask: some blocks that everyone sees, the blocks nearby, and a few drawn at random.

    block i sees block j <= i where   j < n_global   or   i - j < n_window   or   j is one of i's n_random draws

Random links make any two blocks a few hops apart, as in a small-world graph, so T x constant scores stand in for T x T.
Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, here with causal order.
Blog: Attention, sparse attention.

The draws are a hash of (seed, layer, block, draw) and no table: the mask has no length, lives on every device, and is
the same whenever and wherever it is asked for, so a text continued through a cache sees what it would see in one go.
"""

import math

from torch import Tensor

from llm.modules.masks import Visible


def big_bird(*, block_size: int, n_global: int, n_window: int, n_random: int, seed: int = 0, layer: int = 0) -> Visible:
    """A mask for `masks.visibility`. Sizes are in blocks of `block_size` tokens; a query's own block counts as the
    first of `n_window`. Draws fall on the blocks that are neither global nor nearby, perhaps twice on the same.
    """
    if block_size < 1 or n_window < 1 or n_global < 0 or n_random < 0:
        raise ValueError(
            f"block_size = {block_size} and n_window = {n_window} must be at least 1, n_global = {n_global} and "
            f"n_random = {n_random} at least 0 (--model.block-size, --model.n-window, ...)"
        )

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        i, j = q_pos.long() // block_size, k_pos.long() // block_size
        seen = (j < n_global) | (i - j < n_window)
        n_far = (i - n_window + 1 - n_global).clamp(min=1)  # blocks to draw from; where there is none, a nearby one
        for draw in range(n_random):
            drawn = n_global + scramble(i, (seed * 1_000 + layer) * 1_000 + draw) % n_far
            seen = seen | (j == drawn)
        return seen & (k_pos <= q_pos)

    visible.reach = math.inf
    return visible


def scramble(x: Tensor, key: int) -> Tensor:
    """Hash int64 numbers to [0, 2^31): like and unlike numbers get unrelated results. Multiply, fold, twice."""
    x = x + key * 0x9E3779B1 % 2**31
    for _ in range(2):
        x = (x & 0x7FFFFFFF) * 0x2C1B3C6D
        x = (x ^ (x >> 15)) & 0x7FFFFFFF
    return x
