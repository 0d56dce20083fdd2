"""What recurrent layers keep between two calls, and how they skip padding.

A cache holds `state`, which does not grow with the text, and the last inputs of short convolutions. A state is fp32
even where the weights are narrower: it sums thousands of tokens, and bf16 would lose each small one.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in float64 where it is: decays multiply up over thousands of tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def empty_state(batch_size: int, like: Tensor, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Zeros (B, *shape) for each name: fp32, or float64 where the weight `like` is."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {n: torch.zeros(batch_size, *shape, dtype=dtype, device=like.device) for n, shape in shapes.items()}


def hide_padding(positions: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs (B, T, ..), 0 where the position is negative. A key of 0 writes nothing, a log decay of 0 keeps the state.
    Positions (T,) are those of a whole text, which has no padding."""
    if positions.dim() == 1:
        return inputs
    return tuple(x.masked_fill((positions < 0).view(*positions.shape, *[1] * (x.dim() - 2)), 0) for x in inputs)


def keep(cache: dict[str, Tensor] | None, **new: Tensor) -> None:
    """Write new states into a cache in place; without a cache nothing is kept."""
    if cache is not None:
        for name, tensor in new.items():
            cache[name].copy_(tensor)


def kept(cache: dict[str, Tensor] | None, name: str = "state") -> Tensor | None:
    """What a cache holds under this name; None without a cache."""
    return None if cache is None else cache[name]
