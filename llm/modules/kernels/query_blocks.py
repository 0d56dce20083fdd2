"""Attention in blocks of queries whose probabilities are kept: for short texts, and for masks that show few keys.

A block of queries Q_i needs the keys K_i that some of them see (seen_blocks.py). Under a causal mask almost half of the
scores, those above the diagonal's blocks, are never computed, and a CPU is fastest at plain products of this size:

    P_i = softmax(scale Q_i K_i^T + bias_i)        O_i = P_i V_i

    dV_i += P_i^T dO_i        dS_i = P_i * (dO_i V_i^T - sum(dO_i * O_i))        dQ_i = scale dS_i K_i
                                                                              dK_i += scale dS_i^T Q_i

dS_i is the gradient of the bias, too. A sink (sinks.py) is one more score in each softmax, with value 0, so its
gradient is -P sum(dO * O). Unlike FlashAttention (flash.py) this keeps the probabilities for the backward pass: on
average at most FEW_KEYS numbers a query and head. Blog: Attention, multi-head attention and its cost, sparse attention.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.modules.kernels.seen_blocks import LONGEST, QUERIES, add, all_hidden, blocks, mean_scored, places, take
from llm.modules.masks import Causal, Everything, Mask, causal

FEW_KEYS = 1024  # scores that a query may have on average where the text is longer


def is_long(q: Tensor, mask: Mask) -> bool:
    """Whether a mask that is written out would waste time and memory."""
    return mask.looks_back and q.shape[2] > LONGEST


def blocks_serve(q: Tensor, mask: Mask) -> bool:
    """Whether this is the fastest way: short texts in bf16 on a CPU, and masks that show few keys of a long text."""
    if is_long(q, mask):
        return not isinstance(mask, Causal) and mean_scored(q.shape[2], mask) <= FEW_KEYS
    short = q.shape[2] <= LONGEST and q.dtype is torch.bfloat16
    return short and (mask.looks_back or isinstance(mask, Everything)) and q.device.type == "cpu"


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = causal,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    n_queries: int = QUERIES,
) -> Tensor:
    """q and k (B, H, T, D), v (B, H, T, D_v), all of one text from position 0 on: -> (B, H, T, D_v).

    The mask looks back or hides nothing; bias (H, T, T) or (B, H, T, T); sinks (H,). A block has at most `n_queries`
    queries.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias.to(q.dtype)
    sinks = None if sinks is None else sinks.to(q.dtype)
    return QueryBlocks.apply(q * scale, k, v, mask, bias, sinks, n_queries)


class QueryBlocks(torch.autograd.Function):
    """The equations above, for queries that are already scaled."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, sinks: Tensor | None, n_queries: int
    ):
        heads = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T, D)
        out, probabilities = torch.empty_like(v), []
        where = q.shape[1], mask, n_queries
        for block, hidden in zip(blocks(*where), all_hidden(*where, q.dtype, q.device), strict=True):
            rows, keys, n_open = block
            scores = (q[:, rows] @ take(k, keys).mT).unflatten(0, heads)  # (B, H, queries, keys)
            if bias is not None:
                scores += bias[..., rows, places(keys, q.device)]
            scores[..., n_open:] += hidden
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
            p = scores.softmax(-1).flatten(0, 1)
            out[:, rows] = (p if sinks is None else p[..., :-1]) @ take(v, keys)
            probabilities.append(p)
        ctx.mask, ctx.with_sinks, ctx.n_queries = mask, sinks is not None, n_queries
        ctx.save_for_backward(q, k, v, out, bias, *probabilities)
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, bias, *probabilities = ctx.saved_tensors
        heads, grad = grad.shape[:2], grad.flatten(0, 1)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[4] else None
        dsinks = q.new_zeros(heads[1], dtype=wide) if ctx.with_sinks else None
        mean = (grad * out).sum(-1, keepdim=True)  # sum_j P dP, for every query
        for p, (rows, keys, _) in zip(probabilities, blocks(q.shape[1], ctx.mask, ctx.n_queries), strict=True):
            if ctx.with_sinks:
                p, sink = p[..., :-1], p[..., -1:]
                dsinks -= (sink.to(wide) * mean[:, rows]).unflatten(0, heads).sum((0, 2, 3))
            grad_i = grad[:, rows].contiguous()
            add(dv, keys, p.mT @ grad_i)
            ds = (grad_i @ take(v, keys).mT).sub_(mean[:, rows]).mul_(p)
            dq[:, rows] = ds @ take(k, keys)
            add(dk, keys, ds.mT @ q[:, rows])
            if dbias is not None:
                where = ..., rows, places(keys, q.device)
                dbias[where] = ds.unflatten(0, heads).sum_to_size(dbias[where].shape)
        dq, dk, dv = (x.to(q.dtype).unflatten(0, heads) for x in (dq, dk, dv))
        return dq, dk, dv, None, dbias, dsinks, None
