"""ALiBi: scores fall linearly with the distance, with a fixed slope for each head; embeddings hold no positions.

    score(i, j) = q_i . k_j / sqrt(d) - m_h (i - j)        m_h = 2^(-8 h / n_heads),  h = 1 .. n_heads

Heads with a steep slope attend to near keys, those with a flat one to far keys, at any length: a model trained on short
texts can read longer ones.
Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, arXiv 2108.12409, section 3.
Blog: Position encoding, ALiBi.
"""

import torch
from torch import Tensor


def alibi(q_pos: Tensor, k_pos: Tensor, n_heads: int) -> Tensor:
    """The bias of the scores in fp32: positions (T,) and (S,) -> (H, T, S), or (B, T) and (B, S) -> (B, H, T, S).

    `functools.partial(alibi, n_heads=..)` is a `score_bias`.
    """
    distance = q_pos[..., None, :, None] - k_pos[..., None, None, :]
    return -alibi_slopes(n_heads, q_pos.device)[:, None, None] * distance


def alibi_slopes(n_heads: int, device: torch.device | None = None) -> Tensor:
    """(n_heads,) in fp32: a geometric sequence from 2^(-8 / n) down to 2^-8.

    Where n_heads is no power of two, the slopes for the next lower power of two come first. The other heads take the
    slopes halfway (in the exponent) before the first, before the second, .., as the authors do.
    """
    n = 1 << (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device)
    return 2.0 ** (-8 / n * torch.where(head < n, head + 1, head - n + 0.5))
