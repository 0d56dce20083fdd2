"""Relative positions of Transformer-XL: each score is a content term plus a term for the distance of the key.

    score(i, j) = [ (q_i + u) . k_j  +  (q_i + v) . W_r R_(i - j) ] / sqrt(d)

R_n is the sinusoidal vector of distance n. W_r is learned, and so are u and v, one pair for each head. Multiplied out,
the score has the paper's four terms: q with k, q with the distance, u with k, and v with the distance. The paper's
recurrence across segments is left out: a text is one segment.

Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860, section 3.3 and appendix B.
Blog: Position encoding, relative.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places
from llm.modules.kernels.attention import attend
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
        scale = self.head_dim**-0.5
        by_distance = self.score_distances(q, k.shape[2])
        aligned = shift(by_distance) if places.whole_text else gather(by_distance, places)
        query = q + self.u[:, None].to(q.dtype)
        return attend(query, k, v, places, self.mask, bias=aligned * scale, scale=scale)

    def score_distances(self, q: Tensor, n: int) -> Tensor:
        """The unscaled distance term of every query for the distances n - 1, .., 1, 0: (B, H, T, n)."""
        distances = torch.arange(n - 1, -1, -1, device=q.device)
        r = self.r_proj(sinusoidal(distances, self.d_model).to(self.r_proj.weight.dtype))  # (n, H D)
        r = r.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0)  # (H, D, n)
        return (q + self.v[:, None].to(q.dtype)) @ r.to(q.dtype)

    def flops(self, context: int) -> float:
        """FLOPs per token: queries times keys, queries times distances, weights times values."""
        return 6 * self.q_proj.out_features * mean_keys(self.mask, context)


def gather(by_distance: Tensor, places: Places) -> Tensor:
    """Scores by distance, S - 1 .. 0, -> scores by key, by looking each one up; both are (B, H, T, S).

    For future keys and padding, the distance is clamped to 0 .. S - 1; the mask hides these keys later.
    """
    n = by_distance.shape[-1]
    distance = (places.q[..., :, None] - places.k[..., None, :]).clamp(0, n - 1)  # (T, S) or (B, T, S)
    index = n - 1 - distance
    index = index if index.dim() == 2 else index[:, None]
    return by_distance.gather(-1, index.expand_as(by_distance))


def shift(by_distance: Tensor) -> Tensor:
    """The same for one whole text, without a look-up: (B, H, T, T) both. Row i must move left by T - 1 - i. To do so,
    add a column on the left, read the numbers in rows of T, and drop the first row."""
    n_rows, n_columns = by_distance.shape[-2:]
    padded = F.pad(by_distance, (1, 0))  # (B, H, T, T + 1)
    return padded.flatten(-2).unflatten(-1, (n_columns + 1, n_rows))[..., 1:, :]
