"""Sinusoidal position encoding: each position is a vector of sines and cosines of geometrically growing wavelength.

    PE(p, 2i) = sin(p / 10000^(2i/d))        PE(p, 2i + 1) = cos(p / 10000^(2i/d))

A shift by k rotates each (sin, cos) pair by a fixed angle, so a linear layer can read relative positions.
Attention Is All You Need, arXiv 1706.03762, sections 3.4 and 3.5. Blog: Position encoding, sinusoidal.
"""

import torch
from torch import Tensor


def sinusoidal(positions: Tensor, d_model: int) -> Tensor:
    """(..) -> (.., d_model) in fp32, sines on even and cosines on odd channels; d_model must be even."""
    if d_model % 2:
        raise ValueError(
            f"d_model = {d_model} must be even: sinusoidal positions come in pairs of sine and cosine (--model.d-model)"
        )
    channel = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * 10_000 ** (-channel / d_model)  # (.., d_model / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def add_sinusoidal(x: Tensor, positions: Tensor) -> Tensor:
    """Token embeddings (B, T, D) scaled by sqrt(D), as in the paper, plus their positions (T,) or (B, T)."""
    d_model = x.shape[-1]
    return x * d_model**0.5 + sinusoidal(positions, d_model).to(x.dtype)
