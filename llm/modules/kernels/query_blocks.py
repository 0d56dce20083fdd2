"""Attention in blocks of queries: the fastest way on a CPU in bf16, for masks that show no later key.

The block Q_i needs the keys K_i from its first visible key to the position of its last query. So up to 3/8 of the
scores, those above the diagonal blocks, are never computed, and a CPU is fastest at plain products of this size:

    P_i = softmax(scale Q_i K_i^T + bias_i)        O_i = P_i V_i

    dV_i += P_i^T dO_i        dS_i = P_i * (dO_i V_i^T - sum(dO_i * O_i))        dQ_i = scale dS_i K_i
                                                                              dK_i += scale dS_i^T Q_i

dS_i is the gradient of the bias, too. A sink (sinks.py) is one more score in each softmax, with value 0, so its
gradient is -P sum(dO * O). Unlike FlashAttention (flash.py) this keeps the probabilities for the backward pass, T^2 / 2
numbers a head. Blog: Attention, multi-head attention and its cost.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.modules.masks import Mask, causal

QUERIES = 128  # in a block: the scores of a block should fit into a core's cache
LONGEST = 512  # tokens; for longer texts the fused kernel is as fast, and keeps nothing


def blocks_serve(q: Tensor, mask: Mask) -> bool:
    """Whether this is the faster way: short texts in bf16 on a CPU, and a mask that shows no later keys."""
    return mask.looks_back and q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[2] <= LONGEST


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = causal,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q and k (B, H, T, D), v (B, H, T, D_v), all of one text from position 0 on: -> (B, H, T, D_v).

    `mask.looks_back` must hold; bias (H, T, T) or (B, H, T, T); sinks (H,).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias.to(q.dtype)
    sinks = None if sinks is None else sinks.to(q.dtype)
    return QueryBlocks.apply(q * scale, k, v, mask, bias, sinks)


class QueryBlocks(torch.autograd.Function):
    """The equations above, for queries that are already scaled."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, sinks: Tensor | None):
        heads = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T, D)
        out, probabilities = torch.empty_like(v), []
        for rows, keys in blocks(q.shape[1], mask):
            scores = (q[:, rows] @ k[:, keys].transpose(1, 2)).unflatten(0, heads)  # (B, H, queries, keys)
            added = hidden(rows, keys, mask, q.dtype)
            scores += added if bias is None else added + bias[..., rows, keys]
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
            p = scores.softmax(-1).flatten(0, 1)
            out[:, rows] = p[..., : added.shape[1]] @ v[:, keys]
            probabilities.append(p)
        ctx.mask, ctx.with_sinks = mask, sinks is not None
        ctx.save_for_backward(q, k, v, out, bias, *probabilities)
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, bias, *probabilities = ctx.saved_tensors
        heads, grad = grad.shape[:2], grad.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[4] else None
        wide = torch.promote_types(q.dtype, torch.float32)
        dsinks = torch.zeros(heads[1], dtype=wide) if ctx.with_sinks else None
        mean = (grad * out).sum(-1, keepdim=True)  # sum_j P dP, for every query
        for p, (rows, keys) in zip(probabilities, blocks(q.shape[1], ctx.mask), strict=True):
            if ctx.with_sinks:
                p, sink = p[..., :-1], p[..., -1:]
                dsinks -= (sink.to(wide) * mean[:, rows]).unflatten(0, heads).sum((0, 2, 3))
            dv[:, keys] += p.transpose(1, 2) @ grad[:, rows]
            ds = (grad[:, rows] @ v[:, keys].transpose(1, 2)).sub_(mean[:, rows]).mul_(p)
            dq[:, rows] = ds @ k[:, keys]
            dk[:, keys] += ds.transpose(1, 2) @ q[:, rows]
            if dbias is not None:
                dbias[..., rows, keys] = ds.unflatten(0, heads).sum_to_size(dbias[..., rows, keys].shape)
        return dq.unflatten(0, heads), dk.unflatten(0, heads), dv.unflatten(0, heads), None, dbias, dsinks


def blocks(length: int, mask: Mask) -> Iterator[tuple[slice, slice]]:
    """Each block's queries, and the keys that some of them see."""
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        yield rows, slice(max(0, start + 1 - mask.reach), rows.stop)


def hidden(rows: slice, keys: slice, mask: Mask, dtype: torch.dtype) -> Tensor:
    """What is added to a block's scores, (queries, keys): 0, or -inf where the query does not see the key."""
    q_pos, k_pos = torch.arange(rows.start, rows.stop), torch.arange(keys.start, keys.stop)
    seen = mask.visible(q_pos[:, None], k_pos[None])
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
