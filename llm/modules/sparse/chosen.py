"""Attention to chosen keys: each query has its own list, so T queries cost T x n and not T x T.

    head_i = sum_{j in list_i} softmax_j(scale q_i . k_j) v_j

Heads that share a key head share its list, and the keys are read once for all of them. The choice itself is made
elsewhere: NSA (native.py), MoBA (block_mixture.py) and DSA (indexer.py) differ in nothing but their lists. A list holds
numbers, through which no gradient flows. Blog: Attention, learned sparse attention.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERIES = 256  # whose keys are copied at a time; the copies are made again in the backward pass


def attend_to_chosen(q: Tensor, k: Tensor, v: Tensor, index: Tensor, shown: Tensor, scale: float) -> Tensor:
    """q (B, H, T, D), k and v (B, S, H_kv, D), index and shown (B, H_kv, T, n) -> (B, H, T, D_v).

    Query t of the heads that share key head g attends to the keys index[b, g, t] where shown[b, g, t] says so. One that
    is shown none gets zeros.
    """
    q = q.unflatten(1, (k.shape[2], -1)).transpose(2, 3)  # (B, H_kv, T, heads that share, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    parts = [x.split(QUERIES, 2) for x in (q, index, shown)]
    keep = q.shape[2] <= QUERIES or not torch.is_grad_enabled()
    heads = [
        part_of(q_i, k, v, i, s, scale)
        if keep
        else checkpoint(part_of, q_i, k, v, i, s, scale, use_reentrant=False, preserve_rng_state=False)
        for q_i, i, s in zip(*parts, strict=True)
    ]
    return torch.cat(heads, 2).transpose(2, 3).flatten(1, 2)


def part_of(q: Tensor, k: Tensor, v: Tensor, index: Tensor, shown: Tensor, scale: float) -> Tensor:
    """q (B, H_kv, T, R, D), k and v (B, H_kv, S, D), index and shown (B, H_kv, T, n) -> (B, H_kv, T, R, D_v)."""
    k, v = (look_up(x, index) for x in (k, v))  # (B, H_kv, T, n, D)
    scores = (q @ k.mT * scale).masked_fill(~shown[..., None, :], torch.finfo(q.dtype).min)  # (B, H_kv, T, R, n)
    return scores.softmax(-1) @ v * shown.any(-1)[..., None, None]


def look_up(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, S, D) and index (B, H, T, n) -> (B, H, T, n, D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])


def mean_chosen(context: int, size: int, n_blocks: int) -> float:
    """The number of keys that a query attends to in its own block of `size` tokens and up to n_blocks - 1 earlier ones,
    averaged over a text of `context` tokens."""
    full, rest, earlier = context // size, context % size, n_blocks - 1
    own = full * size * (size + 1) / 2 + rest * (rest + 1) / 2
    fewer = min(full, earlier)  # the first blocks of the text, which have fewer before them
    before = fewer * (fewer - 1) / 2 + (full - fewer) * earlier
    return (own + size * (size * before + rest * fewer)) / context


def tokens_of(numbers: Tensor, size: int) -> Tensor:
    """The tokens of blocks (.., n) of `size` tokens: (.., n size)."""
    return (numbers[..., None] * size + torch.arange(size, device=numbers.device)).flatten(-2)
