"""ALiBi: scores fall linearly with the distance, with a fixed slope for each head; embeddings hold no positions.

    score(i, j) = q_i . k_j / sqrt(d) - m_h (i - j)        m_h = 2^(-8 h / n_heads),  h = 1 .. n_heads

Heads with a steep slope attend to near keys, those with a flat one to far keys, at any length: a model trained on short
texts can read longer ones.
Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, arXiv 2108.12409, section 3.
Blog: Position encoding, ALiBi.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ALiBi:
    """A `score_bias` for `n_heads` heads."""

    n_heads: int

    def __call__(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The bias in fp32: positions (T,) and (S,) -> (H, T, S), or (B, T) and (B, S) -> (B, H, T, S)."""
        distance = q_pos[..., None, :, None] - k_pos[..., None, None, :]
        return -alibi_slopes(self.n_heads, q_pos.device)[:, None, None] * distance

    def channels(self, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """(H, 2) and (S, 2), whose product is m_h j: a softmax ignores m_h i, which is the same for all keys of a
        query.

        j = 256 (j // 256) + j % 256, since bf16 has whole numbers up to 256 only. Exact up to 65,536 tokens.
        """
        slopes = alibi_slopes(self.n_heads, k_pos.device)
        return torch.stack([256 * slopes, slopes], -1), torch.stack([k_pos // 256, k_pos % 256], -1)


def alibi_slopes(n_heads: int, device: torch.device | None = None) -> Tensor:
    """(n_heads,) in fp32: a geometric sequence from 2^(-8 / n) down to 2^-8.

    Where n_heads is no power of two, the slopes for the next lower power of two come first. The other heads take the
    slopes halfway (in the exponent) before the first, before the second, .., as the authors do.
    """
    n = 1 << (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device)
    return 2.0 ** (-8 / n * torch.where(head < n, head + 1, head - n + 0.5))
