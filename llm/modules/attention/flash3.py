"""FlashAttention-3: products and exponentials at the same time, and products in fp8 that stay accurate.

A GPU has units for products and others for exponentials. In FlashAttention-2 each waits for the other, since a tile
goes S -> softmax -> P V. With two tiles in flight the product of the one runs during the softmax of the other:

    product units      S_0               S_1   P_0 V_0     S_2   P_1 V_1     ..      within a group of warps: the
    exponentials             softmax 0         softmax 1         softmax 2   ..      order of `forward_tiles`

    `ping_pong`: a second group of warps has queries of its own, and its products run during the first one's softmax

fp8 (e4m3) has 3 bits of mantissa. If a few entries are large, a single scale for the tensor rounds the others coarsely.
Two remedies:

    block quantisation        a scale for each tile of q, k and v, its largest entry / 448
    incoherent processing     q M and k M for q and k, M orthogonal: q M M^T k^T = q k^T, but a large entry of a row is
                              spread over all of its channels. M = random signs x a Hadamard matrix

Python runs one operation after the other: here are the order and the numbers, not the speed. There is no backward pass:
it is that of FlashAttention-2.
FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision, arXiv 2407.08608, sections 3.1 to 3.3.
Blog: Attention, FlashAttention.
"""

from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from llm.modules.attention.flash import Tiling, statistics_dtype, tiles

FP8 = torch.float8_e4m3fn


def forward_tiles(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, p_dtype: torch.dtype | None = None) -> Tensor:
    """q (B, H, T, D), k (B, H, S, D), v (B, H, S, D_v) -> (B, H, T, D_v). The paper's algorithm 2: a tile's product
    with the values is begun when the next tile's scores are. P is rounded to `p_dtype`."""
    load, dtype, out = tiling.memory.load, statistics_dtype(q), v.new_empty(*q.shape[:3], v.shape[-1])
    for rows in tiling.rows():
        q_i, columns = load(q, rows), list(tiling.columns(rows))
        m = torch.full_like(q_i[..., :1], torch.finfo(dtype).min, dtype=dtype)
        row_sum, o = torch.zeros_like(m), torch.zeros_like(out[:, :, rows], dtype=dtype)
        s = tiling.scores(q_i, load(k, columns[0]), rows, columns[0])
        m, p, row_sum, _ = softmax_step(s, m, row_sum)
        for now, following in pairwise(columns):
            s = tiling.scores(q_i, load(k, following), rows, following)  # begun; the exponentials wait for it
            o = o + p.to(p_dtype or v.dtype).to(v.dtype) @ load(v, now)  # begun, too, and runs during the exponentials:
            m, p, row_sum, rescale = softmax_step(s, m, row_sum)
            o = rescale * o
        o = o + p.to(p_dtype or v.dtype).to(v.dtype) @ load(v, columns[-1])
        tiling.memory.store(out, o / row_sum.clamp(min=1), rows)
    return out


def softmax_step(s: Tensor, m: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tile's scores, and the largest and the sum so far -> the new ones with P between, and exp(m - m')."""
    m_new = torch.maximum(m, s.amax(-1, keepdim=True))
    p, rescale = torch.exp(s - m_new), torch.exp(m - m_new)
    return m_new, p, rescale * row_sum + p.sum(-1, keepdim=True), rescale


def ping_pong(n_tiles: int) -> list[tuple[str, str]]:
    """What the product units and the exponentials do at each moment, for two groups of warps, a and b."""
    products = [
        f"{group}: " + ", ".join([f"P V {tile - 1}"] * (tile > 0) + [f"S {tile}"] * (tile < n_tiles))
        for tile in range(n_tiles + 1)
        for group in "ab"
    ]
    exponentials = [f"{group}: softmax {tile}" for tile in range(n_tiles) for group in "ab"]
    return list(zip_longest(products, ["", *exponentials], fillvalue=""))


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, by_block: bool = True, rotation: Tensor | None = None
) -> Tensor:
    """Attention whose products have fp8 factors and fp32 sums. q (B, H, T, D), k (B, H, S, D), v (B, H, S, D_v), fp32.

    by_block   one scale for each tile of a head, or else one for the whole tensor
    rotation   M (D, D), orthogonal, for incoherent processing: `random_rotation`
    """
    if rotation is not None:
        rotation = rotation.to(q)  # its dtype and device
        q, k = q @ rotation, k @ rotation
    q, k, v = (
        round_to_fp8(x, size if by_block else None)
        for x, size in ((q, tiling.q_tile), (k, tiling.k_tile), (v, tiling.k_tile))
    )
    return forward_tiles(q, k, v, tiling, p_dtype=FP8)


def round_to_fp8(x: Tensor, tile: int | None) -> Tensor:
    """x (B, H, T, D) rounded to fp8 times a scale for each `tile` rows of a head, or for all of x. The product of two
    fp8 numbers is exact in fp32, so products of these are what fp8 units give when multiplied by the scales."""
    if tile is None:
        scale = x.abs().amax().clamp(min=1e-30) / torch.finfo(FP8).max
        return (x / scale).to(FP8).to(x.dtype) * scale
    blocks = (x[:, :, rows] for rows in tiles(x.shape[2], tile))
    scales = (
        (block, block.abs().amax((2, 3), keepdim=True).clamp(min=1e-30) / torch.finfo(FP8).max) for block in blocks
    )
    return torch.cat([(block / scale).to(FP8).to(x.dtype) * scale for block, scale in scales], 2)


def random_rotation(width: int, seed: int = 0) -> Tensor:
    """Random signs times a Hadamard matrix: (width, width), orthogonal, float64. On a GPU it costs width log width a
    row. Raises ValueError where `width` is no power of two."""
    if width < 1 or width & (width - 1):
        raise ValueError(f"width = {width} must be a power of two: other Hadamard matrices are not built here")
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < width:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    signs = torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs * hadamard / width**0.5
