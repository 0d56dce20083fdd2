"""Summaries of blocks of keys in a cache: each is written once, when the last token of its block arrives.

Block c covers the tokens c stride .. c stride + size - 1; with stride < size blocks overlap. T new tokens finish at
most T // stride + 1 blocks, so shapes depend on the number of new tokens only. A candidate that is not finished is
written into one more slot at the end, which nobody reads.
"""

import torch
from torch import Tensor


def n_summaries(n_tokens: int, size: int, stride: int) -> int:
    """How many blocks `n_tokens` tokens finish."""
    return max(0, (n_tokens - size) // stride + 1)


def mean_summaries(context: int, size: int, stride: int) -> float:
    """The number of blocks that are finished at a token, averaged over a text of `context` tokens."""
    return sum(n_summaries(n_tokens, size, stride) for n_tokens in range(1, context + 1)) / context


def finished(positions: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Positions (B, T) of new tokens -> the numbers (B, T // stride + 1) of the blocks that they may finish, and
    whether they do."""
    first = ((positions[:, :1] - size + stride) // stride).clamp(min=0)
    numbers = first + torch.arange(positions.shape[1] // stride + 1, device=positions.device)
    return numbers, numbers * stride + size - 1 <= positions[:, -1:]


def tokens_in(slots: Tensor, numbers: Tensor, size: int, stride: int) -> Tensor:
    """Slots (B, S, ..), token p in slot p, and block numbers (B, n) -> the blocks' tokens, (B, n, size, ..)."""
    index = numbers[..., None] * stride + torch.arange(size, device=numbers.device)
    rows = torch.arange(len(slots), device=numbers.device)[:, None, None]
    return slots[rows, index.clamp(max=slots.shape[1] - 1)]


def write(slots: Tensor, numbers: Tensor, done: Tensor, summaries: Tensor) -> None:
    """Put summaries (B, n, ..) into slots (B, N + 1, ..) at their numbers, unfinished ones into the last slot."""
    rows = torch.arange(len(slots), device=numbers.device)[:, None]
    slots[rows, torch.where(done, numbers, slots.shape[1] - 1)] = summaries.to(slots.dtype)


def all_blocks(x: Tensor, size: int, stride: int) -> Tensor:
    """x (B, T, ..) -> the finished blocks of the text, (B, n, size, ..)."""
    if x.shape[1] < size:
        return x.new_zeros(len(x), 0, size, *x.shape[2:])
    return x.unfold(1, size, stride).movedim(-1, 2)
