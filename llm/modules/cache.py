"""The key-value cache: what a model keeps between two calls, so that old tokens are not recomputed.

Every mixer owns one dict of tensors and changes it in place. Keys and values are stored batch first, slots on axis 1.
`pos` holds the position of each slot's token, and -1 in an empty slot. Token p is stored in slot p % n_slots, so a
cache shorter than the text is a ring that keeps the newest tokens. Masks compare positions, which hides empty, future
and padded slots alike, so shapes change only where a cache is replaced by a longer one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Cache:
    """`seen`: (B,) int64, the position of the next token; it starts at -n for a prompt left-padded by n tokens.
    `layers`: one dict for each mixer."""

    seen: Tensor
    layers: list[dict[str, Tensor]]

    def positions(self, n_tokens: int) -> Tensor:
        """(B, T): the positions of the next `n_tokens` tokens."""
        return self.seen[:, None] + torch.arange(n_tokens, device=self.seen.device)

    def forget(self, n_tokens: int) -> None:
        """Forget the last `n_tokens` of each text. Only for slots that hold one token each: what a ring overwrote, or
        what a recurrent state summed up, does not come back."""
        self.seen -= n_tokens
        for layer in self.layers:
            layer["pos"].masked_fill_(layer["pos"] >= self.seen[:, None], -1)

    def copy_from(self, shorter: "Cache") -> "Cache":
        """Continue the texts of a shorter cache that is full. Token p keeps its slot. What has the same length, such as
        a ring or a recurrent state, is copied whole."""
        self.seen.copy_(shorter.seen)
        for layer, old in zip(self.layers, shorter.layers, strict=True):
            for name in old:
                layer[name][:, : old[name].shape[1]] = old[name]
        return self


class Places(NamedTuple):
    """Positions of the queries and the keys of one attention.

    `q` (T,) or (B, T) and `k` (S,) or (B, S) are positions, negative for padding and empty slots. `whole_text`: queries
    and keys are the tokens 0..T-1 of one text, as in training, so a kernel knows the mask without reading positions.
    """

    q: Tensor
    k: Tensor
    whole_text: bool = False


STEP = 128


def slots_for(n_tokens: int, limit: int) -> int:
    """How many slots to allocate for a text of `n_tokens` so far: the next multiple of 128, at most `limit`.

    Attention reads empty slots too, so too many cost time; with too few the cache would be replaced often.
    """
    return min(-(-n_tokens // STEP) * STEP, limit)


def empty_slots(batch_size: int, n_slots: int, like: Tensor, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """An empty layer: a zero tensor (B, n_slots, *shape) for each name, of `like`'s dtype and device, and `pos`.

    In memory the slots of one head are adjacent, (B, H, n_slots, D), which is the order in which products read them.
    The tensors are whole on every rank, even where `like` is a weight that the ranks share out (`--shard`).
    """
    kind = {"dtype": like.dtype, "device": like.device}
    empty = {
        name: torch.zeros(batch_size, *heads, n_slots, width, **kind).movedim(-2, 1)
        for name, (*heads, width) in shapes.items()
    }
    return empty | {"pos": torch.full((batch_size, n_slots), -1, device=like.device)}


def store(cache: dict[str, Tensor] | None, positions: Tensor, **new: Tensor) -> tuple[Tensor, ...]:
    """Store `new` tensors (B, T, ...) at `positions`; returns what the queries attend to, (B, S, ...) each, and Places.

    Without a cache, the queries attend to `new` itself. With one, a single token is written first and then attends to
    the slots. Several tokens attend to the old slots and to their own keys: in a ring, writing first
    could overwrite keys that the first of them still see.
    """
    if cache is None:
        return *new.values(), Places(positions, positions, whole_text=positions.dim() == 1)
    new["pos"] = positions
    n_slots = cache["pos"].shape[1]
    slot = positions[:, -n_slots:] % n_slots  # consecutive positions, so all different
    row = torch.arange(len(slot), device=slot.device)[:, None]
    attended = cache
    if positions.shape[1] > 1:
        attended = {name: torch.cat([cache[name], new[name]], 1) for name in new}
    for name in new:
        cache[name][row, slot] = new[name][:, -n_slots:].to(cache[name].dtype)
    *tensors, k_pos = (attended[name] for name in new)
    return *tensors, Places(positions, k_pos)
