"""Attention to chosen keys: each query has its own list of n keys, so T queries of a long text cost T x n, not T x T.

    head_i = sum_{j in list_i} softmax_j(scale q_i . k_j) v_j

Heads that share a key head share its list, and the keys are read once for all of them. The choice itself is made
elsewhere: NSA (native.py), MoBA (block_mixture.py) and DSA (indexer.py) differ in nothing but their lists. A list holds
numbers, through which no gradient flows.

Copying a key for one query takes as long as computing dozens of scores. So where the text is short beside the lists, a
fused kernel computes the scores of all keys and a mask hides the keys that were not chosen. Blog: Attention, learned
sparse attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm.modules.kernels.attention import fused_attention

QUERIES = 256  # whose keys are chosen, copied or hidden at a time; this is done again in the backward pass
SCORES_OF_A_COPY = 64  # computed and hidden in the time that a key is copied: measured on two cores of a CPU


def attend_to_chosen(q: Tensor, k: Tensor, v: Tensor, index: Tensor, shown: Tensor, scale: float) -> Tensor:
    """q (B, H, T, D), k and v (B, S, H_kv, D), index and shown (B, H_kv, T, n) -> (B, H, T, D_v).

    Query t of the heads that share key head g attends to the keys index[b, g, t] where shown[b, g, t] says so. A list
    has no key twice. A query that is shown none gets zeros. If there are as many queries as keys, they count as the
    tokens of one text: query t must then be shown no key after t.
    """
    q = q.unflatten(1, (k.shape[2], -1))  # (B, H_kv, heads that share, T, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    n_scores, n_copies = q.shape[2] * k.shape[2], index.shape[3]
    attend = attend_to_all if n_scores <= SCORES_OF_A_COPY * n_copies else attend_to_copies
    skip_later = attend is attend_to_all and q.shape[3] == k.shape[2]
    keep = q.shape[3] <= QUERIES or not torch.is_grad_enabled()
    heads = []
    parts = zip(q.split(QUERIES, 3), index.split(QUERIES, 2), shown.split(QUERIES, 2), strict=True)
    for n, (q_i, i, s) in enumerate(parts, 1):
        end = n * QUERIES if skip_later else None
        heads.append(compute(attend, q_i, k[:, :, :end], v[:, :, :end], i, s, scale, keep=keep))
    return torch.cat(heads, 3).flatten(1, 2)


def compute(function: Callable, *inputs: Any, keep: bool) -> Any:
    """function(*inputs). Without `keep`, what the gradient needs of it is computed again in the backward pass."""
    return function(*inputs) if keep else checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def attend_to_copies(q: Tensor, k: Tensor, v: Tensor, index: Tensor, shown: Tensor, scale: float) -> Tensor:
    """q (B, H_kv, R, T, D), k and v (B, H_kv, S, D), index and shown (B, H_kv, T, n) -> (B, H_kv, R, T, D_v)."""
    k, v = (look_up(x, index) for x in (k, v))  # (B, H_kv, T, n, D)
    scores = q.transpose(2, 3) @ k.mT * scale  # (B, H_kv, T, R, n)
    p = scores.masked_fill(~shown[..., None, :], torch.finfo(scores.dtype).min).softmax(-1)
    return (p @ v * shown.any(-1)[..., None, None]).transpose(2, 3)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, index: Tensor, shown: Tensor, scale: float) -> Tensor:
    """The same result from the scores of all S keys, under a mask that shows the chosen ones."""
    any_shown, n_keys = shown.any(-1, keepdim=True), k.shape[2]
    # what is not shown is marked in an extra column, which is cut off
    marks = shown.new_zeros(*shown.shape[:3], n_keys + 1).scatter_(3, index.where(shown, n_keys), True)[..., :-1]
    mask = marks | ~any_shown  # a softmax over no keys is undefined
    k, v, mask = (x.flatten(0, 1)[:, None] for x in (k, v, mask))  # one key head for the R heads that share it
    out = fused_attention(q.flatten(0, 1), k, v, mask, scale)
    return out.unflatten(0, q.shape[:2]) * any_shown[:, :, None]


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
