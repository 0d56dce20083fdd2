"""Batches of windows as a pure function of (seed, step, rank).

Window i of T targets is `tokens[i * T : i * T + T + 1]`: the model reads the first T tokens and predicts the last T.
An epoch visits every window once, in the order of a permutation seeded by (seed, epoch). The concatenated epochs form
the stream of windows. Optimizer step s, counted from 0, reads positions s G .. s G + G - 1 of the stream, where G is
the number of windows in a global batch. So resuming needs the step number but no data loader state, and several ranks
together read the same windows as one rank alone.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from llm.data.prefetch import prefetch


def count_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Return the number of windows in an epoch. Raises ValueError if there are too few tokens for one."""
    if len(tokens) <= seq_len:
        raise ValueError(
            f"the data hold {len(tokens):,} tokens, and one window of {seq_len} needs {seq_len + 1}: "
            "give more text to python pre_tokenize.py, or lower --model.max-seq-len"
        )
    return (len(tokens) - 1) // seq_len


@lru_cache(maxsize=2)  # a step may need windows from two epochs
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the n windows in an epoch, int64 (n,)."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(n)


def take(tokens: np.ndarray, seq_len: int, indices: np.ndarray) -> np.ndarray:
    """Return the windows with these indices, int64 (len(indices), seq_len + 1)."""
    return tokens[indices[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)


def windows(tokens: np.ndarray, seq_len: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return `count` windows of the training stream from position `start`, int64 (count, seq_len + 1)."""
    n = count_windows(tokens, seq_len)
    positions = range(start, start + count)
    indices = [permutation(n, seed, position // n)[position % n] for position in positions]
    return take(tokens, seq_len, np.array(indices, dtype=np.int64))


def eval_windows(tokens: np.ndarray, seq_len: int, n_windows: int) -> Tensor:
    """Return the evaluation windows, int64 (n, seq_len + 1): always the same ones, evenly spread over the text.

    No two windows share a target. n is `n_windows`, or the number of all windows if there are fewer.
    """
    total = count_windows(tokens, seq_len)
    n = min(n_windows, total)
    return torch.from_numpy(take(tokens, seq_len, np.arange(n) * total // n))


def step_batches(
    tokens: np.ndarray,
    *,
    seq_len: int,
    micro_batch_size: int,
    windows_per_step: int,
    seed: int,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    to_device: Callable[[Tensor], Tensor] = lambda batch: batch,
) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield, for each step of `range(first_step, last_step)`, the micro-batches of this rank.

    A micro-batch is (its index in the global batch, windows int64 (micro_batch_size, seq_len + 1)). Rank r of W has the
    indices r, r + W, r + 2 W, ... `to_device` moves the batch of a step to its device. A thread prepares the next batch
    while the caller uses the current one; its errors are raised here. Raises ValueError if the global batch does not
    divide evenly among ranks and micro-batches, or if there are too few tokens for one window.
    """
    if windows_per_step % (micro_batch_size * world_size):
        raise ValueError(
            f"{windows_per_step} windows per step cannot be divided among {world_size} ranks with --micro-batch-size "
            f"{micro_batch_size}: --tokens-per-step must be a multiple of {micro_batch_size * world_size * seq_len}"
        )
    count_windows(tokens, seq_len)
    indices = range(rank, windows_per_step // micro_batch_size, world_size)

    def prepare(step: int) -> list[tuple[int, Tensor]]:
        first = step * windows_per_step
        rows = [windows(tokens, seq_len, seed, first + j * micro_batch_size, micro_batch_size) for j in indices]
        batch = torch.from_numpy(np.stack(rows))  # (accumulation, micro_batch_size, T + 1)
        return list(zip(indices, to_device(batch), strict=True))

    return prefetch(map(prepare, range(first_step, last_step)))
