"""Products of queries and keys within a chunk, decayed by the tokens between the two.

    p[t, j] = sum_c q_tc k_jc exp(total_tc - total_jc), j <= t        total: the sum of the log decays until a token

One decay for all channels of a head factors out of the sum (`DecayedByHead`). Decays by channel are split into
exp(total_t - m) and exp(m - total_j), with m in the middle of the chunk, while these cannot overflow
(`DecayedByChannel`). Otherwise the chunk is halved: seen from the boundary, the late half has decayed since and the
early half will have decayed until then, so that both exponents are <= 0. The halves begin again.

The gradients are written out: autograd would keep more tensors (.., C, C) and pass over each several times.
Gated Linear Attention, arXiv 2312.06635, section 4. Blog: State-space models.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.modules.kernels.precision import is_remote


def decayed_products(q: Tensor, k: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """p, 0 where j > t, of each of S sets of queries with each of R sets of keys; products are computed in `dtype`.

    q (.., S, C, K), k (.., R, C, K), total (.., C, 1 or K) -> (.., S, R, C, C).
    """
    size = q.shape[-2]
    if total.shape[-1] == 1:
        return DecayedByHead.apply(each_with_each(q.to(dtype), k.to(dtype)), total[..., None, None, :, :])
    if size == 1:
        return each_with_each(q, k).to(dtype)
    first, last = total[..., :1, :], total[..., -1:, :]
    if not is_remote(total) and (first - last).amax() < math.log(torch.finfo(dtype).max) - 10:
        return DecayedByChannel.apply(q.to(dtype), k.to(dtype), total - (first + last) / 2)
    q, k = (x.unflatten(-2, (2, -1)).transpose(-4, -3) for x in (q, k))  # (.., 2, S or R, C / 2, K)
    total = total.unflatten(-2, (2, -1))
    early, late = total.unbind(-3)
    boundary = early[..., -1:, :]
    q_late = q[..., 1, :, :, :] * (late - boundary).exp()[..., None, :, :]
    k_early = k[..., 0, :, :, :] * (boundary - early).exp()[..., None, :, :]
    across = each_with_each(q_late.to(dtype), k_early.to(dtype))
    first, second = decayed_products(q, k, total, dtype).unbind(-5)
    return torch.cat([F.pad(first, (0, size // 2)), torch.cat([across, second], -1)], -2)


def each_with_each(q: Tensor, k: Tensor) -> Tensor:
    """q (.., S, C, K), k (.., R, C, K) -> q k^T (.., S, R, C, C), as one product."""
    (n_q, size), n_k = q.shape[-3:-1], k.shape[-3]
    products = q.flatten(-3, -2) @ k.flatten(-3, -2).mT
    return products.unflatten(-1, (n_k, size)).unflatten(-3, (n_q, size)).transpose(-3, -2)


class DecayedByChannel(torch.autograd.Function):
    """tril(q' k'^T) with q' = q exp(total) and k' = k exp(-total), of each q (.., S, C, K) with each k (.., R, C, K).

    total (.., C, K) may be shifted by a constant. dtotal = q' dq' - k' dk'. A token's product with itself does not
    decay: it would add the same number to both terms, and only its rounding errors would not cancel. Both leave it out.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, total: Tensor) -> Tensor:
        until, since = (x.exp()[..., None, :, :].to(q.dtype) for x in (total, -total))
        ctx.save_for_backward(q, k, until, since)
        return each_with_each(q * until, k * since).tril()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, until, since = ctx.saved_tensors
        q_decayed, k_decayed = q * until, k * since
        pairs = grad.tril(-1).transpose(-3, -2).flatten(-4, -3).flatten(-2)  # (.., S C, R C)
        grad_q = (pairs @ k_decayed.flatten(-3, -2)).view_as(q)
        grad_k = (pairs.mT @ q_decayed.flatten(-3, -2)).view_as(k)
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_total = (q_decayed.mul_(grad_q)).sum(-3, dtype=wide) - (k_decayed.mul_(grad_k)).sum(-3, dtype=wide)
        grad_q, grad_k = grad_q.mul_(until), grad_k.mul_(since)
        itself = grad.diagonal(dim1=-2, dim2=-1)[..., None]  # (.., S, R, C, 1)
        for i in range(k.shape[-3]):
            grad_q.addcmul_(itself[..., :, i, :, :], k[..., i : i + 1, :, :])
        for i in range(q.shape[-3]):
            grad_k.addcmul_(itself[..., i, :, :, :], q[..., i : i + 1, :, :])
        return grad_q, grad_k, grad_total


class DecayedByHead(torch.autograd.Function):
    """p = q k^T * exp(total_t - total_j), j <= t, else 0: q k^T (.., C, C), total (.., C, 1) -> q k^T's dtype.

    dtotal_t is the sum of row t of p * dp less the sum of its column t.
    """

    @staticmethod
    def forward(ctx, products: Tensor, total: Tensor) -> Tensor:
        size = total.shape[-2]
        hidden = torch.full((size, size), -torch.inf, dtype=total.dtype, device=total.device).triu(1)
        decay = (total - total.mT).add_(hidden).exp_().to(products.dtype)
        decayed = products * decay
        ctx.save_for_backward(decay, decayed)
        ctx.shapes = products.shape, total.shape
        return decayed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        decay, decayed = ctx.saved_tensors
        of_products, of_total = ctx.shapes
        grad_products = (grad * decay).sum_to_size(of_products)
        if not ctx.needs_input_grad[1]:
            return grad_products, None
        wide = torch.promote_types(grad.dtype, torch.float32)
        by_both = grad * decayed
        grad_total = by_both.sum(-1, keepdim=True, dtype=wide) - by_both.sum(-2, dtype=wide)[..., None]
        return grad_products, grad_total.sum_to_size(of_total)
