"""Attention for long texts: a block of queries at a time, and its scores a second time in the backward pass.

    S_i = c tanh(scale Q_i K_i^T / c) + bias(i)      P_i = softmax([S_i, sink])      O_i = P_i V_i
    dV_i += P_i^T dO_i       dS_i = P_i * (dO_i V_i^T - sum(dO_i * O_i))             -> bias, and through the cap
    dQ_i = scale dS_i K_i    dK_i += scale dS_i^T Q_i

A block Q_i has 128 queries, and K_i are the keys that some of them see. No more scores exist at a time, so memory grows
with T, also where the scores have a bias, a cap or a sink. This is FlashAttention's idea (flash.py) without its tiles
of keys: a softmax sees all its scores at once.

A bias is a function (q_pos, k_pos) -> numbers added to the scores. It is computed for each block anew, and its gradient
by autograd. One that depends on the distance alone has a method `of_distances`, which spares most of that work. Blog:
Attention, multi-head attention and its cost, sparse attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.modules.kernels.seen_blocks import Block, add, blocks, hide, positions, take
from llm.modules.masks import Mask, causal

Bias = Callable[[Tensor, Tensor], Tensor]


class Scores(NamedTuple):
    """What happens to the products of queries and keys before the softmax."""

    mask: Mask
    bias: Bias | None
    soft_cap: float | None

    def learned(self) -> tuple[Tensor, ...]:
        """The tensors of the bias that need a gradient: what its method `parameters` gives, where it has one."""
        if not hasattr(self.bias, "parameters"):
            return ()
        return tuple(x for x in self.bias.parameters() if x.requires_grad)

    def of(self, products: Tensor, added: Tensor | None, block: Block) -> tuple[Tensor, Tensor | None]:
        """Products (B, H, queries, keys), which are overwritten -> scores, and the cap's tanh, if there is a cap."""
        tanh = None
        if self.soft_cap is not None:
            tanh = products.div_(self.soft_cap).tanh_()
            products = tanh * self.soft_cap
        if added is not None:
            products += added
        hide(products, block, self.mask)
        return products, tanh

    def added(self, block: Block, like: Tensor) -> Tensor | None:
        """The bias of a block, (H, queries, keys) or (B, H, queries, keys)."""
        if self.bias is None:
            return None
        if hasattr(self.bias, "of_distances") and isinstance(block.keys, slice):
            return along_diagonals(self.bias.of_distances, block.rows, block.keys, like.device).to(like.dtype)
        return self.bias(positions(block.rows, like.device), positions(block.keys, like.device)).to(like.dtype)


def along_diagonals(of_distances: Callable[[Tensor], Tensor], rows: slice, keys: slice, device: torch.device) -> Tensor:
    """What depends on the distance alone, computed once for each: distances (n,) -> (n, H), spread out to (H, queries,
    keys). Each row has the numbers of the row before, one place later: they are copied side by side and cut anew."""
    n_rows, n_keys = rows.stop - rows.start, keys.stop - keys.start
    farthest = rows.stop - 1 - keys.start
    values = of_distances(farthest - torch.arange(n_rows + n_keys, device=device)).T
    copies = values[:, None].expand(-1, n_rows, -1).flatten(1)[:, n_rows - 1 : -1]
    return copies.unflatten(1, (n_rows, -1))[..., :n_keys]


def recomputed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = causal,
    scale: float | None = None,
    bias: Bias | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q and k (B, H, T, D), v (B, H, T, D_v), all of one text from position 0 on: -> (B, H, T, D_v).

    `mask` must look back; sinks (H,).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = Scores(mask, bias, soft_cap)
    return Recomputed.apply(q * scale, k, v, sinks, scores, *scores.learned())


class Recomputed(torch.autograd.Function):
    """The equations above, for queries that are already scaled."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, *learned: Tensor):
        ctx.scores, ctx.learned, heads = scores, learned, q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T, D)
        out = torch.empty_like(v)
        for block in blocks(q.shape[1], scores.mask):
            p, *_ = softmax_of_block(q[:, block.rows], take(k, block.keys), heads, scores, sinks, block)
            out[:, block.rows] = p @ take(v, block.keys)
        ctx.save_for_backward(q, k, v, out, sinks)
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, sinks = ctx.saved_tensors
        scores, heads, grad = ctx.scores, grad.shape[:2], grad.flatten(0, 1)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        dlearned = [torch.zeros_like(x) for x in ctx.learned]
        mean = (grad * out).sum(-1, keepdim=True)  # sum_j P dP, for every query
        for block in blocks(q.shape[1], scores.mask):
            rows, keys, _ = block
            k_i, v_i, grad_i = take(k, keys), take(v, keys), grad[:, rows]
            with torch.set_grad_enabled(bool(dlearned)):
                added = scores.added(block, q)
            p, tanh, sink = softmax_of_block(q[:, rows], k_i, heads, scores, sinks, block, added)
            if sinks is not None:
                dsinks -= (sink * mean[:, rows]).unflatten(0, heads).sum((0, 2, 3), dtype=wide)
            add(dv, keys, p.mT @ grad_i)
            ds = (grad_i @ v_i.mT).sub_(mean[:, rows]).mul_(p)
            if dlearned:
                dadded = ds.unflatten(0, heads).sum_to_size(added.shape)
                for total, part in zip(dlearned, torch.autograd.grad(added, ctx.learned, dadded), strict=True):
                    total += part
            if tanh is not None:
                ds = torch.ops.aten.tanh_backward(ds, tanh.flatten(0, 1))
            dq[:, rows] = ds @ k_i
            add(dk, keys, ds.mT @ q[:, rows])
        dq, dk, dv = (x.to(q.dtype).unflatten(0, heads) for x in (dq, dk, dv))
        return dq, dk, dv, dsinks, None, *dlearned


def softmax_of_block(
    q: Tensor, k: Tensor, heads: tuple[int, int], scores: Scores, sinks: Tensor | None, block: Block,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """A block's queries and keys -> probabilities (B H, queries, keys), the cap's tanh, the sink's probability."""
    added = scores.added(block, q) if added is None else added.detach()
    s, tanh = scores.of((q @ k.mT).unflatten(0, heads), added, block)
    if sinks is None:
        return s.softmax(-1).flatten(0, 1), tanh, None
    sink = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
    p = torch.cat([s, sink], -1).softmax(-1).flatten(0, 1)
    return p[..., :-1], tanh, p[..., -1:]
