"""Which keys a block of queries needs: those that some query of the block sees, and no others.

A block of 128 queries under a window of w sees 127 + w keys, under BigBird a few blocks of keys here and there. Only
their scores are computed, so attention costs what the mask shows and not T x T. A mask with a reach needs no search.
Another one is searched once for each length, one block of queries after the other. Blog: Attention, sparse attention.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from llm.modules.masks import Causal, Mask

QUERIES = 128  # in a block: the scores of a block should fit into a core's cache

Keys = slice | Tensor
"""Adjacent keys are a slice, others the indices (n,) of their positions."""


def blocks(length: int, mask: Mask) -> Iterator[tuple[slice, Keys]]:
    """Each block's queries, and the keys that some of them see, in a text of `length` tokens; the mask looks back."""
    if not isinstance(mask, Causal) and mask.reach > length > QUERIES:
        return iter(searched(length, mask))
    back = length if mask.reach >= length else int(mask.reach)  # min(inf, length) is a float when compiled
    return ((rows, slice(max(0, rows.start + 1 - back), rows.stop)) for rows in cut(length, QUERIES))


def cut(length: int, size: int) -> Iterator[slice]:
    """0..length in slices of `size`, the last one shorter where it must be."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


@lru_cache(maxsize=64)
def searched(length: int, mask: Mask) -> list[tuple[slice, Keys]]:
    """The same by looking at the mask."""
    found = []
    for rows in cut(length, QUERIES):
        seen = (
            mask.visible(torch.arange(rows.start, rows.stop)[:, None], torch.arange(rows.stop)).any(0).nonzero()[:, 0]
        )
        first, last = int(seen[0]), int(seen[-1])
        found.append((rows, slice(first, last + 1) if last + 1 - first == len(seen) else seen))
    return found


@lru_cache(maxsize=256)
def mean_scored(length: int, mask: Mask) -> float:
    """How many scores a query has on average, those included that are computed for its neighbours only."""
    sizes = ((r.stop - r.start, k.stop - k.start if isinstance(k, slice) else len(k)) for r, k in blocks(length, mask))
    return sum(n_queries * n_keys for n_queries, n_keys in sizes) / length


def positions(part: Keys, device: torch.device) -> Tensor:
    """The positions of a block's queries or keys, (n,)."""
    return torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part.to(device)


def take(x: Tensor, keys: Keys) -> Tensor:
    """Rows `keys` of x (B H, T, D)."""
    return x[:, keys] if isinstance(keys, slice) else x.index_select(1, keys.to(x.device))


def add(x: Tensor, keys: Keys, part: Tensor) -> None:
    """Add `part` to the rows `keys` of x (B H, T, D), in place."""
    if isinstance(keys, slice):
        x[:, keys] += part
    else:
        x.index_add_(1, keys.to(x.device), part.to(x.dtype))


def hidden(rows: slice, keys: Keys, mask: Mask, like: Tensor) -> Tensor:
    """What is added to a block's scores, (queries, keys): 0, or -inf where the query does not see the key."""
    seen = mask.visible(positions(rows, like.device)[:, None], positions(keys, like.device))
    return like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
