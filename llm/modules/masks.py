"""Attention masks: which keys a query may see, as a function of positions.

| mask                 | query i sees key j <= i where                    | paper                                   |
|----------------------|--------------------------------------------------|-----------------------------------------|
| Causal               | always                                           | Attention Is All You Need, 1706.03762   |
| Window(n)            | i - j < n                                        | Longformer, 2004.05150; Mistral         |
| Dilated(n, gap)      | i - j < n gap, and gap divides i - j             | Longformer, 2004.05150                  |
| Strided(s)           | s divides i - j                                  | Sparse Transformer, 1904.10509, strided |
| OwnBlock(s)          | j // s = i // s                                  | Sparse Transformer, fixed, part 1       |
| Summaries(s, c)      | j mod s >= s - c, or j = i                       | Sparse Transformer, fixed, part 2       |
| FirstAndWindow(k, n) | j < k, or i - j < n                              | StreamingLLM, 2309.17453                |
| BigBird(..)          | attention/big_bird.py                            | Big Bird, 2007.14062                    |
| Everything           | always, and j > i as well                        | encoders, diffusion models              |
| BlockCausal(s)       | j // s <= i // s, so j > i within a block        | block diffusion, 2503.09573             |

Masks are frozen dataclasses. Two windows of the same size compare equal, so they share one compiled kernel.
Blog: Attention, sparse attention.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """The base class of all masks."""

    looks_back: ClassVar[bool] = True
    """True if a query sees only itself and earlier keys."""

    @property
    def reach(self) -> float:
        """Number of tokens from the farthest visible key to the query, both counted. A cache needs no more slots."""
        return math.inf

    @property
    def query_block(self) -> int:
        """Number of neighbouring queries that see the same keys, up to themselves; texts are cut into blocks of it."""
        return 1

    def by_remainder(self) -> "tuple[int, Mask]":
        """(n, inner) if a query sees only keys at distances that are multiples of n; `inner` is the mask of every n-th
        token.

        A kernel may then compute attention over n short texts instead of a long one. (1, self) for other masks.
        """
        return 1, self

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Positions (.., T, 1) and (.., 1, S) -> booleans (.., T, S): True where the query sees the key."""
        raise NotImplementedError(f"{type(self).__name__} must say which keys a query sees: define visible")


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and all earlier tokens."""

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return k_pos <= q_pos


@dataclass(frozen=True)
class Window(Mask):
    """A query sees the last `size` tokens, itself among them."""

    size: int

    def __post_init__(self):
        check_positive(self, "size")

    @property
    def reach(self) -> int:
        return self.size

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & (q_pos - k_pos < self.size)


@dataclass(frozen=True)
class Dilated(Mask):
    """A window with gaps: a query sees `size` tokens, namely itself and every `gap`-th token before it."""

    size: int
    gap: int

    def __post_init__(self):
        check_positive(self, "size", "gap")

    @property
    def reach(self) -> int:
        return (self.size - 1) * self.gap + 1

    def by_remainder(self) -> tuple[int, Mask]:
        return self.gap, Window(self.size)

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = q_pos - k_pos
        return (distance >= 0) & (distance < self.size * self.gap) & (distance % self.gap == 0)


@dataclass(frozen=True)
class Strided(Mask):
    """A query sees itself and every `stride`-th token before it, back to the first.

    The Sparse Transformer alternates it with Window(stride + 1). Then information from every earlier token can reach
    the query within two layers, and a stride of about sqrt(T) costs least.
    """

    stride: int

    def __post_init__(self):
        check_positive(self, "stride")

    def by_remainder(self) -> tuple[int, Mask]:
        return self.stride, causal

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((q_pos - k_pos) % self.stride == 0)


@dataclass(frozen=True)
class OwnBlock(Mask):
    """A query sees the tokens of its own block of `stride` tokens, up to itself."""

    stride: int

    def __post_init__(self):
        check_positive(self, "stride")

    @property
    def reach(self) -> int:
        return self.stride

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & (k_pos // self.stride == q_pos // self.stride)


@dataclass(frozen=True)
class Summaries(Mask):
    """A query sees the last `n_summary` tokens of each block of `stride` tokens, which serve as the block's summary.

    It also sees itself. Otherwise the first tokens of a text would see no key, and a softmax over no keys is undefined.
    """

    stride: int
    n_summary: int

    def __post_init__(self):
        check_positive(self, "stride")
        if not 1 <= self.n_summary <= self.stride:
            raise ValueError(
                f"n_summary = {self.n_summary} must lie between 1 and stride = {self.stride} (--model.n-summary)"
            )

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((k_pos % self.stride >= self.stride - self.n_summary) | (k_pos == q_pos))


@dataclass(frozen=True)
class FirstAndWindow(Mask):
    """A query sees the first `n_first` tokens of the text and the last `size` tokens, itself among them."""

    n_first: int
    size: int

    def __post_init__(self):
        check_positive(self, "size")
        if self.n_first < 0:
            raise ValueError(f"n_first = {self.n_first} must not be negative: it counts tokens (--model.n-first)")

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos) & ((k_pos < self.n_first) | (q_pos - k_pos < self.size))


@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key, including later ones."""

    looks_back: ClassVar[bool] = False

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos == k_pos) & (q_pos == q_pos)


NOISY = 2**30
"""Added to the positions of a noisy copy; no text is as long."""


@dataclass(frozen=True)
class BlockCausal(Mask):
    """A query sees its own block of `size` tokens, the later ones too, and all blocks before it.

    The input may hold a text twice: clean, and as a noisy copy whose positions are larger by NOISY. Queries of both
    copies see the earlier blocks of the clean one. In its own block, a query sees the copy that it belongs to.
    """

    size: int
    looks_back: ClassVar[bool] = False

    def __post_init__(self):
        check_positive(self, "size")

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        q_block, k_block = q_pos % NOISY // self.size, k_pos % NOISY // self.size
        q_noisy, k_noisy = q_pos >= NOISY, k_pos >= NOISY
        return (k_block < q_block) & ~k_noisy | (k_block == q_block) & (k_noisy == q_noisy)


causal, everything = Causal(), Everything()


def check_positive(mask: Mask, *names: str) -> None:
    """Raises ValueError for a field below 1. The message names the flag that sets the field."""
    for name in names:
        if getattr(mask, name) < 1:
            label = "window_size" if name == "size" else name
            raise ValueError(
                f"{label} = {getattr(mask, name)} must be at least 1: it counts tokens, the current one among them "
                f"(--model.{label.replace('_', '-')})"
            )


def visibility(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The mask as a boolean tensor: positions (T,) and (S,) -> (T, S); (B, T) and (B, S) -> (B, 1, T, S).

    A key at a negative position is padding or an empty cache slot, and real tokens do not see it. A query that is
    padding sees every key, since a softmax over no keys is undefined. Its output is not used.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    shown = mask.visible(q, k) & (k >= 0) | (q < 0)
    return shown if shown.dim() == 2 else shown[:, None]


@lru_cache
def mean_keys(mask: Mask, context: int) -> float:
    """The number of keys that a query sees, averaged over a text of `context` tokens. Attention FLOPs grow with it.

    The mean is exact up to 4,096 tokens. For longer texts it is taken over evenly spaced queries, since the full mask
    would need too much memory.
    """
    n_queries = min(context, 2**24 // context)
    queries = torch.linspace(0, context - 1, n_queries, dtype=torch.float64, device="cpu").round().long()
    return visibility(mask, queries, torch.arange(context, device="cpu")).sum().item() / n_queries
