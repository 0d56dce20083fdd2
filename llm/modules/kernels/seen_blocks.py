"""Which keys a block of queries needs: those that some query of the block sees, and no others.

A block of 128 queries under a window of w sees 127 + w keys, under BigBird a few blocks of keys here and there. Only
their scores are computed, so attention costs what the mask shows and not T x T. Where neighbouring queries see the same
keys, as under BigBird, a block holds only queries that see the same keys, unless these are fewer than FEWEST_QUERIES.
A mask with a reach needs no search. Another one is searched once for each length, one block of queries after the other.
Blog: Attention, sparse attention.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llm.modules.masks import Causal, Mask

QUERIES = 128  # in a block: the scores of a block should fit into a core's cache
FEWEST_QUERIES = 32  # in a block, except the last: each block takes a pass through a Python loop
LONGEST = (
    512  # tokens of a short text; under a causal mask the fused kernel is as fast for a longer one, and keeps less
)

Keys = slice | Tensor
"""Adjacent keys are a slice, others the indices (n,) of their positions."""


class Block(NamedTuple):
    """A block of queries and the keys that some of them see, each key once."""

    rows: slice
    keys: Keys
    n_open: int
    """All queries of the block see its first `n_open` keys, so their scores need no mask."""


def blocks(length: int, mask: Mask, most: int = QUERIES) -> Iterator[Block]:
    """The blocks, of at most `most` queries each, of a text of `length` tokens; the mask looks back."""
    if not isinstance(mask, Causal) and mask.reach > length > most:
        return iter(searched(length, mask, most))
    back = length if mask.reach >= length else int(mask.reach)  # min(inf, length) is a float when compiled
    return (
        Block(rows, slice(max(0, rows.start + 1 - back), rows.stop), rows.start if isinstance(mask, Causal) else 0)
        for rows in cut_queries(length, mask, most)
    )


def cut_queries(length: int, mask: Mask, most: int) -> Iterator[slice]:
    """0..length in blocks of at most `most` queries. In a long text a block has only queries that see the same keys,
    unless fewer than FEWEST_QUERIES do."""
    alike = mask.query_block
    if alike == 1 or length <= LONGEST:
        return cut(slice(0, length), most)
    borders = cut(slice(0, length), alike * -(-FEWEST_QUERIES // alike))
    return (rows for block in borders for rows in cut(block, most))


def cut(part: slice, size: int) -> Iterator[slice]:
    """`part` in slices of `size`, the last one shorter where it must be."""
    return (slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size))


@lru_cache(maxsize=64)
def searched(length: int, mask: Mask, most: int) -> list[Block]:
    """The same by looking at the mask."""
    found = []
    for rows in cut_queries(length, mask, most):
        visible = mask.visible(torch.arange(rows.start, rows.stop)[:, None], torch.arange(rows.stop))
        seen = visible.any(0).nonzero()[:, 0]
        n_open = int(visible.all(0)[seen].long().cumprod(0).sum())
        first, last = int(seen[0]), int(seen[-1])
        adjacent = last + 1 - first == len(seen)
        found.append(Block(rows, slice(first, last + 1) if adjacent else seen, n_open))
    return found


@lru_cache(maxsize=256)
def mean_scored(length: int, mask: Mask) -> float:
    """How many scores a query has on average, those included that are computed for its neighbours only."""
    sizes = (
        (r.stop - r.start, k.stop - k.start if isinstance(k, slice) else len(k)) for r, k, _ in blocks(length, mask)
    )
    return sum(n_queries * n_keys for n_queries, n_keys in sizes) / length


def positions(part: Keys, device: torch.device) -> Tensor:
    """The positions of a block's queries or keys, (n,)."""
    return torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part.to(device)


def take(x: Tensor, keys: Keys) -> Tensor:
    """Rows `keys` of x (B H, T, D)."""
    return x[:, keys] if isinstance(keys, slice) else x.index_select(1, keys.to(x.device))


def add(x: Tensor, keys: Keys, part: Tensor) -> None:
    """Add `part` to the rows `keys` of x (B H, T, D), in place. No key is there twice, so the rows can be read, summed
    and written at once; `index_add_`, which allows repeated ones, adds one row after the other on a CPU."""
    x[:, keys if isinstance(keys, slice) else keys.to(x.device)] += part


def hide(scores: Tensor, block: Block, mask: Mask) -> None:
    """Set the scores (.., queries, keys) of a block to -inf in place where the query does not see the key."""
    device, partly = scores.device, slice(block.n_open, None)
    seen = mask.visible(positions(block.rows, device)[:, None], positions(block.keys, device)[partly])
    scores[..., partly] += scores.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
