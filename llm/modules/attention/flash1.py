"""FlashAttention-1: the loop over keys is the outer one, so each tile of the output is read and written many times.

    for each tile k_j, v_j, loaded once:
        for each tile q_i, with o_i, l_i and m_i as they are so far:
            s = scale q_i k_j^T        m~ = max_j s        p~ = exp(s - m~)        l~ = sum_j p~
            m' = max(m_i, m~)          l' = exp(m_i - m') l_i + exp(m~ - m') l~
            o_i = (exp(m_i - m') l_i o_i + exp(m~ - m') p~ v_j) / l'        m_i, l_i = m', l'     all three are stored

After each tile, o_i is the exact attention to the keys so far. FlashAttention-2 (flash.py) exchanges the two loops: o_i
stays in fast memory until it has met all keys, and is divided once. For the backward pass this version keeps m and l,
FlashAttention-2 only L = m + log l.

FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, arXiv 2205.14135, algorithms 1 and 4.
benchmarks/flash.py counts what both read, write and compute (docs/speed.md). Blog: Attention, FlashAttention.
"""

import torch
from torch import Tensor

from llm.modules.attention.flash import Tiling, statistics_dtype


def forward_tiles(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k (B, H, S, D), v (B, H, S, D_v) -> the output (B, H, T, D_v), and m and l, (B, H, T, 1)."""
    load, store = tiling.memory.load, tiling.memory.store
    dtype = statistics_dtype(q)
    least = torch.finfo(dtype).min  # and not -inf, for a row that has seen no key yet: see flash.py
    out = store(v.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype), 0.0)
    row_max = store(q.new_empty(*q.shape[:3], 1, dtype=dtype), least)
    row_sum = store(torch.empty_like(row_max), 0.0)
    for columns in tiling.columns():
        k_j, v_j = load(k, columns), load(v, columns)
        for rows in tiling.rows(columns):
            q_i, o, l_i, m_i = load(q, rows), load(out, rows), load(row_sum, rows), load(row_max, rows)
            s = tiling.scores(q_i, k_j, rows, columns)
            m_tile = s.amax(-1, keepdim=True).clamp(min=least)
            p = torch.exp(s - m_tile)
            m_new = torch.maximum(m_i, m_tile)
            old, new = torch.exp(m_i - m_new), torch.exp(m_tile - m_new)
            l_new = old * l_i + new * p.sum(-1, keepdim=True)
            o_new = old * l_i * o + new * (p.to(v.dtype) @ v_j)
            store(out, o_new / l_new.clamp(min=1), rows)  # the largest score adds 1: only a row without keys has less
            store(row_sum, l_new, rows)
            store(row_max, m_new, rows)
    return out.to(v.dtype), row_max, row_sum


def backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_max: Tensor, row_sum: Tensor, d_out: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k and v, in `statistics_dtype`. D is computed anew for each tile, from o_i and do_i."""
    load, store = tiling.memory.load, tiling.memory.store
    dtype = row_max.dtype
    dq = store(torch.empty_like(q, dtype=dtype), 0.0)
    dk, dv = torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
    for columns in tiling.columns():
        k_j, v_j = load(k, columns), load(v, columns)
        dk_j, dv_j = torch.zeros_like(k_j, dtype=dtype), torch.zeros_like(v_j, dtype=dtype)
        for rows in tiling.rows(columns):
            q_i, o, d_out_i, dq_i = load(q, rows), load(out, rows), load(d_out, rows), load(dq, rows)
            l_i, m_i = load(row_sum, rows), load(row_max, rows)
            p = torch.exp(tiling.scores(q_i, k_j, rows, columns) - m_i) / l_i.clamp(min=1)
            d = (d_out_i.to(dtype) * o.to(dtype)).sum(-1, keepdim=True)
            ds = (p * (d_out_i @ v_j.mT - d) * tiling.scale).to(q.dtype)
            dv_j += p.to(q.dtype).mT @ d_out_i
            dk_j += ds.mT @ q_i
            store(dq, dq_i + ds @ k_j, rows)
        store(dk, dk_j, columns)
        store(dv, dv_j, columns)
    return dq, dk, dv
