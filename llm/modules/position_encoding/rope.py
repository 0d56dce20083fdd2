"""Rotary position embedding (RoPE): rotate each pair of query and key channels by an angle that grows with position.

    (a, b) -> (a cos(p f_i) - b sin(p f_i),  a sin(p f_i) + b cos(p f_i))        f_i = theta^(-2i / d), i < d / 2

With q rotated by its position m and k by its position n, q . k depends on m - n only, and no norm changes. The paper
pairs neighbouring channels (2i, 2i + 1): `interleaved`. Most published checkpoints pair channel i with i + d/2, which
only reorders the rows of the query and key projections: that is the default.

RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864, section 3.2.
Blog: Position encoding, RoPE.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Scaling = Callable[[int, float, Tensor], tuple[Tensor, float]]
"""(rotary_dim, theta, positions) -> inverse frequencies (rotary_dim / 2,), or (B, 1, 1, rotary_dim / 2) where each text
has its own, and a factor of all cosines and sines."""


class RoPE(nn.Module):
    """Rotate x (B, T, H, head_dim) by positions (T,) or (B, T): same shape and dtype, all heads alike.

    theta        base of the frequencies: the longest wavelength is nearly 2 pi theta tokens
    rotary_dim   only the first rotary_dim channels are rotated; all where it is not given
    interleaved  pair channels 2i and 2i + 1, not i and i + rotary_dim / 2
    scaling      other frequencies for longer texts: see llm/modules/position_encoding/context_extension.py

    It has no parameters and no buffers: angles are computed in fp32 at each call, since bf16 cannot tell position 256
    from 257. The rotation is fp32, too (float64 for float64 input), and rounded once to x's dtype. Raises ValueError
    for an odd rotary_dim, one wider than the head, or a theta that is not positive.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10_000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: Scaling | None = None,
    ):
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(
                f"RoPE turns pairs: rotary_dim = {rotary_dim} must be even and between 2 and head_dim = {head_dim}: "
                "that is d_model / n_heads where a model has no head_dim of its own (--model.n-heads, --model.d-model)"
            )
        if theta <= 0:
            raise ValueError(f"theta = {theta} must be positive (--model.rope-theta)")
        self.theta, self.rotary_dim = theta, rotary_dim
        self.interleaved, self.scaling = interleaved, scaling

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, *self.cos_sin(positions), self.interleaved)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,) or (B, T) -> cosines and sines (.., T, 1, rotary_dim / 2) in fp32; the 1 is for the heads."""
        if self.scaling is None:
            frequencies, factor = inverse_frequencies(self.rotary_dim, self.theta, positions.device), 1.0
        else:
            frequencies, factor = self.scaling(self.rotary_dim, self.theta, positions)
        angles = positions[..., None, None].float() * frequencies
        return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(dim: int, theta: float | Tensor, device: torch.device | None = None) -> Tensor:
    """Radians per token of each pair, theta^(-2i / dim): (dim / 2,) in fp32, from 1 down to almost 1 / theta."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2n channels of x (.., D) by angles whose cos and sin (.., n) broadcast to it.

    The other channels stay as they are. `rotate(y, cos, -sin)` is the inverse.
    """
    turned, rest = x.tensor_split([2 * cos.shape[-1]], -1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    a, b = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    pairs = [torch.stack([a, b], -1).flatten(-2)] if interleaved else [a, b]
    return torch.cat([*pairs, rest], -1)
