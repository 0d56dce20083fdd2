"""StreamingLLM: attention to a sliding window and to the first tokens of the text, which stay in the cache.

A trained Transformer gives the first tokens much attention, even if their content is irrelevant. A window without them
breaks the model. The paper keeps four of them, so a text can grow without end in constant memory. It renumbers the
positions in its cache. Here tokens keep their positions, so generation with a cache equals recomputing the text.
Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453. Blog: Attention, attention sinks.
"""

import torch
from torch import Tensor

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places, empty_slots, store
from llm.modules.masks import FirstAndWindow


class StreamingAttention(MultiHeadAttention):
    """Multi-head attention to the first `n_first` and the last `window_size` tokens; the cache holds only these."""

    def __init__(self, *, n_first: int, window_size: int, d_model: int, n_heads: int, **options):
        """`options` are those of MultiHeadAttention, except mask."""
        super().__init__(d_model=d_model, n_heads=n_heads, mask=FirstAndWindow(n_first, window_size), **options)
        self.n_first, self.window_size = n_first, window_size

    def store(self, cache: dict | None, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Places]:
        if cache is None:
            return super().store(cache, positions, k, v)
        return store_first(cache, positions, self.n_first, k=k, v=v)

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """`n_first` slots that are never overwritten, then a ring buffer of at most `window_size` slots."""
        n_slots = self.n_first + min(length, self.window_size)
        shape = (self.n_kv_heads, self.head_dim)
        return empty_slots(batch_size, n_slots, self.k_proj.weight, k=shape, v=shape)


def store_first(cache: dict[str, Tensor], positions: Tensor, n_first: int, **new: Tensor) -> tuple[Tensor, ...]:
    """`store` into a ring buffer, and copy token p < n_first to slot p, where it stays. Returns what `store` returns.

    cache[..][:, :n_first] holds the first tokens, the other slots are the ring. The ring hides first tokens, so that no
    query sees them twice. Example: with n_first = 2 and a window of 3, token p goes to ring slot p % 3. After each
    of the tokens 0 to 6, the slots hold (in brackets: hidden)

        token    first    ring               token    first    ring
          0      0  -    (0)  -   -            4      0  1     3   4   2
          1      0  1    (0) (1)  -            5      0  1     3   4   5
          2      0  1    (0) (1)  2            6      0  1     6   4   5
          3      0  1     3  (1)  2
    """
    *recent, places = store({name: all_slots[:, n_first:] for name, all_slots in cache.items()}, positions, **new)
    recent_pos = torch.where(places.k < n_first, -1, places.k)

    slot = torch.arange(n_first, device=positions.device)
    index = slot - positions[:, :1]  # (B, n_first): index, among the new tokens, of the token at position `slot`
    arrives = (index >= 0) & (index < positions.shape[1])
    row = torch.arange(len(positions), device=positions.device)[:, None]
    for name, tokens in (new | {"pos": positions}).items():
        first = cache[name][:, :n_first]
        arrived = tokens[row, index.clamp(0, positions.shape[1] - 1)].to(first.dtype)
        here = arrives.view(*arrives.shape, *[1] * (first.dim() - 2))
        first.copy_(torch.where(here, arrived, first))
    attended = [torch.cat([cache[name][:, :n_first], ring], 1) for name, ring in zip(new, recent, strict=True)]
    return *attended, Places(positions, torch.cat([cache["pos"][:, :n_first], recent_pos], 1))
