"""Weights that are published in 4 and 8 bits, expanded into a dtype that can be trained.

    MXFP4 (GPT-OSS)      w = sign x {0, 0.5, 1, 1.5, 2, 3, 4, 6} x 2^(scale - 127)    one scale for 32 neighbours
    FP8 (DeepSeek-V3)    w = float8 x scale                                         one scale for 128 x 128 weights

OCP Microscaling Formats (MX) Specification v1.0; DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.
"""

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks (E, out, n, 16) and scales (E, out, n), both uint8 -> (E, in, out) in `dtype`, with in = 32 n.

    A byte holds two weights, the first in its low half. GPT-OSS computes x W where nn.Linear computes x W^T, so its
    matrices are transposed, as they are in an unquantised checkpoint. One expert is expanded at a time.
    """
    n_experts, n_out = blocks.shape[:2]
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=blocks.device)
    weights = torch.empty(n_experts, blocks[0, 0].numel() * 2, n_out, dtype=dtype, device=blocks.device)
    for weight, block, scale in zip(weights, blocks, scales, strict=True):
        halves = torch.stack([block & 15, block >> 4], -1).flatten(-2)  # (out, n, 32)
        numbers = torch.ldexp(values[halves.int()], scale.int()[..., None] - 127)
        weight.copy_(numbers.flatten(1).T)
    return weights


def dequantize_fp8(weight: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> Tensor:
    """weight (out, in) in float8 and scales (out / 128, in / 128, rounded up) -> (out, in) in `dtype`.

    Blocks at the lower and right edge may be smaller. One row of blocks is expanded at a time.
    """
    rows, columns = block
    if scales.shape != block_counts(weight.shape, block):
        raise ValueError(
            f"scales {tuple(scales.shape)} do not fit {tuple(weight.shape)} in blocks of {rows} x {columns}"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for i, scale in enumerate(scales.float()):
        band = slice(i * rows, (i + 1) * rows)
        out[band] = weight[band].float() * scale.repeat_interleave(columns)[: weight.shape[1]]
    return out


def block_counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover a matrix in each direction."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
