"""Transformer-XL's relative positions: scores ask what a key holds and, separately, how far back it stands.

    score(i, j) = [ (q_i + u) . k_j  +  (q_i + v) . W_r R_(i - j) ] / sqrt(d)

R_n is the sinusoidal vector of distance n. Multiplied out these are the paper's four terms: content with content,
content with distance, and each key and each distance with a vector that is learned for the head, u and v.
Without the recurrence across segments: a text is one segment.

Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860, section 3.3 and appendix B.
Blog: Position encoding, relative.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.attention.core import attention
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.position_encoding.sinusoidal import sinusoidal


class RelativeAttention(MultiHeadAttention):
    """Multi-head attention whose scores know distances: (B, T, d_model) -> (B, T, d_model). d_model must be even."""

    def __init__(self, *, d_model: int, n_heads: int):
        super().__init__(d_model=d_model, n_heads=n_heads)
        self.d_model = d_model
        self.r_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.u = nn.Parameter(torch.zeros(n_heads, self.head_dim))
        self.v = nn.Parameter(torch.zeros(n_heads, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

        Positions (T,), without a cache, count up by one; those of a cache come in any order, within S of each other.
        """
        scale = self.head_dim**-0.5
        by_distance = self.score_distances(q, k.shape[2])
        aligned = shift(by_distance) if q_pos is k_pos else gather(by_distance, q_pos, k_pos)
        query = q + self.u[:, None].to(q.dtype)
        return attention(query, k, v, q_pos, k_pos, self.visible, aligned * scale, scale)

    def score_distances(self, q: Tensor, n: int) -> Tensor:
        """The position term of every query for the distances n - 1, .., 1, 0: (B, H, T, n)."""
        distances = torch.arange(n - 1, -1, -1, device=q.device)
        r = self.r_proj(sinusoidal(distances, self.d_model).to(self.r_proj.weight.dtype))  # (n, H D)
        r = r.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0)  # (H, D, n)
        return (q + self.v[:, None].to(q.dtype)) @ r.to(q.dtype)


def gather(by_distance: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Scores for the distances S - 1 .. 0 -> scores for keys at `k_pos`, (B, H, T, S) both, by looking each one up.

    Keys in the future and padding, which are masked later, get what is at the nearer end.
    """
    n = by_distance.shape[-1]
    distance = (q_pos[..., :, None] - k_pos[..., None, :]).clamp(0, n - 1)  # (T, S) or (B, T, S)
    index = n - 1 - distance
    index = index if index.dim() == 2 else index[:, None]
    return by_distance.gather(-1, index.expand_as(by_distance))


def shift(by_distance: Tensor) -> Tensor:
    """The same without a look-up, where T = S and positions count up by one: query i needs its row moved left by
    T - 1 - i. One column more on the left makes reading the numbers in rows of T do that: (B, H, T, T) both."""
    n_rows, n_columns = by_distance.shape[-2:]
    padded = F.pad(by_distance, (1, 0))  # (B, H, T, T + 1)
    return padded.flatten(-2).unflatten(-1, (n_columns + 1, n_rows))[..., 1:, :]
