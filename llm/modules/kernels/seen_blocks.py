"""Which keys a block of queries needs: those that some query of the block sees, and no others.

A block of 128 queries under a window of w sees 127 + w keys, under BigBird a few blocks of keys here and there. Only
their scores are computed, so attention costs what the mask shows and not T x T. Where neighbouring queries see the same
keys, as under BigBird, a block holds only queries that see the same keys, unless these are fewer than FEWEST_QUERIES.
A mask with a reach needs no search. Another one is searched once for each length, one block of queries after the other.
Blog: Attention, sparse attention.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.modules.masks import Causal, Everything, Mask

QUERIES = 128  # in a block: the scores of a block should fit into a core's cache
FEWEST_QUERIES = 32  # in a block, except the last: each block takes a pass through a Python loop
LONGEST = (
    512  # tokens of a short text; under a causal mask the fused kernel is as fast for a longer one, and keeps less
)


class Pieces(NamedTuple):
    """Keys that are not adjacent: pieces of equal size that begin at multiples of it."""

    which: Tensor
    """(n,): piece i is at positions which[i] size, .., which[i] size + size - 1."""
    size: int


Keys = slice | Pieces


class Block(NamedTuple):
    """A block of queries and the keys that some of them see, each key once."""

    rows: slice
    keys: Keys
    n_open: int
    """All queries of the block see its first `n_open` keys, so their scores need no mask."""


def blocks(length: int, mask: Mask, most: int = QUERIES) -> Iterator[Block]:
    """The blocks, of at most `most` queries each, of `length` tokens. The mask looks back or hides nothing."""
    if isinstance(mask, Everything):
        return (Block(rows, slice(0, length), length) for rows in cut(slice(0, length), most))
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
        found.append(Block(rows, slice(first, last + 1) if adjacent else in_pieces(seen, length), n_open))
    return found


def in_pieces(seen: Tensor, length: int) -> Pieces:
    """The positions `seen` (n,), in ascending order, as the largest pieces that fit. Their size divides the length."""
    begins = F.pad(seen.diff() > 1, (1, 0), value=True)
    ends = F.pad(begins[1:], (0, 1), value=True)
    size = math.gcd(length, *seen[begins].tolist(), *(seen[ends] + 1).tolist())
    return Pieces(seen[::size] // size, size)


@lru_cache(maxsize=256)
def mean_scored(length: int, mask: Mask) -> float:
    """How many scores a query has on average, those included that are computed for its neighbours only."""
    sizes = (
        (r.stop - r.start, k.stop - k.start if isinstance(k, slice) else len(k.which) * k.size)
        for r, k, _ in blocks(length, mask)
    )
    return sum(n_queries * n_keys for n_queries, n_keys in sizes) / length


def positions(part: Keys, device: torch.device) -> Tensor:
    """The positions of a block's queries or keys, (n,)."""
    if isinstance(part, slice):
        return torch.arange(part.start, part.stop, device=device)
    return (part.which.to(device)[:, None] * part.size + torch.arange(part.size, device=device)).flatten()


def places(keys: Keys, device: torch.device) -> slice | Tensor:
    """What the last axis of a tensor (.., T) is indexed with for these keys."""
    return keys if isinstance(keys, slice) else positions(keys, device)


def take(x: Tensor, keys: Keys) -> Tensor:
    """Rows `keys` of x (B H, T, D)."""
    if isinstance(keys, slice):
        return x[:, keys]
    return x.unflatten(1, (-1, keys.size)).index_select(1, keys.which.to(x.device)).flatten(1, 2)


def add(x: Tensor, keys: Keys, part: Tensor) -> None:
    """Add `part` to the rows `keys` of x (B H, T, D), in place. No key is there twice, so the rows can be read, summed
    and written at once; `index_add_`, which allows repeated ones, adds one row after the other on a CPU."""
    if isinstance(keys, slice):
        x[:, keys] += part
    else:
        x.unflatten(1, (-1, keys.size))[:, keys.which.to(x.device)] += part.unflatten(1, (-1, keys.size))


def hide(scores: Tensor, block: Block, mask: Mask) -> None:
    """Set the scores (.., queries, keys) of a block to -inf in place where the query does not see the key."""
    scores[..., block.n_open :] += hidden(block, mask, scores.dtype, scores.device)


def hidden(block: Block, mask: Mask, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of a block, without its first n_open keys: 0 where the key is seen, -inf elsewhere.
    (queries, keys - n_open)."""
    keys = positions(block.keys, device)[block.n_open :]
    seen = mask.visible(positions(block.rows, device)[:, None], keys)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def all_hidden(length: int, mask: Mask, most: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`hidden` of every block. It is kept for the next call, except in compiled code."""
    if torch.compiler.is_compiling():
        return [hidden(block, mask, dtype, device) for block in blocks(length, mask, most)]
    return kept_hidden(length, mask, most, dtype, device)


@lru_cache(maxsize=16)
def kept_hidden(length: int, mask: Mask, most: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`hidden` of every block. Blocks with the same mask, as most are under a window, share one tensor."""
    different: dict[tuple, Tensor] = {}
    found = []
    for block in blocks(length, mask, most):
        part = hidden(block, mask, dtype, torch.device("cpu"))
        name = part.shape, (part == 0).numpy().tobytes()
        if name not in different:
            different[name] = part.to(device)
        found.append(different[name])
    return found
