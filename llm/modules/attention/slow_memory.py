"""What attention moves between slow and fast memory, counted; and standard attention, to compare with.

A GPU computes in a small fast memory on the chip and keeps tensors in a large slow one (HBM). Attention is bound by
what it moves between the two. For N queries and keys of width d, and a fast memory that holds M numbers:

    standard attention   O(N d + N^2)        writes the scores, reads them for the softmax, writes P, reads it for P V
    FlashAttention       O(N^2 d^2 / M)      the scores never leave the fast memory; d <= M <= N d

FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, arXiv 2205.14135, theorem 2.
Blog: Attention, FlashAttention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SlowMemory:
    """Counts numbers, not bytes. `load` and `store` move rows of tensors (B, H, T, ..) that lie in slow memory."""

    reads: int = 0
    writes: int = 0

    def load(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """The rows of x."""
        part = x[:, :, rows]
        self.reads += part.numel()
        return part

    def store(self, x: Tensor, part: Tensor | float, rows: slice = slice(None)) -> Tensor:
        """Overwrite the rows of x with `part` -> x."""
        x[:, :, rows] = part
        self.writes += x[:, :, rows].numel()
        return x


def tile_sizes(fast: int, width: int) -> tuple[int, int]:
    """How many rows of two tensors (FlashAttention-1: of k and v), and of two others, are in a tile: together they fill
    `fast` numbers, rounded up. The paper's algorithm 1: M / 4 d and min(M / 4 d, d). Scores and statistics come on top,
    as its bound ignores constants."""
    many = -(-fast // (4 * width))
    return many, min(many, width)


def standard_attention(q: Tensor, k: Tensor, v: Tensor, memory: SlowMemory) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, H, S, D) without a mask -> the output, and P (B, H, T, S) for the backward pass.
    The paper's algorithm 0."""
    scores = memory.store(
        q.new_empty(*q.shape[:3], k.shape[2]), memory.load(q) @ memory.load(k).mT * q.shape[-1] ** -0.5
    )
    p = memory.store(torch.empty_like(scores), memory.load(scores).softmax(-1))
    return memory.store(torch.empty_like(q), memory.load(p) @ memory.load(v)), p


def standard_backward(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, d_out: Tensor, memory: SlowMemory
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of q, k and v. The paper's algorithm 3."""
    dv = memory.store(torch.empty_like(v), memory.load(p).mT @ memory.load(d_out))
    dp = memory.store(torch.empty_like(p), memory.load(d_out) @ memory.load(v).mT)
    p_again, dp_again = memory.load(p), memory.load(dp)
    inner = (p_again * dp_again).sum(-1, keepdim=True)
    ds = memory.store(torch.empty_like(p), p_again * (dp_again - inner) * q.shape[-1] ** -0.5)
    dq = memory.store(torch.empty_like(q), memory.load(ds) @ memory.load(k))
    dk = memory.store(torch.empty_like(k), memory.load(ds).mT @ memory.load(q))
    return dq, dk, dv
