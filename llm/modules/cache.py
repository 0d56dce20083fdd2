"""What a model remembers between two calls, so that each new token costs one token's work.

Every mixer owns one dict of tensors, batch first and slots on axis 1, and changes it in place. `pos` holds the position
in each slot and -1 where it is empty; token p lies in slot p % n_slots, so a cache shorter than the text is a ring that
keeps the newest. Comparing positions hides empty, evicted, future and padded keys alike, hence shapes never change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cache:
    """`seen`: (B,) int64, the position of the next token, -n before a prompt left-padded by n.
    `layers`: one dict for each mixer."""

    seen: Tensor
    layers: list[dict[str, Tensor]]

    def positions(self, n_tokens: int) -> Tensor:
        """(B, T): where the next `n_tokens` tokens stand."""
        return self.seen[:, None] + torch.arange(n_tokens, device=self.seen.device)

    def take_over(self, shorter: "Cache") -> "Cache":
        """Go on where a shorter cache of the same texts was full: token p keeps its slot. A ring as long as before, or
        a state without slots, is taken over whole."""
        self.seen.copy_(shorter.seen)
        for layer, old in zip(self.layers, shorter.layers, strict=True):
            for name in old:
                layer[name][:, : old[name].shape[1]] = old[name]
        return self


STEP = 128


def room(n_tokens: int, limit: int) -> int:
    """Slots to make for a text that is `n_tokens` long so far: a cache grows by 128 at a time, up to `limit`.

    Attention reads all slots, the empty ones too: too many cost time, and every other number costs a compilation.
    """
    return min(-(-n_tokens // STEP) * STEP, limit)


def slots(batch_size: int, n_slots: int, like: Tensor, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """An empty layer: a zero tensor (B, n_slots, *shape) for each name, of `like`'s dtype and device, and `pos`.

    In memory the slots of a head lie side by side, (B, H, n_slots, D), as products of matrices read them.
    """
    empty = {
        name: like.new_zeros(batch_size, *heads, n_slots, width).movedim(-2, 1)
        for name, (*heads, width) in shapes.items()
    }
    return empty | {"pos": torch.full((batch_size, n_slots), -1, device=like.device)}


def remember(cache: dict[str, Tensor] | None, positions: Tensor, **new: Tensor) -> tuple[Tensor, ...]:
    """Store `new` (B, T, ...) at `positions`; returns what there is to attend to, (B, S, ...) each, and its positions.

    Without a cache that is `new` itself. One token is written first and then sees the slots. Several see the old slots
    and their own keys: writing first would evict what the earlier of them still see.
    """
    if positions.dim() == 1:
        if cache is not None:  # lent by a model whose layers share keys
            cache.update(new, pos=positions)
        return *new.values(), positions
    new["pos"] = positions
    n_slots = cache["pos"].shape[1]
    slot = positions[:, -n_slots:] % n_slots  # consecutive positions, so all different
    row = torch.arange(len(slot), device=slot.device)[:, None]
    attended = cache
    if positions.shape[1] > 1:
        attended = {name: torch.cat([cache[name], new[name]], 1) for name in new}
    for name in new:
        cache[name][row, slot] = new[name][:, -n_slots:].to(cache[name].dtype)
    return tuple(attended[name] for name in new)
