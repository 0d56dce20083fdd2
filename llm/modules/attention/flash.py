"""FlashAttention-2: exact attention in tiles, so that memory never holds all T x S scores.

Forward: for each tile of queries q_i, loop over the tiles k_j, v_j of keys and values:

    s = scale q_i k_j^T                     scores of this tile only
    m' = max(m, max_j s)                    the largest score of each row so far
    p = exp(s - m')                         softmax without its denominator, which is not known yet
    l = exp(m - m') l + sum_j p             denominator so far: the old sum is rescaled to the new maximum
    o = exp(m - m') o + p v_j               the output is rescaled in the same way: the online softmax

    out_i = o / l        L_i = m + log l    saved for the backward pass: one number for each row

Backward: for each tile of keys, loop over the tiles of queries and recompute the scores:

    P = exp(s - L_i)                        the full softmax, since L_i has the denominator
    dv_j += P^T dout_i                      since out = P v
    dP = dout_i v_j^T
    dS = P (dP - D_i)                       gradient of a softmax; D = sum_j P dP = sum over channels of dout_i out_i
    dq_i += scale dS k_j                    dk_j += scale dS^T q_i

Memory grows with T + S, not T S. Fast implementations, such as PyTorch's fused attention, run this in one GPU kernel: a
tile of scores stays in fast on-chip memory. The Python loops here show the algorithm; they are not fast.

What changed since FlashAttention-1 (flash1.py): there the loop over keys is the outer one, o_i is loaded, divided by l
and stored for each tile of keys, and m and l are both kept. Here o_i is stored once and divided once. So there is less
work beside the products, and no step of the outer loop needs another one: each tile of queries can go to its own block
of GPU threads, also where there are few heads. Within one, each warp takes some rows of q_i and all of k_j, so that no
sum is shared between warps; before, the warps took parts of k_j. Backward, a block of threads takes a tile of keys,
and only dq_i is summed over the blocks.

Moved between slow and fast memory, and computed, for one head with N = 1,024 and d = 64, fast memory for M = 16,384
numbers; in thousands, counted by benchmarks/flash.py (docs/speed.md has the backward passes, too):

    forward               reads    writes   FLOPs of products   other FLOPs
    standard attention    2,294     2,163             268,435         6,291      O(N d + N^2) numbers
    FlashAttention-1      2,261     1,149             268,435        14,926      O(N^2 d^2 / M)
    FlashAttention-2      2,163        67             268,435        12,799      O(N^2 d^2 / M)

FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691, section 3. flash3.py has FlashAttention-3.
Blog: Attention, FlashAttention.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.modules.attention.core import share_heads
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.slow_memory import SlowMemory
from llm.modules.cache import Places
from llm.modules.masks import Causal, Mask, causal, visibility


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    mask: Mask = causal,
    scale: float | None = None,
    q_tile: int = 64,
    k_tile: int = 64,
) -> Tensor:
    """Queries (B, H, T, D) attend to the keys (B, H_kv, S, D) that `mask` shows them: -> (B, H, T, D_v), v's dtype.

    T and S need not be multiples of the tiles. A query that sees no key gets zeros. Row maxima and sums are fp32
    (float64 for float64 input). Raises ValueError for a tile size below 1.
    """
    if q_tile < 1 or k_tile < 1:
        raise ValueError(f"tiles of {q_tile} queries x {k_tile} keys: both must be at least 1 (--model.tile-size)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tiling = Tiling(places, mask, scale, q_tile, k_tile)
    k, v = share_heads(q, k), share_heads(q, v)
    return TiledAttention.apply(q.to(v.dtype), k.to(v.dtype), v, tiling)


@dataclass(frozen=True)
class Tiling:
    """How the T x S scores are cut into tiles, how the scores of one tile are computed, and what is moved for them."""

    places: Places
    mask: Mask
    scale: float
    q_tile: int
    k_tile: int
    memory: SlowMemory = field(default_factory=SlowMemory)

    def rows(self, columns: slice | None = None) -> Iterator[slice]:
        """Tiles of queries, from the first to the last: all, or those that may see some of the keys `columns`."""
        found = tiles(self.places.q.shape[-1], self.q_tile)
        return (rows for rows in found if columns is None or not self.is_causal or columns.start < rows.stop)

    def columns(self, rows: slice | None = None) -> Iterator[slice]:
        """Tiles of keys: all, or those that the queries `rows` may see. Keys after the last of them are left out."""
        length = self.places.k.shape[-1]
        return tiles(length if rows is None or not self.is_causal else rows.stop, self.k_tile)

    @property
    def is_causal(self) -> bool:
        """Whether query i sees keys 0..i."""
        return isinstance(self.mask, Causal) and self.places.whole_text

    def scores(self, q_i: Tensor, k_j: Tensor, rows: slice, columns: slice) -> Tensor:
        """(B, H, q_tile, k_tile) in `statistics_dtype`, -inf where the query does not see the key."""
        s = (q_i @ k_j.mT).to(statistics_dtype(q_i)) * self.scale
        shown = visibility(self.mask, self.places.q[..., rows], self.places.k[..., columns])
        return s.masked_fill(~shown, -torch.inf)


def tiles(length: int, size: int) -> Iterator[slice]:
    """Cut 0..length into slices of `size`; the last one may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class TiledAttention(torch.autograd.Function):
    """With as many key heads as query heads: q (B, H, T, D), k (B, H, S, D), v (B, H, S, D_v) -> (B, H, T, D_v)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
        out, log_sum_exp = forward_tiles(q, k, v, tiling)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.tiling = tiling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_tiles(*ctx.saved_tensors, d_out, ctx.tiling), None


def forward_tiles(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """-> the output (B, H, T, D_v) and the log-sum-exp of each row of scores, (B, H, T, 1)."""
    load, store = tiling.memory.load, tiling.memory.store
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    log_sum_exp = q.new_empty(*q.shape[:-1], 1, dtype=statistics_dtype(q))
    for rows in tiling.rows():
        q_i = load(q, rows)
        # the least finite number, not -inf: in a row that has seen no key yet, exp(-inf - m) is then 0 and not NaN
        m = torch.full_like(log_sum_exp[:, :, rows], torch.finfo(log_sum_exp.dtype).min)
        row_sum = torch.zeros_like(m)
        o = out.new_zeros(out[:, :, rows].shape, dtype=m.dtype)
        for columns in tiling.columns(rows):
            s = tiling.scores(q_i, load(k, columns), rows, columns)
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            p, rescale = torch.exp(s - m_new), torch.exp(m - m_new)
            row_sum = rescale * row_sum + p.sum(-1, keepdim=True)
            o = rescale * o + p.to(v.dtype) @ load(v, columns)
            m = m_new
        row_sum = row_sum.clamp(min=1)  # the largest score adds exp(0) = 1: only a row without keys has less
        store(out, o / row_sum, rows)
        store(log_sum_exp, m + row_sum.log(), rows)
    return out, log_sum_exp


def backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, d_out: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k and v, in their shapes and dtypes, summed in `statistics_dtype`."""
    load, store = tiling.memory.load, tiling.memory.store
    dtype = log_sum_exp.dtype
    dq, dk, dv, d = (torch.empty_like(x, dtype=dtype) for x in (q, k, v, log_sum_exp))
    for rows in tiling.rows():
        product = load(d_out, rows).to(dtype) * load(out, rows).to(dtype)
        store(d, product.sum(-1, keepdim=True), rows)  # D in the module docstring, (B, H, T, 1)
    store(dq, 0.0)
    for columns in tiling.columns():
        k_j, v_j = load(k, columns), load(v, columns)
        dk_j, dv_j = torch.zeros_like(k_j, dtype=dtype), torch.zeros_like(v_j, dtype=dtype)
        for rows in tiling.rows(columns):
            q_i, d_out_i, d_i = load(q, rows), load(d_out, rows), load(d, rows)
            p = torch.exp(tiling.scores(q_i, k_j, rows, columns) - load(log_sum_exp, rows))
            ds = (p * (d_out_i @ v_j.mT - d_i) * tiling.scale).to(q.dtype)
            dv_j += p.to(q.dtype).mT @ d_out_i
            dk_j += ds.mT @ q_i
            store(dq, load(dq, rows) + ds @ k_j, rows)
        store(dk, dk_j, columns)
        store(dv, dv_j, columns)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class FlashAttention(MultiHeadAttention):
    """Multi-head attention whose scores are computed in tiles of `tile_size` queries x `tile_size` keys."""

    def __init__(self, *, tile_size: int = 64, **options):
        """`options` are those of MultiHeadAttention; raises ValueError for a score_bias."""
        super().__init__(**options)
        if self.score_bias is not None:
            raise ValueError("FlashAttention takes no score_bias: these tiles have no gradient for it")
        self.tile_size = tile_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return flash_attention(q, k, v, places, self.mask, self.scale, self.tile_size, self.tile_size)
