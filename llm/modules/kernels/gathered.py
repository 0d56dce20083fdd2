"""Attention to gathered blocks of keys, in one fused call for all blocks of queries: for masks that show few keys.

A block of queries Q_i is given the blocks of keys that some of its queries see, side by side, and a mask for them:

    O_i = softmax(scale Q_i K[seen_i]^T + mask_i) V[seen_i]

PyTorch's fused kernel computes many blocks of queries at once: those that share mask_i, which is most of them, in one
call, and the others in a second one. The cost is what the mask shows, up to the border of a block. A key is copied for
each block of queries that sees it; query_blocks.py has no copies, but computes one block after the other.
Blog: Attention, sparse attention.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.modules.kernels.seen_blocks import FEWEST_QUERIES, mean_scored
from llm.modules.masks import Mask

QUERIES, KEYS = 64, 32  # in a block
MOST_SCORES = 1.5  # times as many as query_blocks.py computes


class Batch(NamedTuple):
    """N blocks of queries that see J blocks of keys each."""

    rows: Tensor
    """(N,): which blocks of queries."""
    seen: Tensor
    """(N, J): which blocks of keys each sees."""
    shown: Tensor
    """(N, queries, J keys): True where the query sees the key; (1, queries, J keys) where that is the same for all."""


def gathering_serves(q: Tensor, mask: Mask, sinks: Tensor | None) -> bool:
    """Whether this is faster than query_blocks.py, where both can be used: on a CPU, not in bf16, and not where a few
    keys of each block are seen, as under `Summaries`."""
    if q.device.type != "cpu" or q.dtype is torch.bfloat16 or sinks is not None:
        return False
    length = q.shape[2]
    scored = sum(len(batch.rows) * batch.shown[0].numel() for batch in batches(length, mask)) / length
    return scored <= MOST_SCORES * mean_scored(length, mask)


def block_sizes(mask: Mask) -> tuple[int, int]:
    """Queries and keys in a block. Where neighbouring queries see the same keys, a block consists of whole groups of
    them."""
    alike = mask.query_block
    queries = QUERIES if alike == 1 else alike * math.ceil(FEWEST_QUERIES / alike)
    return queries, math.gcd(queries, KEYS)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """q (B, H, T, D), k (B, H_kv, T, D), v (B, H_kv, T, D_v), one text from position 0 on: -> (B, H, T, D_v).

    `mask.looks_back` must hold.
    """
    n_texts, length = q.shape[0], q.shape[2]
    n_queries, n_keys = block_sizes(mask)
    end = (0, 0, 0, -length % n_queries)  # no query of the text sees what is added after it
    q, k, v = (F.pad(x, end).unflatten(2, (-1, n)) for x, n in ((q, n_queries), (k, n_keys), (v, n_keys)))

    def gather(x: Tensor, which: Tensor) -> Tensor:  # (B, H, blocks, n, D) -> (B N, H, J n, D)
        x = x.index_select(2, which.flatten()).unflatten(2, which.shape).flatten(3, 4)
        return x.movedim(2, 1).flatten(0, 1)

    parts = []
    for rows, seen, shown in batches(length, mask):
        shown = shown[:, None] if len(shown) == 1 else shown[:, None].repeat(n_texts, 1, 1, 1)
        shared = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            gather(q, rows[:, None]), gather(k, seen), gather(v, seen), attn_mask=shown, scale=scale, enable_gqa=shared
        )
        parts.append(out.unflatten(0, (n_texts, -1)).movedim(1, 2))  # (B, H, N, queries, D_v)
    order = torch.cat([batch.rows for batch in batches(length, mask)]).argsort()
    return torch.cat(parts, 2).index_select(2, order).flatten(2, 3)[:, :, :length]


@lru_cache(maxsize=32)
def batches(length: int, mask: Mask) -> list[Batch]:
    """The batches of a text of `length` tokens, its last block filled up: a batch for the blocks of queries that most
    often see the same part of their keys, and one for all others."""
    n_queries, n_keys = block_sizes(mask)
    alike: dict[tuple[int, bytes], list[tuple[int, Tensor, Tensor]]] = {}
    for row, start in enumerate(range(0, length, n_queries)):
        first = max(0, start + 1 - int(min(mask.reach, length))) // n_keys
        end = start + n_queries
        queries, keys = (torch.arange(begin, end, device="cpu") for begin in (start, first * n_keys))
        visible = mask.visible(queries[:, None], keys).unflatten(1, (-1, n_keys))
        seen = visible.any(2).any(0).nonzero()[:, 0]
        shown = visible[:, seen].flatten(1)
        alike.setdefault((len(seen), shown.numpy().tobytes()), []).append((row, first + seen, shown))
    most, *others = sorted(alike.values(), key=len, reverse=True)
    rest = [block for blocks in others for block in blocks]
    found = [
        Batch(torch.tensor([row for row, *_ in most]), torch.stack([seen for _, seen, _ in most]), most[0][2][None])
    ]
    return [*found, filled_up(rest, n_keys)] if rest else found


def filled_up(blocks: list[tuple[int, Tensor, Tensor]], n_keys: int) -> Batch:
    """A batch of blocks that see different numbers of blocks of keys: the missing ones are hidden."""
    most = max(len(seen) for _, seen, _ in blocks)
    missing = [most - len(seen) for _, seen, _ in blocks]
    seen = torch.stack([F.pad(block[1], (0, n)) for block, n in zip(blocks, missing, strict=True)])
    shown = torch.stack([F.pad(block[2], (0, n * n_keys)) for block, n in zip(blocks, missing, strict=True)])
    return Batch(torch.tensor([row for row, *_ in blocks]), seen, shown)
