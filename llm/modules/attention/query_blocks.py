"""Causal attention in blocks of queries: what training uses on a CPU in bf16.

A block of queries Q_i sees the keys K_i from the first of its window up to its own last one. So the scores above the
diagonal's blocks, almost half of them, are never made, and plain products of this size are what a CPU is fastest at:

    P_i = softmax(scale Q_i K_i^T)        O_i = P_i V_i

    dV_i += P_i^T dO_i        dS_i = P_i * (dO_i V_i^T - sum(dO_i * O_i))        dQ_i = scale dS_i K_i
                                                                              dK_i += scale dS_i^T Q_i

Unlike FlashAttention (flash.py) it keeps the probabilities for the way back: memory for T^2 / 2 numbers a head.
Blog: Attention, multi-head attention and its cost.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.modules.masks import Visible, causal

QUERIES = 128  # in a block: the scores of a block should fit into a core's cache
LONGEST = 512  # tokens; for longer texts the fused kernel is as fast, and keeps nothing


def blocks_serve(q: Tensor, visible: Visible) -> bool:
    """Whether this is the faster way: short texts in bf16 on a CPU, and a mask that lets the text be cut."""
    cut = visible is causal or hasattr(visible, "reach")
    return cut and q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[2] <= LONGEST


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible = causal, scale: float | None = None) -> Tensor:
    """q and k (B, H, T, D), v (B, H, T, D_v), all of one text from position 0 on: -> (B, H, T, D_v).

    `visible` must be `causal` or a window with a `reach` (masks.py).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return QueryBlocks.apply(q * scale, k, v, visible)


class QueryBlocks(torch.autograd.Function):
    """The equations above, for queries that are already scaled."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        shape = v.shape
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T, D)
        out, probabilities = torch.empty_like(v), []
        for rows, keys, mask in blocks(q.shape[1], visible):
            scores = q[:, rows] @ k[:, keys].transpose(1, 2)
            p = scores.add_(mask).softmax(-1)
            out[:, rows] = p @ v[:, keys]
            probabilities.append(p)
        ctx.visible = visible
        ctx.save_for_backward(q, k, v, out, *probabilities)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, *probabilities = ctx.saved_tensors
        shape, grad = grad.shape[:2], grad.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * out).sum(-1, keepdim=True)  # sum_j P dP, for every query
        for p, (rows, keys, _) in zip(probabilities, blocks(q.shape[1], ctx.visible), strict=True):
            dv[:, keys] += p.transpose(1, 2) @ grad[:, rows]
            ds = (grad[:, rows] @ v[:, keys].transpose(1, 2)).sub_(mean[:, rows]).mul_(p)
            dq[:, rows] = ds @ k[:, keys]
            dk[:, keys] += ds.transpose(1, 2) @ q[:, rows]
        return dq.unflatten(0, shape), dk.unflatten(0, shape), dv.unflatten(0, shape), None


def blocks(length: int, visible: Visible) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each block its queries, the keys that some of them see, and the mask of these pairs: 0, or -inf if hidden."""
    positions = torch.arange(length)
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        keys = slice(max(0, start + 1 - getattr(visible, "reach", length)), rows.stop)
        seen = visible(positions[rows, None], positions[None, keys])
        yield rows, keys, torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
