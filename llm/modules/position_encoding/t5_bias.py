"""T5's relative bias: each head learns a number for each distance; far distances share buckets.

    score(i, j) = q_i . k_j + b_h[bucket(i - j)]        (T5 does not divide by sqrt(d))

Half of the buckets hold one distance each. The others grow geometrically up to `max_distance`; all larger distances
share the last. T5 shares one table between its layers; here each layer has its own n_buckets x n_heads numbers.

Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, arXiv 1910.10683, section 2.1.
Blog: Position encoding, relative.
"""

import math

import torch
from torch import Tensor, nn


class T5Bias(nn.Module):
    """The bias of the scores: positions (T,) and (S,) -> (H, T, S), positions (B, T) and (B, S) -> (B, H, T, S).

    Raises ValueError for fewer than two buckets and for a `max_distance` that the exact ones reach.
    """

    def __init__(self, n_heads: int, n_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        if n_buckets < 2 or max_distance <= n_buckets // 2:
            raise ValueError(
                f"n_buckets = {n_buckets} must be at least 2 and its half below max_distance = {max_distance} "
                "(--model.n-buckets, --model.max-distance)"
            )
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.table = nn.Embedding(n_buckets, n_heads)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return self.of_distances(q_pos[..., :, None] - k_pos[..., None, :]).movedim(-1, -3)

    def of_distances(self, distances: Tensor) -> Tensor:
        """Distances i - j of any shape -> the numbers of all heads, (.., H)."""
        return self.table(bucket(distances, self.n_buckets, self.max_distance))


def bucket(distance: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """Distances i - j from a query back to a key -> bucket numbers below n_buckets; keys in the future count as 0."""
    distance = distance.clamp(min=0)
    n_exact = n_buckets // 2
    octaves = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)
    lumped = n_exact + (octaves * (n_buckets - n_exact)).long()
    return torch.where(distance < n_exact, distance, lumped.clamp(max=n_buckets - 1))
