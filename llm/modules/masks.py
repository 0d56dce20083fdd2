"""Which keys a query may see, as a predicate on positions.

A predicate takes query positions (.., T, 1) and key positions (.., 1, S) and returns booleans (.., T, S): True where
the query attends to the key. One that never shows a later key says so by its `reach`: how many tokens lie between a
query and the farthest key that it may see, both counted. What cannot be said with positions is a mixer of its own.
Blog: Attention, sparse attention.
"""

import math
from collections.abc import Callable

from torch import Tensor

Visible = Callable[[Tensor, Tensor], Tensor]


def causal(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """A query sees itself and what came before."""
    return k_pos <= q_pos


causal.reach = math.inf


def window(size: int) -> Visible:
    """A query sees the last `size` tokens, itself among them. Longformer, 2004.05150; Mistral 7B, 2310.06825."""
    if size < 1:
        raise ValueError(f"window_size = {size} must be at least 1: the window counts the current token")

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & (q_pos - k_pos < size)

    visible.reach = size  # a cache needs no more slots than this
    return visible


def dilated(size: int, gap: int) -> Visible:
    """A window with holes: a query sees `size` tokens, itself and every `gap`-th before. Longformer, 2004.05150."""
    if size < 1 or gap < 1:
        raise ValueError(f"window_size = {size} and gap = {gap} must be at least 1: gap 1 is a window without holes")

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = q_pos - k_pos
        return (distance >= 0) & (distance < size * gap) & (distance % gap == 0)

    visible.reach = (size - 1) * gap + 1
    return visible


def strided(stride: int) -> Visible:
    """A query sees itself and every `stride`-th token before it, back to the first. In the Sparse Transformer
    (1904.10509) it alternates with window(stride + 1): two hops of about sqrt(T) keys reach every token."""
    check_stride(stride)

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((q_pos - k_pos) % stride == 0)

    visible.reach = math.inf
    return visible


def own_block(stride: int) -> Visible:
    """A query sees what its block of `stride` tokens holds up to itself. Sparse Transformer, "fixed", first half."""
    check_stride(stride)

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & (k_pos // stride == q_pos // stride)

    visible.reach = stride
    return visible


def summaries(stride: int, n_summary: int) -> Visible:
    """A query sees the last `n_summary` tokens of every block, which summarise it. "Fixed", second half.

    It sees itself, too: else the first tokens of a text would see nothing, and a softmax over no keys has no value.
    """
    check_stride(stride)
    if not 1 <= n_summary <= stride:
        raise ValueError(f"n_summary = {n_summary} must lie between 1 and stride = {stride} (--model.n-summary)")

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((k_pos % stride >= stride - n_summary) | (k_pos == q_pos))

    visible.reach = math.inf
    return visible


def first_and_window(n_first: int, size: int) -> Visible:
    """The first `n_first` tokens of the text beside a window of `size`. StreamingLLM, 2309.17453."""
    if n_first < 0:
        raise ValueError(f"n_first = {n_first} must not be negative: it counts tokens (--model.n-first)")
    recent = window(size)

    def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return recent(q_pos, k_pos) | (k_pos < n_first) & (k_pos <= q_pos)

    visible.reach = math.inf
    return visible


def check_stride(stride: int) -> None:
    if stride < 1:
        raise ValueError(f"stride = {stride} must be at least 1: it counts tokens (--model.stride)")


def everything(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Every query sees every key, the later ones too: encoders and diffusion models."""
    return (k_pos == k_pos) & (q_pos == q_pos)


def visibility(visible: Visible, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Booleans that broadcast over heads, (T, S) or (B, 1, T, S), for positions (T,) and (S,) or (B, T) and (B, S).

    A negative position is padding or an empty slot of a cache: no query sees it. A query that is padding itself sees
    everything, since a softmax over no keys has no value.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    mask = visible(q, k) & (k >= 0) | (q < 0)
    return mask if mask.dim() == 2 else mask[:, None]
