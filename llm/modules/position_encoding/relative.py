"""Relative positions of Transformer-XL: each score is a content term plus a term for the distance of the key.

    score(i, j) = [ (q_i + u) . k_j  +  (q_i + v) . W_r R_(i - j) ] / sqrt(d)

R_n is the sinusoidal vector of distance n. W_r is learned, and so are u and v, one pair for each head. Multiplied out,
the score has the paper's four terms: q with k, q with the distance, u with k, and v with the distance. The paper's
recurrence across segments is left out: a text is one segment.

Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860, section 3.3 and appendix B.
Blog: Position encoding, relative.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places
from llm.modules.kernels.attention import attend
from llm.modules.kernels.precision import without_slow_bf16
from llm.modules.masks import mean_keys
from llm.modules.position_encoding.sinusoidal import sinusoidal


class RelativeAttention(MultiHeadAttention):
    """Multi-head attention with relative positions: (B, T, d_model) -> (B, T, d_model). d_model must be even."""

    no_weight_decay = ("u", "v")  # u and v are biases, although they have two axes

    def __init__(self, *, d_model: int, n_heads: int):
        super().__init__(d_model=d_model, n_heads=n_heads)
        self.d_model = d_model
        self.r_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads, self.head_dim))
        self.v = nn.Parameter(torch.zeros(n_heads, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Cached keys may have any order. The distance of a query
        and a visible key is below S."""
        query, r = q + self.u[:, None].to(q.dtype), self.distances(k.shape[2])
        bias = DistanceScores(*without_slow_bf16(q + self.v[:, None].to(q.dtype), r.to(q.dtype)), self.head_dim**-0.5)
        return attend(query, k, v, places, self.mask, bias=bias, scale=self.head_dim**-0.5)

    def distances(self, n: int) -> Tensor:
        """W_r R of the distances n - 1, .., 1, 0: (H, D, n)."""
        distances = torch.arange(n - 1, -1, -1, device=self.u.device)
        r = self.r_proj(sinusoidal(distances, self.d_model).to(self.r_proj.weight.dtype))  # (n, H D)
        return r.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0)

    def flops(self, context: int) -> float:
        """FLOPs per token: queries times keys, queries times distances, weights times values."""
        return 6 * self.q_proj.out_features * mean_keys(self.mask, context)


class DistanceScores(NamedTuple):
    """The position term as a `bias`: queries (B, H, T, D) times r (H, D, n), of the distances n - 1, .., 0, times
    scale.

    Called with positions (B, T) and (B, S) of all queries, or with some of the positions (T,) of one whole text.
    """

    queries: Tensor
    r: Tensor
    scale: float

    def parameters(self) -> tuple[Tensor, Tensor]:
        """What gets a gradient."""
        return self.queries, self.r

    def __call__(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        n_queries, n_keys = q_pos.shape[-1], k_pos.shape[-1]
        if q_pos.dim() == 2:
            return gather(self.queries @ self.r, Places(q_pos, k_pos)) * self.scale
        if n_queries == self.queries.shape[2]:
            return shift(self.queries @ self.r) * self.scale
        start = int(q_pos[0])
        queries = self.queries[:, :, start : start + n_queries]
        if n_keys == start + n_queries:  # all keys up to the last query
            return shift(queries @ self.r[..., -n_keys:]) * self.scale
        return gather(queries @ self.r, Places(q_pos, k_pos)) * self.scale


def gather(by_distance: Tensor, places: Places) -> Tensor:
    """Scores (B, H, T, n) for the distances n - 1 .. 0 -> scores for the keys, (B, H, T, S), by looking each one up.

    For future keys and padding, the distance is clamped to 0 .. S - 1; the mask hides these keys later.
    """
    n = by_distance.shape[-1]
    distance = (places.q[..., :, None] - places.k[..., None, :]).clamp(0, n - 1)  # (T, S) or (B, T, S)
    index = n - 1 - distance
    index = index if index.dim() == 2 else index[:, None]
    return by_distance.gather(-1, index.expand(*by_distance.shape[:3], -1))


def shift(by_distance: Tensor) -> Tensor:
    """The same without a look-up, for the last T queries of S keys: the row of query i of T must move left by T - 1 -
    i. With one more column on the left, leaving out T numbers and reading the others in rows of S does that.
    (B, H, T, S) both."""
    n_rows, n_columns = by_distance.shape[-2:]
    padded = F.pad(by_distance, (1, 0))  # (B, H, T, S + 1)
    return padded.flatten(-2)[..., n_rows:].unflatten(-1, (n_rows, n_columns))
